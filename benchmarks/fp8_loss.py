"""Training in FP8 against bf16: the loss of both 170M models, step by step on the same batches.

    python -m benchmarks.fp8_loss                   # on an H100 or H200: results/fp8_loss.csv, .png
    python -m benchmarks.fp8_loss --seeds 1 2 3     # how far two runs in bf16 are apart
    python -m benchmarks.fp8_loss --device cpu --tiny --steps 20    # the same code, emulated
    python -m benchmarks.fp8_loss --draw benchmarks/results/fp8_loss.csv

Sizes, text (Python's standard library, by bytes) and optimiser are those of `train.py
experiment=single_gpu`, with 8 rows of 2048 bytes a step and a tenth of the steps to warm up;
weights are fp32, products bf16. `fp8` has `trainer.norm_linear_precision=fp8`. Both begin with the
same weights and take turns, ten steps each, so that what `--seconds` cuts short can be compared
too. Another seed means other weights to begin with; the batches stay. Losses are bits per byte, a
row the mean of ten steps; the last rows, "held out", are of text that was not seen, read without
FP8. Several processes on one GPU, a seed each, have the same losses, and no times that mean
anything: `--no-times` leaves these out.
"""

import csv
import itertools
import math
import statistics
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks import report
from demo.config.schema import DataConfig, OptimConfig, model_config
from demo.data.files import find_all
from demo.training.schedule import learning_rate_factor
from gatednorm.bench.timing import synchronize
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.log_probs import log_probs_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EACH, LAST = 10, 50  # steps of a row of the CSV, and of the table at the end
MODELS = {"fla": "Gated DeltaNet", "mamba2": "Mamba-2"}


def config_file(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def text() -> list[np.ndarray]:
    """Bytes to train on, and those of files that are held out."""
    values = config_file("data/stdlib.yaml")
    parts: list[list[bytes]] = [[], []]
    for folder, name in find_all(DataConfig(**values)).files:
        held_out = zlib.crc32(name.encode()) % values["hold_out"] == 0
        parts[held_out].append((folder / name).read_bytes())
    return [np.frombuffer(b"".join(part), np.uint8) for part in parts]


def batches(content: np.ndarray, rows: int, tokens: int, device: str) -> Iterator[torch.Tensor]:
    """Rows from anywhere, int64 [rows, tokens + 1], without end; the same at each call."""
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(content) - tokens, rows)
        batch = np.stack([content[start : start + tokens + 1] for start in starts])
        yield torch.from_numpy(batch.astype(np.int64)).to(device)


class Run:
    """A model in training, as train.py would."""

    def __init__(
        self, config: ModelConfig, precision: str | None, optim: OptimConfig, device: str, seed: int
    ):
        torch.manual_seed(seed)
        self.model, self.optim, self.device = LanguageModel(config).to(device), optim, device
        for block in self.model.blocks:
            block.mixer.norm_linear_precision = precision
            block.mixer.fuse_norm_linear = precision is not None
        matrices, others = (
            [p for p in self.model.parameters() if (p.ndim >= 2) is kind] for kind in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.learning_rate, betas=optim.betas, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, learning_rate_factor(optim)
        )

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            logits, _ = self.model(batch[:, :-1])
        return -log_probs_of(logits, batch[:, 1:], False).mean()

    def steps(self, some: list[torch.Tensor]) -> tuple[float, float]:
        """Their mean loss in bits per byte, and milliseconds of a step."""
        synchronize(self.device)
        start, losses = time.perf_counter(), []
        for batch in some:
            loss = self.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.gradient_clip)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item() / math.log(2)
        return mean, (time.perf_counter() - start) / len(some) * 1e3

    @torch.no_grad()
    def held_out(self, some: list[torch.Tensor]) -> float:
        return statistics.mean(self.loss(batch).item() for batch in some) / math.log(2)


def train(name: str, seed: int, args, content: list[np.ndarray]) -> list[dict]:
    """The rows of one model and seed."""
    config = model_config(config_file(f"model/{name}.yaml") | config_file(f"size/{name}_170m.yaml"))
    rows, tokens, fp8 = 8, 2048, "fp8"
    if args.tiny:
        config = replace(config, hidden_size=128, num_layers=2, head_dim=64)
        rows, tokens, fp8 = 2, 64, "fp8_emulated"
    optim = OptimConfig(
        steps=args.steps, batch_size=rows, learning_rate=1e-3, min_learning_rate=None,
        warmup_steps=args.steps // 10, weight_decay=0.1, betas=(0.9, 0.95), gradient_clip=1.0,
    )  # fmt: skip
    runs = {kind: Run(config, kind, optim, args.device, seed) for kind in (None, fp8)}
    begin, found = time.perf_counter(), []

    def add(steps: int, what: str, losses: dict, ms: dict) -> None:
        for kind, loss in losses.items():
            row = {"model": name, "seed": seed, "precision": kind or "bf16", "steps": steps}
            row |= {"text": what, "bits_per_byte": f"{loss:.5f}"}
            row["to_bf16"] = f"{loss / losses[None]:.5f}"
            found.append(row | {"ms": f"{ms[kind]:.1f}" if ms and args.times else ""})

    source, done = batches(content[0], rows, tokens, args.device), 0
    while done < args.steps and time.perf_counter() - begin < args.seconds:
        some = list(itertools.islice(source, min(EACH, args.steps - done)))
        done += len(some)
        pairs = {kind: run.steps(some) for kind, run in runs.items()}
        losses, ms = ({kind: pair[i] for kind, pair in pairs.items()} for i in (0, 1))
        add(done, "training", losses, ms)
        print(name, seed, done, *(f"{loss:.4f}" for loss in losses.values()), flush=True)
    held_out = list(itertools.islice(batches(content[1], rows, tokens, args.device), 10))
    add(done, "held out", {kind: run.held_out(held_out) for kind, run in runs.items()}, {})
    return found


def summary(rows: list[dict]) -> list[dict]:
    """Of each run the means of the last steps and their ratio, that of the unseen text, and the
    times of a step; of each model with several seeds mean and standard deviation."""
    runs, table = {}, []
    for row in rows:
        of_seed = runs.setdefault(row["model"], {}).setdefault(str(row["seed"]), {})
        of_seed.setdefault((row["text"], row["precision"][:3]), []).append(row)
    for model, seeds in runs.items():
        lines = {}
        for seed, found in seeds.items():
            bf16, fp8 = (found["training", precision] for precision in ("bf1", "fp8"))
            losses = [
                statistics.mean(float(row["bits_per_byte"]) for row in curve[-LAST // EACH :])
                for curve in (bf16, fp8)
            ]
            unseen = float(found["held out", "fp8"][0]["to_bf16"])
            lines[seed] = (*losses, losses[1] / losses[0], unseen)
            times = [[float(row["ms"]) for row in curve if row["ms"]] for curve in (bf16, fp8)]
            ms = ", ".join(f"{statistics.median(some):.0f}" for some in times if some)
            table.append((model, seed, lines[seed], ms))
        if len(lines) > 1:
            columns = list(zip(*lines.values(), strict=True))
            table.append((model, "mean", map(statistics.mean, columns), ""))
            table.append((model, "deviation", map(statistics.stdev, columns), ""))
    names = ("bf16", "fp8", "fp8 / bf16", "unseen ratio")
    return [
        {"model": model, "seed": seed}
        | {name: f"{value:.4f}" for name, value in zip(names, values, strict=True)}
        | {"ms a step": ms}
        for model, seed, values, ms in table
    ]


def draw(table: Path) -> None:
    """Curves, and FP8 over bf16 on the same batches, as a PNG beside the CSV; a column a model."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["text"] == "training"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(
        2, len(names), figsize=(10, 6), sharex=True, sharey="row", squeeze=False
    )
    for name, curves, ratios in zip(names, *panels, strict=True):
        mine = [row for row in rows if row["model"] == name]
        seeds = list(dict.fromkeys(row["seed"] for row in mine))
        for seed, (precision, style) in itertools.product(seeds, (("bf16", "-"), ("fp8", "--"))):
            some = [r for r in mine if r["seed"] == seed and r["precision"].startswith(precision)]
            steps = [int(row["steps"]) for row in some]
            color = "C0" if precision == "bf16" else "C1"
            label = precision if seed == seeds[0] else None
            losses = [float(row["bits_per_byte"]) for row in some]
            curves.plot(steps, losses, style, color=color, label=label, linewidth=1)
            if precision == "fp8":
                added = [float(row["to_bf16"]) - 1 for row in some]
                ratios.plot(steps, added, linewidth=1, label=f"seed {seed}")
        ratios.axhspan(-0.01, 0.01, color="grey", alpha=0.2, linewidth=0)  # the aim
        ratios.legend()
        curves.set(title=MODELS[name], yscale="log")
        ratios.set(xlabel="step")
    panels[0][0].set(ylabel="bits per byte", yticks=(1, 1.5, 2, 3, 4, 5))
    panels[0][0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0][0].yaxis.set_minor_formatter(NullFormatter())
    panels[0][0].legend()
    panels[1][0].set(ylabel="FP8 over bf16")
    panels[1][0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.savefig(table.with_suffix(".png"), dpi=120, bbox_inches="tight")


def main() -> None:
    parser = report.parser(__doc__, "fp8_loss.csv")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=230, help="at most, for a model and seed")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the first weights")
    parser.add_argument("--no-times", dest="times", action="store_false")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="table and picture of this one")
    args = parser.parse_args()
    if args.draw:
        with args.draw.open() as file:
            report.show(summary(list(csv.DictReader(file))))
        draw(args.draw)
        return
    content, rows = text(), []
    for name, seed in itertools.product(args.models, args.seeds):
        rows += train(name, seed, args, content)
        report.write(args.out, rows, report.about(args.device))  # what there is, should one fail
    report.show(summary(rows))
    draw(args.out)


if __name__ == "__main__":
    main()
