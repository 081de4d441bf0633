"""What a run reads and what it came to: lines before it, the table at its end, and one that
compares several."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from demo.config.command import warn
from demo.data.report import Report
from demo.training.processes import count_parameters
from demo.training.run import FILES, Run
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        run: The run's folder.
        model: As it was after the last step.
        tokens: Seen in training.
        tokens_per_s: In training, validation left out.
        before, after: Validation bits per byte.
        best: The bits per byte of the best validation on the way and its step, None without any.
        loses_text: Whether the tokenizer does, so that these cannot be compared with others.
    """

    run: Path
    model: LanguageModel
    tokens: int
    tokens_per_s: float
    before: float
    after: float
    best: tuple[float, int] | None = None
    loses_text: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers are trained, tied ones once."""
        return count_parameters(self.model.config)  # the model may have this process's share


@rank_zero_only
def announce(report: Report, run: Run) -> None:
    """Say before training what was read, on the terminal and in the run's folder."""
    with suppress(OSError):  # an output that takes no more is no reason not to train
        print("\n".join(report.lines()), flush=True)
    for warning in report.warnings:
        warn("train", warning)
    run.write_data(report.values)


@rank_zero_only
def print_summary(summary: Summary) -> None:
    """The table at the end, once for all processes."""
    table = Table(title="Done", title_justify="left", show_header=False)
    table.add_row("parameters", f"{summary.parameters:,}")
    table.add_row("tokens seen", f"{summary.tokens:,}")
    table.add_row("tokens/s", f"{summary.tokens_per_s:,.0f}")
    table.add_row("validation before", f"{summary.before:.3f} bits per byte")
    table.add_row("validation after", f"[bold]{summary.after:.3f}[/bold] bits per byte")
    if summary.best:
        bits, step = summary.best
        table.add_row("best on the way", f"{bits:.3f} bits per byte, at step {step:,}")
    if summary.loses_text:
        table.add_row("tokenizer", "loses text: not to be compared with other bits per byte")
    files = [name for name in FILES if (summary.run / name).exists()]
    table.add_row("run", f"{summary.run}/\n  " + "\n  ".join(files))
    Console().print(table)


def compare_runs(folder: Path, results: list[tuple[str, Summary]]) -> None:
    """One table and one picture (`folder`/comparison.png) for the runs of a multirun, named by the
    overrides that tell them apart."""
    from demo.training.plots import plot_comparison  # matplotlib takes a second

    picture = folder / "comparison.png"
    plot_comparison({name: Run(summary.run).read_metrics() for name, summary in results}, picture)
    where = results[0][1].run.parent
    table = Table(
        title=f"Runs in {where}/, validation at the end in bits per byte", title_justify="left"
    )
    for column in ("overrides", "params", "tokens/s", "validation", "run"):
        justify = "left" if column in ("overrides", "run") else "right"
        no_wrap = column == "run"  # to be copied
        table.add_column(column, justify=justify, overflow="fold", no_wrap=no_wrap)
    for name, summary in sorted(results, key=lambda result: result[1].after):
        table.add_row(
            name.replace(" ", "\n"),
            f"{summary.parameters:,}",
            f"{summary.tokens_per_s:,.0f}",
            f"{summary.after:.3f}" + "\n(loses text)" * summary.loses_text,
            summary.run.name,
        )
    Console().print(table)
    print(f"the picture: {picture}")
