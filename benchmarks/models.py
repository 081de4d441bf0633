"""Whole models on an H200: forward and backward, a training step's profile, decoding.

    python -m benchmarks.models                      # results/models.csv, models_profile.csv
    python -m benchmarks.models --parts decode --models mamba2
    python -m benchmarks.models --device cpu --tiny  # the same code on small sizes

Gated DeltaNet with 185M parameters and Mamba-2 with 171M, in bf16, at batch 8 x 2048. Wall times
are medians; "GPU ms" is the sum of what every kernel took, as torch.profiler saw it. A part that
fails prints why, and the others go on.
benchmarks/profiles.py says how the norms' share is found.
"""

import argparse
import statistics
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import report
from benchmarks.profiles import (
    NORM_KERNELS,
    kernel_times,
    label_norms,
    norm_times,
    record,
    synchronize,
)
from models.config import GatedDeltaNetConfig, Mamba2Config
from models.gated_delta_rule import chunk_gated_delta_rule
from models.generation import generate
from models.language_model import LanguageModel
from models.ssd import chunk_ssd

UNTIED = {"vocab_size": 32000, "tie_embeddings": False}
MODELS = {
    "gated_deltanet": GatedDeltaNetConfig(
        hidden_size=1024, num_layers=8, mlp_ratio=4.0, num_heads=6, head_dim=128, **UNTIED
    ),
    "mamba2": Mamba2Config(hidden_size=1024, num_layers=16, d_state=128, head_dim=64, **UNTIED),
}
SMALL = {"hidden_size": 64, "num_layers": 2, "vocab_size": 128, "tie_embeddings": False}
TINY = {
    "gated_deltanet": GatedDeltaNetConfig(mlp_ratio=4.0, num_heads=2, head_dim=16, **SMALL),
    "mamba2": Mamba2Config(d_state=16, head_dim=16, **SMALL),
}
PARTS = ("check", "train", "profile", "decode", "scans")


class Setup:
    """What every part needs, and the rows that they make."""

    def __init__(self, args):
        self.device, self.tiny, self.repeats = args.device, args.tiny, args.repeats
        self.batch, self.tokens = (2, 128) if self.tiny else (8, 2048)
        self.vocab = 128 if self.tiny else 32000
        self.rows, self.profiles = [], []

    def add(self, part: str, model: str, norm: str, **quantities) -> None:
        for quantity, value in quantities.items():
            row = {"part": part, "model": model, "norm": norm}
            self.rows.append(row | {"quantity": quantity, "value": f"{value:.5g}"})
            print("  ", *self.rows[-1].values(), flush=True)

    def model(self, name: str) -> LanguageModel:
        torch.manual_seed(0)
        model = LanguageModel((TINY if self.tiny else MODELS)[name])
        return model.to(self.device, torch.bfloat16)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab, (self.batch, self.tokens + 1), generator=generator)
        tokens = tokens.to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def synchronize(self) -> None:
        synchronize(self.device)

    def wall(self, function) -> float:
        """Median wall ms of a call that ends with the GPU idle, after three that do not count."""
        times = []
        for repeat in range(3 + self.repeats):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            if repeat >= 3:
                times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)


def loss_of(model, tokens, targets) -> torch.Tensor:
    """Mean cross entropy, in fp32 without an fp32 copy of the logits."""
    logits = model(tokens)[0].flatten(0, 1)
    return F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32), targets)


# ---- parts ----


def check(setup: Setup, name: str) -> None:
    """Loss and gradients in bf16 against the same model in fp32: how far the gradient is, over all
    parameters, as a 2-norm relative to that in fp32."""
    tokens, targets = setup.data()
    tokens, targets = tokens[:2], targets[: 2 * setup.tokens]
    model = setup.model(name)

    def gradients(model):
        loss = loss_of(model, tokens, targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return loss.item(), torch.cat([g.flatten().float() for g in grads])

    loss, grads = gradients(model)
    truth, expected = gradients(model.float())
    error = ((grads - expected).norm() / expected.norm()).item()
    finite = float(grads.isfinite().all())
    setup.add(
        "check", name, "ours", loss=loss, loss_fp32=truth, gradient_error=error, finite=finite
    )


def train(setup: Setup, name: str) -> None:
    """Forward plus backward, without an optimiser: wall ms, GPU ms, memory."""
    model, (tokens, targets) = setup.model(name), setup.data()
    setup.add("train", name, "ours", parameters_M=model.num_parameters() / 1e6)

    def call():
        model.zero_grad(set_to_none=True)
        loss_of(model, tokens, targets).backward()

    start = time.perf_counter()
    call()
    setup.synchronize()
    setup.add("train", name, "ours", first_call_s=time.perf_counter() - start)
    setup.add("train", name, "ours", wall_ms=setup.wall(call))
    if setup.device == "cuda":
        setup.add("train", name, "ours", peak_GiB=torch.cuda.max_memory_allocated() / 2**30)
    with torch.no_grad():
        forward = setup.wall(lambda: loss_of(model, tokens, targets))
    setup.add("train", name, "ours", forward_wall_ms=forward)
    table = kernel_times(setup.device, record(setup.device, call, 2), 2)
    total, launches = (sum(entry[i] for entry in table.values()) for i in (1, 0))
    setup.add("train", name, "ours", gpu_ms=total, launches=launches)
    keep_profile(setup, "train", name, "ours", table, total)


def step_profile(setup: Setup, name: str) -> None:
    """A training step with AdamW: what the norms cost in it, ours and the plain expression."""
    tokens, targets = setup.data()
    for norm in ("ours", "plain"):
        model = setup.model(name)
        restore = label_norms(model, norm == "plain")
        try:
            fused = {"fused": True} if setup.device == "cuda" else {}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **fused)

            def call(model=model, optimizer=optimizer):
                loss_of(model, tokens, targets).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            setup.add("step", name, norm, wall_ms=setup.wall(call))
            events = record(setup.device, call, 2)
            table = kernel_times(setup.device, events, 2)
            total = sum(ms for _, ms in table.values())
            norms = norm_times(setup.device, events, 2)
            gated, every = norms.get("norm.gated", 0.0), sum(norms.values())
            named = sum(ms for kernel, (_, ms) in table.items() if kernel in NORM_KERNELS)
            setup.add("step", name, norm, gpu_ms=total, gated_norm_ms=gated, all_norms_ms=every)
            setup.add("step", name, norm, all_norms_ms_by_kernel_name=named)
            setup.add("step", name, norm, gated_norm_percent=100 * gated / total)
            setup.add("step", name, norm, all_norms_percent=100 * every / total)
            keep_profile(setup, "step", name, norm, table, total)
        finally:
            restore()


def keep_profile(setup: Setup, part, model, norm, table, total, show=14, keep=40) -> None:
    place = {"part": part, "model": model, "norm": norm}
    ranked = sorted(table.items(), key=lambda item: -item[1][1])[:keep]
    for rank, (kernel, (calls, ms)) in enumerate(ranked, 1):
        row = {"rank": rank, "calls": f"{calls:g}", "ms": f"{ms:.3f}"}
        row |= {"percent": f"{100 * ms / total:.1f}", "kernel": kernel[:160]}
        setup.profiles.append(place | row)
        if rank <= show:
            print(
                f"   {ms:8.3f} ms {100 * ms / total:5.1f}% {calls:7g} x {kernel[:110]}", flush=True
            )


def decode(setup: Setup, name: str) -> None:
    """64 tokens for each of 8 sequences after prompts of 512, greedy, with and without graph."""
    prompt_length, count = (16, 8) if setup.tiny else (512, 64)
    model = setup.model(name).eval()
    model.set_norm_path("inference")
    prompt = torch.randint(0, setup.vocab, (setup.batch, prompt_length), device=setup.device)
    texts = {}
    for mode in ("graph", "eager"):
        options = {"temperature": 0, "cuda_graph": mode == "graph"}
        try:
            prefill, steps, whole = [], [], []
            for _ in range(2 + setup.repeats):
                setup.synchronize()
                times = [time.perf_counter()]
                tokens = []
                for token in generate(model, prompt, count, **options):
                    tokens.append(token)
                    if len(tokens) <= 2:  # the second one pays for the capture
                        setup.synchronize()
                        times.append(time.perf_counter())
                setup.synchronize()
                end = time.perf_counter()
                prefill.append((times[1] - times[0]) * 1e3)
                steps.append((end - times[2]) / (count - 2) * 1e3)
                whole.append(end - times[0])
            texts[mode] = torch.stack(tokens)
            ms, seconds = statistics.median(steps[2:]), statistics.median(whole[2:])
            place = ("decode", name, mode)
            setup.add(*place, tokens_per_s=setup.batch * 1e3 / ms, ms_per_token=ms)
            setup.add(*place, prefill_ms=statistics.median(prefill[2:]))
            setup.add(*place, tokens_per_s_with_prefill=setup.batch * count / seconds)
        except Exception:  # one mode fails, for example in the capture: the other one still counts
            traceback.print_exc()
    if len(texts) == 2:
        same = (texts["graph"] == texts["eager"]).float().mean().item()
        setup.add("decode", name, "graph", same_tokens_as_eager=same)


def scans(setup: Setup, name: str) -> None:
    """One layer's scan alone, forward plus backward, by chunk size."""
    sizes = (TINY if setup.tiny else MODELS)[name]
    batch, tokens, device = setup.batch, setup.tokens, setup.device

    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(batch, tokens, *shape, device=device).to(dtype).requires_grad_()

    if name == "gated_deltanet":
        heads, dim = sizes.num_heads, sizes.head_dim
        q, k, v = randn(heads, dim), randn(heads, dim), randn(heads, 2 * dim)
        k = F.normalize(k.detach().float(), dim=-1).bfloat16().requires_grad_()
        g = (-0.1 * torch.rand(batch, tokens, heads, device=device)).requires_grad_()
        beta = torch.rand(batch, tokens, heads, device=device).requires_grad_()
        inputs, function = [q, k, v, g, beta], chunk_gated_delta_rule
    else:
        dim, state = sizes.head_dim, sizes.d_state
        heads = 2 * sizes.hidden_size // dim
        x, b, c = randn(heads, dim), randn(1, state), randn(1, state)
        dt = (0.1 * torch.rand(batch, tokens, heads, device=device)).requires_grad_()
        a = (-torch.rand(heads, device=device)).requires_grad_()
        inputs, function = [x, dt, a, b, c], chunk_ssd
    for size in (32, 64, 128, 256)[: 2 if setup.tiny else 4]:

        def call(size=size):
            y, _ = function(*inputs, chunk_size=size)
            torch.autograd.grad(y, inputs, y.detach())

        setup.add("scans", name, f"chunk {size}", wall_ms=setup.wall(call))
        table = kernel_times(setup.device, record(setup.device, call, 2), 2)
        total = sum(ms for _, ms in table.values())
        launches = sum(count for count, _ in table.values())
        setup.add("scans", name, f"chunk {size}", gpu_ms=total, launches=launches)


# ---- the run ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    setup, run = Setup(args), report.about(args.device)
    print(run, flush=True)
    functions = {
        "check": check,
        "train": train,
        "profile": step_profile,
        "decode": decode,
        "scans": scans,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for name in args.models:
            start = time.perf_counter()
            print(f"{part} {name}", flush=True)
            try:
                functions[part](setup, name)
            except Exception:  # of whatever this part came across: it is shown, and the rest runs
                traceback.print_exc()
            print(f"   ({time.perf_counter() - start:.1f} s)", flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        # after every part, so that a run that is cut short leaves what it has
        report.write(args.out / "models.csv", setup.rows, run)
        report.write(args.out / "models_profile.csv", setup.profiles, run)


if __name__ == "__main__":
    main()
