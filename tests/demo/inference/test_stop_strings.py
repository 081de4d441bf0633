"""Stop strings: where the text ends, however it comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.inference.stop_strings import StopStrings


def ends(text: str, strings: list[str]) -> tuple[str, str | None]:
    """What is left of a text that comes one character at a time, and the string that ended it."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def push(stops: StopStrings, pieces: list[str]) -> list[str]:
    return [*(stops.push(piece) for piece in pieces), stops.finish()]


TEXT = st.text(alphabet="ab\n", max_size=30)


@given(
    st.lists(TEXT, max_size=12),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(pieces, strings):
    stops = StopStrings(strings)
    out = "".join(push(stops, pieces))
    assert (out, stops.found) == ends("".join(pieces), strings)


@pytest.mark.parametrize(
    ("strings", "pieces", "out"),
    [
        (["\n\n"], ["a\n", "b", "\n", "\nc"], ["a", "\nb", "", "", ""]),
        (["def "], ["de", "l d", "ef", " x", "y"], ["", "del ", "", "", "", ""]),
        (["abab"], ["ab", "ab"], ["", "", ""]),
        (["abac"], ["aba", "b", "a", "c"], ["", "ab", "", "", ""]),
        (["stop"], ["st", "op the"], ["", "", ""]),
        (["xyz"], ["ab", "xy"], ["ab", "", "xy"]),
        ([], ["a", "b"], ["a", "b", ""]),
    ],
    ids=["newlines", "held twice", "own prefix", "prefix again", "at once", "never", "none"],
)
def test_only_what_is_certain_comes_out(strings, pieces, out):
    assert push(StopStrings(strings), pieces) == out


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character, got"):
        StopStrings(["a", ""])
