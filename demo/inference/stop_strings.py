"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of some strings is complete; that string is not passed on.

    Text that may be the beginning of a stop string is held back until it is certain. What comes
    out does not depend on how the text was cut into pieces: of several strings the one that is
    complete first counts, and of those that end at the same character the longest.

    Args:
        strings: None of them empty.
    Attributes:
        found: The string that ended the text, or None.
    Raises:
        ValueError: for an empty string.
    """

    def __init__(self, strings: Sequence[str]):
        if not all(strings):
            raise ValueError(
                f"stop strings must have at least one character, got {list(strings)!r}; "
                "leave the empty one out"
            )
        self.strings = tuple(strings)
        self.found: str | None = None
        self.held = ""

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.found is not None:
            return ""
        text = self.held + text
        ends = [(at + len(s), at, s) for s in self.strings if (at := text.find(s)) >= 0]
        if ends:
            _, begin, self.found = min(ends)
            self.held = ""
            return text[:begin]
        certain = len(text) - self._doubtful(text)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self.held = self.held, ""
        return held

    def _doubtful(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max(
            (
                length
                for string in self.strings
                for length in range(1, len(string))
                if text.endswith(string[:length])
            ),
            default=0,
        )
