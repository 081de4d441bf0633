"""How far generation is from training, and what the exact mode costs.

    python -m benchmarks.exactness                   # on a GPU: results/exactness.csv
    python -m benchmarks.exactness --device cpu      # the shipped models: results/exactness_cpu.csv
    python -m benchmarks.exactness --draw benchmarks/results/exactness_ratios.csv  # a PNG

"gap": prompts are read in two pieces, and tokens drawn one by one, on a GPU through the CUDA graph;
then one training forward over all of it. Every logit and every log-probability is compared by its
bits; an importance ratio is exp(training - generation). "time": forward plus backward, and a step
of decoding. Both modes take turns; on a GPU the medians of wall times count, on a CPU, which others
may share, the least processor time, best with OMP_NUM_THREADS=1. On a GPU the models are those of
benchmarks/models.py.
"""

import csv
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.models import MODELS, loss_of
from gatednorm.bench.timing import synchronize
from models import generation, token_log_probs
from models.language_model import LanguageModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BITS = {2: torch.int16, 4: torch.int32}


def make_model(name: str, device: str, dtype: torch.dtype) -> LanguageModel:
    if device == "cpu":
        from demo import load

        shipped = {"gated_deltanet": "fla"}.get(name, name)
        return load(model=shipped, norm_path="training").model.to(dtype)
    torch.manual_seed(0)
    return LanguageModel(MODELS[name]).to(device, dtype)


@torch.inference_mode()
def decoder(model: LanguageModel, prompts: torch.Tensor):
    """The logits [B, V] after prompts [B, T] read in two pieces, and one step of decoding."""
    _, state = model(prompts[:, : prompts.shape[1] // 3], output_state=True)
    logits, state = model(prompts[:, prompts.shape[1] // 3 :], state, output_state=True)
    kind = generation._GraphDecoder if prompts.is_cuda else generation._EagerDecoder
    return logits[:, -1], kind(model, state)


@torch.inference_mode()
def rollout(model: LanguageModel, prompts: torch.Tensor, count: int):
    """New tokens [B, count] drawn at temperature 1, and the logits [B, count, V] that they come
    from."""
    logits, step = decoder(model, prompts)
    generator = torch.Generator(prompts.device).manual_seed(0)
    kept, tokens = [], []
    for index in range(count):
        kept.append(logits.clone())
        tokens.append(generation.sample(logits, generator=generator))
        if index < count - 1:
            logits = step(tokens[-1])
    return torch.stack(tokens, dim=1), torch.stack(kept, dim=1)


def gap(
    model: LanguageModel, prompts: torch.Tensor, count: int
) -> tuple[dict[str, float], list[float]]:
    """What a training forward gives otherwise, and the importance ratios of the first rollout."""
    tokens, logits = rollout(model, prompts, count)
    reported = token_log_probs(logits, tokens)
    different, changes = 0, []
    for rows in range(0, len(prompts), 8):  # a forward that keeps what the backward needs
        part = slice(rows, rows + 8)
        text = torch.cat((prompts[part], tokens[part]), dim=1)
        expected = model(text[:, :-1])[0][:, prompts.shape[1] - 1 :].detach()
        bits = BITS[expected.element_size()]
        different += int((expected.view(bits) != logits[part].view(bits)).sum())
        changes.append(token_log_probs(expected, tokens[part]) - reported[part])
    change = torch.cat(changes)
    found = {
        "logits_compared": logits.numel(),
        "logits_different": different,
        "tokens": tokens.numel(),
        "log_probs_different_percent": 100 * (change != 0).float().mean().item(),
        "log_prob_difference": change.abs().max().item(),
        "ratio_least": change.exp().min().item(),
        "ratio_most": change.exp().max().item(),
    }
    return found, change[0].exp().tolist()


def draw(table: Path) -> None:
    """The ratios in a CSV as a PNG beside it, a panel for each model."""
    import matplotlib.pyplot as plt

    with table.open() as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(10, 3.2), sharey=True, squeeze=False)
    for name, panel in zip(names, panels[0], strict=True):
        for mode in ("default", "exact"):
            ratios = [float(r["ratio"]) for r in rows if (r["model"], r["mode"]) == (name, mode)]
            panel.plot(ratios, ".", markersize=3, label=mode)
        panel.set(title=f"{name}, {rows[0]['dtype']}", xlabel="token")
    panels[0][0].set_ylabel("importance ratio")
    panels[0][-1].legend()
    figure.savefig(table.with_suffix(".png"), dpi=120, bbox_inches="tight")


def in_turns(calls: dict[bool, Callable], rounds: int, device: str) -> dict[bool, float]:
    """Milliseconds of each call, after two rounds that do not count."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    taken: dict[bool, list[float]] = {mode: [] for mode in calls}
    for _ in range(2 + rounds):
        for mode, call in calls.items():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            taken[mode].append((clock() - start) * 1e3)
    best = statistics.median if device == "cuda" else min
    return {mode: best(ms[2:]) for mode, ms in taken.items()}


def times(model, tokens, prompts, steps, rounds) -> list[tuple[str, bool, float]]:
    """By mode: milliseconds of a forward and backward over tokens [B, T + 1], and of a step."""

    def train(exact):
        model.exact = exact
        model.zero_grad(set_to_none=True)
        loss_of(model, tokens[:, :-1], tokens[:, 1:].flatten()).backward()

    def decode(exact, step, token):
        model.exact = exact
        with torch.inference_mode():
            for _ in range(steps):
                step(token)

    found = []
    device = prompts.device.type
    for what, count in (("forward_backward_ms", 1), ("decode_ms", steps)):
        calls = {}
        for mode in (False, True):
            if what == "decode_ms":
                model.exact = mode
                logits, step = decoder(model, prompts)
                token = logits.argmax(-1)
                calls[mode] = lambda mode=mode, step=step, token=token: decode(mode, step, token)
            else:
                calls[mode] = lambda mode=mode: train(mode)
        timed = in_turns(calls, rounds, device)
        found += [(what, mode, ms / count) for mode, ms in timed.items()]
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="by default bf16, on a CPU fp32")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--parts", nargs="+", default=["gap", "time"], choices=["gap", "time"])
    parser.add_argument("--rollouts", type=int, help="sequences of the gap")
    parser.add_argument("--new-tokens", type=int, help="of each of them")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only the picture of these ratios")
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw)
    gpu = args.device == "cuda"
    dtypes = [DTYPES[dtype] for dtype in args.dtype or ["bf16" if gpu else "fp32"]]
    batch, tokens, prompt = (8, 2048, 512) if gpu else (4, 256, 64)
    rollouts, new = args.rollouts or (64 if gpu else 4), args.new_tokens or (352 if gpu else 100)
    run, rows, ratios = report.about(args.device), [], []

    def add(part, name, exact, quantity, value):
        mode, dtype = "exact" if exact else "default", str(model.norm.weight.dtype)[6:]
        place = {"part": part, "model": name, "dtype": dtype, "mode": mode}
        rows.append(place | {"quantity": quantity, "value": f"{value:.6g}"})
        print("  ", *rows[-1].values(), flush=True)

    for dtype, name in itertools.product(dtypes, args.models):
        model = make_model(name, args.device, dtype)
        vocab = model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(0, vocab, (rollouts, tokens + 1), generator=generator).to(args.device)
        if "gap" in args.parts:
            for exact in (False, True):
                model.exact = exact
                found, first = gap(model, text[:, :prompt], new)
                for quantity, value in found.items():
                    add("gap", name, exact, quantity, value)
                place = {key: rows[-1][key] for key in ("model", "dtype", "mode")}
                ratios += [place | {"token": i, "ratio": f"{r:.8g}"} for i, r in enumerate(first)]
        if "time" in args.parts:
            sizes = (64, 7) if gpu else (10, 8)
            decoded = text[: batch if gpu else 1, :prompt]
            for quantity, exact, ms in times(model, text[:batch], decoded, *sizes):
                add("time", name, exact, quantity, ms)
        suffix = "" if gpu else "_cpu"
        report.write(args.out / f"exactness{suffix}.csv", rows, run)
        if ratios:
            made_by = {"commit": run["commit"]}
            report.write(args.out / f"exactness_ratios{suffix}.csv", ratios, made_by)


if __name__ == "__main__":
    main()
