"""From text to tokens and back: bytes, or a `tokenizer.json` of the tokenizers library."""

import codecs
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from demo.checkpoints.atomic import write_atomically
from demo.checkpoints.hub import download, is_hub_id
from demo.config.errors import first_line

TOKENIZER, OPTIONS = "tokenizer.json", "tokenizer_config.json"

# What ends a document in published tokenizers, for one whose folder does not say.
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


class ByteTokenizer:
    """Every byte is a token.

    Attributes:
        vocab_size: Tokens are below it.
        eos: The token that ends a document, or None.
    """

    vocab_size = 256
    eos = None

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text, which is given as bytes so that any file survives."""
        return list(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out; what is not UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")

    def stream(self) -> "ByteStream":
        """A decoder for tokens that come one at a time."""
        return ByteStream()

    def save(self, folder: Path) -> None:
        """Write what `tokenizer_of` reads back: nothing for bytes."""


class ByteStream:
    """Tokens in, text out as soon as no later token can change it; the pieces join to what `decode`
    makes of all tokens."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became certain with this token, often none."""
        return self.decoder.decode(bytes([token]))

    def finish(self) -> str:
        """The rest: unfinished characters as U+FFFD."""
        return self.decoder.decode(b"", final=True)


class TextTokenizer:
    """As ByteTokenizer, but for a `tokenizers.Tokenizer`, which sees U+FFFD for what is not UTF-8.

    Args:
        tokenizer: It adds its own special tokens to a text, as in the model's training.
        eos: The token that ends a document, or None.
    """

    def __init__(self, tokenizer: Any, eos: int | None = None):
        tokenizer.no_truncation()  # both are kept in the file, and are about batches
        tokenizer.no_padding()
        self.tokenizer, self.eos = tokenizer, eos
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode("utf-8", "replace")).ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def stream(self) -> "TextStream":
        return TextStream(self.decode)

    def save(self, folder: Path) -> None:
        texts = {TOKENIZER: self.tokenizer.to_str(pretty=True)}
        if self.eos is not None:
            options = {
                "tokenizer_class": "PreTrainedTokenizerFast",  # transformers asks for one
                "eos_token": self.tokenizer.id_to_token(self.eos),
            }
            texts[OPTIONS] = json.dumps(options, ensure_ascii=False, indent=2)
        for name, text in texts.items():
            write_atomically(
                folder / name, lambda part, text=text: part.write_text(text, encoding="utf-8")
            )


class TextStream:
    """As ByteStream. How a token reads depends on those before it (the first loses its leading
    space, a character can span tokens), so a window of tokens is decoded that starts one piece
    earlier than the text that is given out."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.window: list[int] = []
        self.given = 0  # tokens at the start of the window whose text has been given out

    def push(self, token: int) -> str:
        self.window.append(token)
        text = self.finish()
        if not text or text.endswith("\ufffd"):
            return ""  # perhaps the beginning of a character
        self.window, self.given = self.window[self.given :], len(self.window) - self.given
        return text

    def finish(self) -> str:
        return self.decode(self.window)[len(self.decode(self.window[: self.given])) :]


Tokenizer = ByteTokenizer | TextTokenizer


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer that `source` names.

    Args:
        source: "bytes", a `tokenizer.json`, a folder that has one, or a hub id.
    Raises:
        ValueError: for anything else, for a damaged file, and when a package is missing.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        path = path / TOKENIZER
    elif not path.exists() and is_hub_id(source):
        path = download(source, TOKENIZER, OPTIONS) / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"a tokenizer must be bytes, a {TOKENIZER}, a folder with one or a hub id, got "
            f"{source!r}, where there is no such file; name another one, or use bytes"
        )
    return _read(path)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: its `tokenizer.json`, or bytes where it has none.

    Raises:
        ValueError: for a damaged file, and when a package is missing.
    """
    file = folder / TOKENIZER
    return _read(file) if file.is_file() else ByteTokenizer()


def _read(file: Path) -> TextTokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"{str(file)!r} needs the package tokenizers, which is not installed; "
            "pip install tokenizers"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself for what it cannot parse
        raise ValueError(
            f"{str(file)!r} must be a file of the tokenizers library, but it cannot be read "
            f"({first_line(error)}); download or train it again"
        ) from error
    try:
        tokenizer.encode("\ufffd")  # also stands for what is not UTF-8
    except Exception as error:  # the library raises Exception itself for an unknown character
        raise ValueError(
            f"{str(file)!r} must be of a tokenizer that takes any text, got one that does not "
            f"({first_line(error)}); train it with bytes for its alphabet, or with an unk_token"
        ) from error
    return TextTokenizer(tokenizer, _find_eos(tokenizer, file.with_name(OPTIONS)))


def _find_eos(tokenizer: Any, options: Path) -> int | None:
    names = USUAL_EOS
    try:
        name = json.loads(options.read_text(encoding="utf-8")).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        names = (name,) if isinstance(name, str) else names
    except (OSError, ValueError, AttributeError):
        pass  # a published tokenizer.json often comes without it
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in found if token is not None), None)
