"""The tokens of a table's documents: from a cache, in parallel, and in pieces where one is long.

The tokens of a long text are put together from windows of it. A window is a piece of the text with
a margin of its neighbours. Two of them are joined inside their margins, where both have a token
that begins at the same character of the same word, and the same tokens around it: up to there the
one window decides, from there the other. A word is what a tokenizer splits a text into before
anything else, and its tokens depend on no other word. Inside a word it is byte-pair encoding that
allows it: two encodings with a token in common are, joined at it, the encoding of the joined text
(github.com/github/rust-gems, crates/bpe, corollary III). Where two windows do not agree, the second
is encoded anew: first from where a word of the other begins (a long row of digits is split in
threes from its beginning on), then with all of the other before it.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from demo.checkpoints.tokenizer import TextTokenizer, Tokenizer
from demo.config.command import process_rank
from demo.data.sources import PIECE, pieces, quiet

if TYPE_CHECKING:
    import datasets

TOKENS_VERSION = 1  # of what `_generate_tokens` makes of texts: raise it when that changes
MARGIN, ALIKE = 1024, 8  # characters on each side of a piece; tokens on each side of a join
LINE_EVERY = 30.0  # seconds, where there is no terminal for a bar

Item, Result = TypeVar("Item"), TypeVar("Result")


def texts(
    table: "datasets.Dataset", cut: int | None = None
) -> Iterator[tuple[int, str, memoryview]]:
    """The pieces of a table's documents in order: the document's number, its name or "", and the
    piece. With `cut` the only document becomes two, the second from this byte on."""
    document, name, at = -1, "", 0
    for rows in table.with_format("arrow").iter(batch_size=256):
        names = rows["name"].to_pylist() if "name" in rows.column_names else [""] * len(rows)
        for named, text in zip(names, _views(rows["text"]), strict=True):
            if named is not None:
                document, name = document + 1, named
            for piece in pieces(text):
                if cut is None:
                    yield document, name, piece
                    continue
                first = min(max(cut - at, 0), len(piece))
                at += len(piece)
                yield from ((i, name, p) for i, p in enumerate([piece[:first], piece[first:]]) if p)


def _views(column: Any) -> Iterator[memoryview]:
    """The texts of a pyarrow column where they lie: a scalar of it would be a copy."""
    import pyarrow

    for chunk in column.chunks:
        chunk = chunk.cast(pyarrow.large_binary()).fill_null(b"")
        _, ends, data = chunk.buffers()
        ends = np.frombuffer(ends, np.int64)[chunk.offset :][: len(chunk) + 1].tolist()
        data = memoryview(data or b"")
        yield from (data[begin:end] for begin, end in pairwise(ends))


def encode(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """The tokens of a document and its end, if the tokenizer has one."""
    return tokenizer.encode(text) + ([] if tokenizer.eos is None else [tokenizer.eos])


def token_dtype(tokenizer: Tokenizer) -> str:
    """The name of the smallest unsigned integer type for the tokens."""
    sizes = {"uint8": 2**8, "uint16": 2**16, "uint32": 2**32}
    return next(name for name, size in sizes.items() if tokenizer.vocab_size <= size)


def tokenize(
    table: "datasets.Dataset", tokenizer: TextTokenizer, cut: int | None = None
) -> "datasets.Dataset":
    """A table with the columns `document`, a number, and `tokens`, from the cache when neither
    `table` nor tokenizer is new. A long document has several rows, which follow each other.

    Each document ends with the tokenizer's end of a document, if it has one. With `cut` the only
    document becomes two, the second from this byte on.
    """
    import datasets
    from datasets.fingerprint import Hasher

    tokens = datasets.List(datasets.Value(token_dtype(tokenizer)))
    with quiet(progress_bars=False):
        return datasets.Dataset.from_generator(
            _generate_tokens,
            gen_kwargs={"table": table, "tokenizer": tokenizer, "cut": cut},
            features=datasets.Features({"document": datasets.Value("int64"), "tokens": tokens}),
            fingerprint=Hasher.hash((TOKENS_VERSION, table, tokenizer, cut)),
            writer_batch_size=100,  # rows that it holds as objects of Python, up to 2 MB each
        )


@dataclass(frozen=True)
class Window:
    """A piece of a document with margins.

    Attributes:
        text: All of it.
        left, right: How many characters are margin; none where the document begins or ends.
        size: Bytes of the piece.
    """

    document: int
    text: str
    left: int
    right: int
    size: int


def _generate_tokens(
    table: "datasets.Dataset", tokenizer: TextTokenizer, cut: int | None
) -> Iterator[dict[str, Any]]:
    """The rows of `tokenize`."""
    dtype = token_dtype(tokenizer)
    eos = [] if tokenizer.eos is None else [tokenizer.eos]

    def encoded(bundle: list[Window]) -> list[tuple[Window, Any]]:
        return [
            (w, tokenizer.tokenizer.encode(w.text))
            if w.left or w.right
            else (w, encode(tokenizer, w.text.encode()))
            for w in bundle
        ]

    total = _text_size(table)
    with ThreadPoolExecutor(threads := min(16, os.cpu_count() or 1)) as pool:
        bundles = _bundles(_windows(texts(table, cut)))
        results = _in_order(pool, encoded, bundles, ahead=2 * threads)
        results = _progress(chain.from_iterable(results), total)
        part = None
        for window, found in results:
            tokens = []
            if window.left:
                tokens = part.join(window, found)
            elif window.right:
                part = Part(tokenizer.tokenizer, window, found)
            else:
                tokens = found
            if window.left and not window.right:
                tokens = tokens + part.ids[part.first :] + eos
            yield {"document": window.document, "tokens": np.array(tokens, dtype)}


class Part:
    """The tokens of a long document from `first` on, as far as its windows have been read.

    Args:
        tokenizer: Of the tokenizers library.
        window: The first of a document, and its `encoding`.
    """

    def __init__(self, tokenizer: Any, window: Window, encoding: Any) -> None:
        self.tokenizer, self.first, self.wanted = tokenizer, 0, 0
        self._set(window.text, window.right, encoding)

    def _set(self, text: str, right: int, encoding: Any) -> None:
        self.text, self.right = text, right
        self.encoding, self.ids = encoding, encoding.ids if encoding else []

    def join(self, window: Window, encoding: Any) -> list[int]:
        """The tokens that are certain now that the next window is known."""
        end = len(self.text) - self.right  # of all pieces so far
        after = window.text[window.left :]
        if self.encoding:
            given = self._cross(window.text, end - window.left, window.right, encoding)
            if given is None:
                near = map(self.encoding.char_to_token, range(max(0, end - MARGIN), end))
                token = next(filter(None, near), 0)
                begin = word_start(self.encoding, token) if token else 0
                text = self.text[begin:end] + after
                given = self._cross(text, begin, window.right, self.tokenizer.encode(text))
            if given is not None:
                return given
            self.wanted = 2 * len(self.text)  # each text is encoded when it is twice as long
        text = self.text[:end] + after
        ready = not window.right or len(text) >= self.wanted
        self._set(text, window.right, self.tokenizer.encode(text) if ready else None)
        return []

    def _cross(self, text: str, begin: int, right: int, encoding: Any) -> list[int] | None:
        """Go on with the encoding of a text that begins at character `begin` of this one, from
        where the two are alike. The tokens up to there, or None."""
        ids, x = encoding.ids, len(self.text) - self.right - begin
        while x > 0:
            if (there := encoding.char_to_token(x)) is None:  # a space that is no token's
                x -= 1
                continue
            start = encoding.token_to_chars(there)[0]
            here = self.encoding.char_to_token(start + begin)
            if here is not None and self.encoding.token_to_chars(here)[0] == start + begin:
                alike = ids[max(0, there - ALIKE) : there + ALIKE]
                mine = self.ids[max(0, here - ALIKE) : here + ALIKE]
                words = word_start(self.encoding, here), word_start(encoding, there)
                # The text may begin inside a word.
                same = words[0] == words[1] + begin or (words[0] <= begin and not words[1])
                if same and alike == mine and len(alike) == 2 * ALIKE:
                    given, self.first = self.ids[self.first : here], there
                    self._set(text, right, encoding)
                    return given
            x = start - 1
        return None


def word_start(encoding: Any, token: int) -> int:
    """The character at which the word begins that a token is of: what the tokenizer splits a text
    into before anything else."""
    word = encoding.token_to_word(token)
    return (encoding.token_to_chars(token) if word is None else encoding.word_to_chars(word))[0]


def _windows(found: Iterable[tuple[int, str, memoryview]]) -> Iterator[Window]:
    decoded = ((doc, str(piece, "utf-8", "replace"), len(piece)) for doc, _, piece in found)
    left = ""
    for (document, text, size), (following, after, _) in pairwise(chain(decoded, [(None, "", 0)])):
        goes_on = following == document
        right = after[:MARGIN] if goes_on else ""
        yield Window(document, left + text + right, len(left), len(right), size)
        left = text[-MARGIN:] if goes_on else ""


def _bundles(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """As much as is worth a thread's while."""
    bundle, size = [], 0
    for window in windows:
        bundle.append(window)
        size += 100 + window.size
        if size >= PIECE:
            yield bundle
            bundle, size = [], 0
    yield bundle


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """The results of `work`, of which no more than `ahead` wait to be taken."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _text_size(table: "datasets.Dataset") -> int:
    import pyarrow.compute as pc

    return sum(
        pc.sum(pc.binary_length(rows["text"])).as_py() or 0
        for rows in table.with_format("arrow").iter(batch_size=4096)
    )


def _progress(results: Iterator[tuple[Window, Any]], total: int) -> Iterator[tuple[Window, Any]]:
    """Show how much has been tokenized: in a bar or, without a terminal, a line twice a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console, first = Console(), process_rank() == 0
    columns = TextColumn("Tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    shown, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not (first and console.is_terminal)) as bar:
        task = bar.add_task("", total=total)
        for window, found in results:
            yield window, found
            done += window.size
            bar.update(task, completed=done)
            if first and not console.is_terminal and time.perf_counter() - shown > LINE_EVERY:
                shown = time.perf_counter()
                print(f"tokenized {done / total:.0%} of {total / 1e6:,.0f} MB", flush=True)
