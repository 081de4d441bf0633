"""Whole models on an H200: forward and backward, a training step's profile, decoding.

    python -m benchmarks.models                      # results/models.csv, models_profile.csv
    python -m benchmarks.models --parts decode --models mamba2
    python -m benchmarks.models --device cpu --tiny  # the same code on small sizes

Gated DeltaNet with 185M parameters and Mamba-2 with 171M, in bf16, at batch 8 x 2048. Wall times
are medians; "GPU ms" is the sum of what every kernel took, as torch.profiler saw it. A part that
fails prints why, and the others go on.
benchmarks/profiles.py says how the norms' share is found.
"""

import statistics
import time
import traceback

import torch

from benchmarks import report
from benchmarks.profiles import kernel_times, label_norms, norm_times, record
from benchmarks.scans import delta_inputs, ssd_inputs
from gatednorm.bench.timing import relative_error, synchronize, wall_times
from models.config import GatedDeltaNetConfig, Mamba2Config
from models.gated_delta_rule import chunk_gated_delta_rule
from models.generation import generate
from models.language_model import LanguageModel
from models.log_probs import log_probs_of
from models.ssd import chunk_ssd

LARGE = {"hidden_size": 1024, "vocab_size": 32000, "tie_embeddings": False}
MODELS = {
    "gated_deltanet": GatedDeltaNetConfig(
        num_layers=8, mlp_ratio=4.0, num_heads=6, head_dim=128, **LARGE
    ),
    "mamba2": Mamba2Config(num_layers=16, d_state=128, head_dim=64, **LARGE),
}
SMALL = {"hidden_size": 64, "num_layers": 2, "vocab_size": 128, "tie_embeddings": False}
TINY = {
    "gated_deltanet": GatedDeltaNetConfig(mlp_ratio=4.0, num_heads=2, head_dim=16, **SMALL),
    "mamba2": Mamba2Config(d_state=16, head_dim=16, **SMALL),
}


class Setup:
    """What every part needs, and the rows that they make."""

    def __init__(self, args):
        self.device, self.tiny, self.repeats = args.device, args.tiny, args.repeats
        self.batch, self.tokens = (2, 128) if self.tiny else (8, 2048)
        self.configs = TINY if self.tiny else MODELS
        self.vocab = 128 if self.tiny else 32000
        self.rows, self.profiles = [], []

    def add(self, part: str, model: str, norm: str, **quantities) -> None:
        for quantity, value in quantities.items():
            row = {"part": part, "model": model, "norm": norm}
            self.rows.append(row | {"quantity": quantity, "value": f"{value:.5g}"})
            print("  ", *self.rows[-1].values(), flush=True)

    def model(self, name: str) -> LanguageModel:
        torch.manual_seed(0)
        model = LanguageModel(self.configs[name])
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
        times = wall_times({"": function}, self.repeats, warm_up=3, device=self.device)
        return statistics.median(times[""])

    def profile(self, function) -> tuple[list, dict[str, tuple[float, float]], dict[str, float]]:
        """The events of two calls, the kernels of one, and its GPU ms and launches in all."""
        events = record(self.device, function, 2)
        table = kernel_times(self.device, events, 2)
        launches, ms = (sum(entry[i] for entry in table.values()) for i in (0, 1))
        return events, table, {"gpu_ms": ms, "launches": launches}


def loss_of(model, tokens, targets) -> torch.Tensor:
    """Mean cross entropy in fp32, the loss that train.py takes."""
    exact = getattr(model, "exact", False)  # a peer's model has no such mode
    return -log_probs_of(model(tokens)[0].flatten(0, 1), targets, exact).mean()


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
    error, finite = relative_error(grads, expected), float(grads.isfinite().all())
    place = ("check", name, "ours")
    setup.add(*place, loss=loss, loss_fp32=truth, gradient_error=error, finite=finite)


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
    _, table, totals = setup.profile(call)
    setup.add("train", name, "ours", **totals)
    keep_profile(setup, "train", name, "ours", table)


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
            events, table, totals = setup.profile(call)
            norms = norm_times(setup.device, events, 2)
            gated, every = norms["norm.gated"], sum(norms.values())
            total = totals["gpu_ms"]
            setup.add("step", name, norm, gpu_ms=total, gated_norm_ms=gated, all_norms_ms=every)
            setup.add("step", name, norm, gated_norm_percent=100 * gated / total)
            setup.add("step", name, norm, all_norms_percent=100 * every / total)
            keep_profile(setup, "step", name, norm, table)
        finally:
            restore()


def keep_profile(setup: Setup, part, model, norm, table) -> None:
    """The 100 kernels that took most of the time; those of models_profile.csv."""
    total = sum(ms for _, ms in table.values())
    ranked = sorted(table.items(), key=lambda item: -item[1][1])[:100]
    for rank, (kernel, (calls, ms)) in enumerate(ranked, 1):
        place = {"part": part, "model": model, "norm": norm, "rank": rank}
        row = {"calls": f"{calls:g}", "ms": f"{ms:.3f}", "percent": f"{100 * ms / total:.1f}"}
        setup.profiles.append(place | row | {"kernel": kernel[:160]})


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
    config, dim = setup.configs[name], setup.configs[name].head_dim
    kind = {"dtype": torch.bfloat16, "device": setup.device}
    if name == "gated_deltanet":
        sizes = (config.num_heads, dim, 2 * dim)
        inputs, function = (
            delta_inputs(setup.batch, setup.tokens, *sizes, **kind),
            chunk_gated_delta_rule,
        )
    else:
        sizes = (2 * config.hidden_size // dim, dim, config.d_state)
        inputs, function = ssd_inputs(setup.batch, setup.tokens, *sizes, **kind)[:5], chunk_ssd
    for size in (32, 64, 128, 256)[: 2 if setup.tiny else 4]:

        def call(size=size):
            y, _ = function(*inputs, chunk_size=size)
            torch.autograd.grad(y, inputs, y.detach())

        setup.add("scans", name, f"chunk {size}", wall_ms=setup.wall(call))
        setup.add("scans", name, f"chunk {size}", **setup.profile(call)[2])


PARTS = {
    "check": check,
    "train": train,
    "profile": step_profile,
    "decode": decode,
    "scans": scans,
}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU")
    args = parser.parse_args()
    setup, run = Setup(args), report.about(args.device)
    print(run, flush=True)
    for part in args.parts:
        for name in args.models:
            start = time.perf_counter()
            print(f"{part} {name}", flush=True)
            try:
                PARTS[part](setup, name)
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
