"""loss.png: what a run learnt, beside what general-purpose compressors make of the same text; and
comparison.png of several runs."""

import bz2
import gzip
import lzma
from pathlib import Path

import matplotlib
import numpy as np

from demo.checkpoints.atomic import must_fit, write_atomically
from demo.training.run import SAMPLE, VAL, Rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, LIGHT, ACCENT, GREY = "#1f2a44", "#a9b8d8", "#d1495b", "#8a8f98"
TICKS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10)  # bits per byte


def column(metrics: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values of a metric, where there is one."""
    points = [(step, values[name]) for step, values in metrics if name in values]
    steps, found = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, found


def losses_on_the_way(metrics: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the training, and how many steps there were with each: Lightning counts from 0
    there, and writes a validation before or after it with the number of steps."""
    steps, losses = column(metrics, name)
    return steps + 1, losses


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte that gzip, bz2 and xz need for `text`, of which they read 8 MB at most."""
    text = text[: 8 * 10**6]
    compress = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return {name: 8 * len(pack(text)) / len(text) for name, pack in compress.items()}


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Mean of the values around each, whose weight halves with each `half_life` of steps away. It
    looks no farther ahead than back, so that the curve begins where the values do and does not
    lag."""
    reach = int(8 * half_life)
    kernel = 0.5 ** (np.abs(np.arange(-reach, reach + 1)) / half_life)
    out = np.empty(len(values))
    for i in range(len(values)):
        back = min(i, reach)
        ahead = min(back, len(values) - 1 - i)
        weights = kernel[reach - back : reach + ahead + 1]
        out[i] = np.average(values[i - back : i + ahead + 1], weights=weights)
    return out


def plot_loss(metrics: Rows, target: Path, title: str, yardsticks: dict[str, float]) -> None:
    """Draw the training and validation loss of a run to `target`, a png."""
    steps, losses = losses_on_the_way(metrics, "train_bpb")
    sample_steps, sample_losses = losses_on_the_way(metrics, SAMPLE)
    val_steps, val_losses = column(metrics, VAL)
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=150, layout="constrained")
    axes.plot(steps, losses, color=LIGHT, linewidth=0.7, label="training, each step")
    smoothed = smooth(losses, max(1.0, len(losses) / 60))
    axes.plot(steps, smoothed, color=INK, linewidth=1.8, label="training, smoothed")
    if len(sample_losses):
        style = {"color": ACCENT, "linewidth": 1, "markersize": 3.5, "clip_on": False}
        axes.plot(sample_steps, sample_losses, "o-", label="validation on the way", **style)
    dots = {"color": ACCENT, "markersize": 7, "zorder": 3, "clip_on": False}
    axes.plot(val_steps, val_losses, "o", label="validation, held-out text", **dots)
    beside = {"textcoords": "offset points"}
    if len(val_losses):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        last, text = (val_steps[-1], val_losses[-1]), f"{val_losses[-1]:.2f}"
        style = {"color": ACCENT, "ha": "right", "weight": "bold", "bbox": box}
        axes.annotate(text, last, xytext=(-4, 10), **beside, **style)
    low = min([*losses, *sample_losses, *val_losses, *yardsticks.values()], default=0.0)
    high = max([*losses, *sample_losses, *val_losses], default=8.0)
    previous = 0.0
    for name, bits in sorted(yardsticks.items(), key=lambda item: item[1]):
        if bits >= high:  # off the axes
            break
        above = 5 if bits < previous * 1.04 else -2  # two names do not cover each other
        previous = bits
        axes.axhline(bits, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        at = {"xycoords": ("axes fraction", "data"), "xytext": (6, above)}
        axes.annotate(f"{name} {bits:.2f}", (1, bits), **at, **beside, color=GREY, size=8)
    axes.set(xlim=(0, max(1, *steps, *val_steps)), xlabel="step")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _bits_axis(axes, low * 0.93, high * 1.07, shorten(title, 80))
    figure.legend(frameon=False, loc="outside lower center", ncols=4)  # covers no curve
    _write(figure, target)


def plot_comparison(runs: dict[str, Rows], target: Path) -> None:
    """Draw the smoothed training loss and the last validation of several runs, by name."""
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=150, layout="constrained")
    colours = plt.colormaps["viridis"](np.linspace(0, 0.85, len(runs)))
    lows, highs = [], []
    for (name, metrics), colour in zip(runs.items(), colours, strict=True):
        steps, losses = losses_on_the_way(metrics, "train_bpb")
        _, val_losses = column(metrics, VAL)
        smoothed = smooth(losses, max(1.0, len(losses) / 40))
        if len(steps):  # a run of few steps may have none on the way
            axes.plot(100 * steps / steps[-1], smoothed, color=colour, linewidth=1.5)
        label = f"{shorten(name, 60)}: {val_losses[-1]:.3f}"
        axes.plot(100, val_losses[-1], "o", color=colour, clip_on=False, zorder=3, label=label)
        lows.append(min(*losses, *val_losses))
        highs.append(val_losses.max())
    axes.set(xlim=(0, 100), xlabel="per cent of the steps")
    title = "Lines: training, smoothed; dots: validation at the end"
    _bits_axis(axes, min(lows) * 0.95, max(highs) * 1.05, title)
    axes.legend(frameon=False, loc="best", title="validation, bits per byte")
    _write(figure, target)


def shorten(text: str, length: int) -> str:
    """Without its middle where it is longer."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def _bits_axis(axes: plt.Axes, bottom: float, top: float, title: str) -> None:
    """Bits per byte on a logarithmic axis with numbers that one reads, and the title."""
    ticks = [tick for tick in TICKS if bottom <= tick <= top]
    axes.set(yscale="log", ylim=(bottom, top), ylabel="bits per byte")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceff4", zorder=0)
    axes.set_title(title, loc="left", color=INK, size=11)


def _write(figure: plt.Figure, target: Path) -> None:
    """Write a picture whole or not at all. Raises RunError."""
    try:
        with must_fit(target, ": all but the picture is complete"):
            write_atomically(target, lambda part: figure.savefig(part, format="png"))
    finally:
        plt.close(figure)
