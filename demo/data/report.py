"""What a run reads: four lines before training, a JSON in its folder, and what looks wrong."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from demo.checkpoints.tokenizer import ByteTokenizer, Tokenizer
from demo.config.schema import TrainConfig
from demo.data.corpus import Corpus
from demo.data.files import Files, looks_like_rows, table_kind
from demo.data.sources import pieces

LOOKED_AT = 20  # files whose beginning is looked at for rows


@dataclass(frozen=True)
class Report:
    """What was read.

    Attributes:
        values: The numbers, for data.json; None where nobody knows them, as of a stream.
        warnings: What was probably not meant, a line each.
        loses_text: Whether tokens do not give back the text, so that bits per byte mean less.
    """

    values: dict[str, Any]
    warnings: tuple[str, ...] = ()
    loses_text: bool = False

    def lines(self) -> list[str]:
        """Four lines for people."""
        v, held_out = self.values, self.values["held_out"]
        files = v["source"] if v["files"] is None else _counted(v["files"])
        skipped = f"; skipped: {_counted(v['skipped'])}" if v["skipped"] else ""
        share = epochs = ""
        documents = "as they come, not counted"
        if v["documents"] is not None:
            documents = f"{v['documents']:,}, {v['bytes']:,} bytes, {v['tokens']:,} tokens"
            share = f", {held_out['bytes'] / max(1, v['bytes']):.1%} of all bytes"
            epochs = f", {v['epochs']:.3g} epochs"
        return [
            f"files      {files}{skipped}",
            f"documents  {documents}",
            f"held out   {held_out['documents']:,} documents, {held_out['bytes']:,} bytes{share}",
            f"training   {v['steps']:,} steps, {v['tokens_to_see']:,} tokens{epochs}",
        ]


def report(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> Report:
    """What a run of `config` reads. The corpus of a stream has no text for training."""
    data, train, val = config.data, corpus.train, corpus.val
    to_see = config.optim.steps * config.optim.batch_size * data.sequence_length
    files, known = corpus.files, not data.streaming
    values = {
        "source": data.name or data.source,
        "files": files and files.kinds,
        "skipped": dict((+files.skipped).most_common()) if files else {},
        "documents": len(train) + len(val) if known else None,
        "bytes": train.size + val.size if known else None,
        "tokens": train.tokens.size + val.tokens.size if known else None,
        "held_out": {"documents": len(val), "bytes": val.size, "tokens": val.tokens.size},
        "steps": config.optim.steps,
        "tokens_to_see": to_see,
        "epochs": to_see / train.tokens.size if known else None,
    }
    lost = _lost_text(tokenizer, bytes(next(pieces(corpus.val_text))))
    warnings = []
    if lost is not None:
        warnings.append(
            "bits per byte of this run cannot be compared with others: the tokenizer loses text, "
            f"{lost[0]!r} comes back as {lost[1]!r}; use one of byte-level tokens, or bytes"
        )
    if files and data.source == "text":
        warnings += _not_meant(files)
    return Report(values, tuple(warnings), lost is not None)


def _lost_text(tokenizer: Tokenizer, sample: bytes) -> tuple[str, str] | None:
    """Where a text and what its tokens stand for begin to differ, if they do, but for spaces at
    either end, which belong to how tokens are written down."""
    if isinstance(tokenizer, ByteTokenizer):
        return None
    text = sample.decode("utf-8", "surrogateescape").strip()
    back = tokenizer.decode(tokenizer.encode(sample)).strip()
    if text == back:
        return None
    same = next((i for i, pair in enumerate(zip(text, back, strict=False)) if len({*pair}) > 1), 0)
    at = max(0, same - 8)
    return text[at : at + 16].encode("utf-8", "replace").decode(), back[at : at + 16]


def _not_meant(files: Files) -> list[str]:
    warnings = []
    texts = [path for path in files.paths if table_kind(path.name) is None]
    for path in texts[:LOOKED_AT]:
        if rows := looks_like_rows(path):
            warnings.append(
                f"{str(path)!r} is read as text but looks like {rows}; if each row is a document, "
                f"give it a name that ends in {'.jsonl' if rows == 'JSON lines' else '.tsv'}"
            )
            break
    chosen = {"excluded", "not included", "hidden", "folders"}
    skipped = Counter({why: n for why, n in files.skipped.items() if why not in chosen})
    if files.searched and skipped.total() > len(files.files):
        warnings.append(
            f"most files are skipped, {skipped.total()} of {skipped.total() + len(files.files)} "
            f"({_counted(dict(skipped.most_common()))}); take them with data.include='*', or leave "
            "them out with data.exclude"
        )
    return warnings


def _counted(counts: dict[str, int]) -> str:
    shown = [f"{count:,} {what}" for what, count in list(counts.items())[:5]]
    if more := sum(list(counts.values())[5:]):
        shown.append(f"{more:,} others")
    return ", ".join(shown)
