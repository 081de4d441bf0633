"""What `gatednorm.patch` changes in models of transformers, on a GPU, and what a compat call costs.

    python -m benchmarks.adoption                      # results/adoption.csv
    python -m benchmarks.adoption --parts decode --models qwen3_5
    python -m benchmarks.adoption --device cpu --tiny  # the same code on small sizes

A few layers of Qwen3.5 9B, Kimi Linear 48B-A3B and Nemotron-H 8B, in their published widths, bf16,
with random weights. Each runs with three norms that share one weight, in turn: transformers' own
("plain"), flash-linear-attention's put in by hand ("fla"; `FusedRMSNormGated`, for Nemotron-H
`RMSNormGated`) and ours (`gatednorm.patch`). Everything else is the same, with the scans of
flash-linear-attention and mamba_ssm where these are installed. Figures are medians over the
rounds, in which the three take turns at being first. "gpu_ms" is the time in which a kernel ran.
"norm_ms" is the GPU time of the gated norms: what benchmarks/profiles.py attributes to
transformers' own, and for the other two what the kernels that a run with transformers' norm does
not have add to the rest. Errors are relative, in the 2-norm, to the model with transformers' own
norm.
"""

import copy
import gc
import importlib.util
import statistics
import time
import traceback
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import record_function
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear import KimiLinearConfig
from transformers.models.nemotron_h import NemotronHConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig

import gatednorm
from benchmarks import report
from benchmarks.profiles import busy_time, kernel_times, norm_times, record
from gatednorm.bench.timing import rotated, synchronize, wall_time, wall_times
from gatednorm.compat import fla, mamba, sglang, vllm

LINEAR, FULL, MLP = "linear_attention", "full_attention", "mlp"

# The configurations' own defaults are the published widths.
CONFIGS = {
    "qwen3_5": (Qwen3_5TextConfig, {"num_hidden_layers": 4}),
    "kimi_linear": (
        KimiLinearConfig,
        {
            "num_hidden_layers": 4,
            "layer_types": [LINEAR] * 3 + [FULL],
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        },
    ),
    "nemotron_h": (NemotronHConfig, {"layer_types": [LINEAR, MLP, LINEAR, MLP, LINEAR, FULL, MLP]}),
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "pad_token_id": 0} | HEADS
TINY = {
    "qwen3_5": {
        "num_hidden_layers": 2,
        "layer_types": [LINEAR, FULL],
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "kimi_linear": {
        "num_hidden_layers": 2,
        "layer_types": [LINEAR, FULL],
        "mlp_layer_types": ["dense", "sparse"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "nemotron_h": {
        "layer_types": [LINEAR, MLP, FULL],
        "head_dim": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 32,
    },
}


class Subject:
    """A model, and its gated norms with three ways to compute each."""

    def __init__(self, name: str, tiny: bool, device: str):
        cls, options = CONFIGS[name]
        torch.manual_seed(0)
        with torch.device(device):
            config = cls(**options | (SMALL | TINY[name] if tiny else {}))
            # Out of training mode transformers calls the norm of Nemotron-H, and not mamba_ssm's
            # fused function, which has a norm inside. No model drops anything out.
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.vocab, self.places = config.vocab_size, []
        for module in list(self.model.modules()):
            for child_name, child in module.named_children():
                if type(child).__name__.endswith("RMSNormGated"):
                    nn.init.normal_(child.weight, mean=1, std=0.1)
                    self.places.append((module, child_name, self._ways(child)))

    @staticmethod
    def _ways(norm: nn.Module) -> dict[str, nn.Module]:
        ours = copy.deepcopy(norm)
        gatednorm.patch(ours)
        ways = {"plain": norm, "fla": by_hand(norm), "ours": ours}
        for way in ways.values():
            if way is not None:
                way.weight = norm.weight
        return {name: way for name, way in ways.items() if way is not None}

    @property
    def ways(self) -> list[str]:
        return list(self.places[0][2])

    def use(self, way: str) -> nn.Module:
        for module, name, ways in self.places:
            setattr(module, name, ways[way])
        return self.model

    @contextmanager
    def labelled(self):
        """A name for the profiler around each norm."""
        label, handles = record_function("norm.gated"), []

        def enter(*_):
            label.__enter__()

        def leave(*_):
            label.__exit__(None, None, None)

        for _, _, ways in self.places:
            for norm in ways.values():
                handles.append(norm.register_forward_pre_hook(enter))
                handles.append(norm.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def by_hand(norm: nn.Module) -> nn.Module | None:
    """flash-linear-attention's class for a norm, as a user would write it; None where it cannot
    run."""
    if norm.weight.device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return None
    from fla.modules import FusedRMSNormGated
    from fla.modules.layernorm_gated import RMSNormGated

    size, eps = norm.weight.numel(), norm.variance_epsilon
    kind = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    if hasattr(norm, "group_size"):
        return RMSNormGated(size, eps, norm.group_size, norm_before_gate=False, **kind)
    return FusedRMSNormGated(size, eps=eps, activation=norm.activation, **kind)


def lift_the_guard() -> None:
    """Let flash-linear-attention's Gated DeltaNet run its backward on Hopper with Triton 3.4 to
    3.7.0, where it refuses to: its gradients are wrong there, and take the time of right ones."""
    if importlib.util.find_spec("fla") is not None and torch.cuda.is_available():
        from fla.ops.common import chunk_o

        chunk_o.TRITON_ABOVE_3_7_1 = True


class Setup:
    """What every part needs, and the rows that they make."""

    def __init__(self, args):
        self.device, self.tiny, self.rounds = args.device, args.tiny, args.rounds
        self.batch, self.tokens, self.steps = (2, 32, 2) if self.tiny else (4, 2048, 8)
        self.rows = []

    def add(self, part: str, model: str, norm: str, **quantities) -> None:
        for quantity, value in quantities.items():
            row = {"part": part, "model": model, "norm": norm}
            self.rows.append(row | {"quantity": quantity, "value": f"{value:.5g}"})
            print("  ", *self.rows[-1].values(), flush=True)

    def tokens_of(self, subject: Subject, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, count)
        return torch.randint(3, subject.vocab, size, generator=generator).to(self.device)

    def measure(self, part: str, name: str, subject: Subject, calls: dict, steps: int = 1) -> None:
        """Wall time, GPU time, the norms' share of it and memory of a call with each norm; `steps`
        is how many steps a call makes."""
        wall = wall_times(calls, self.rounds, warm_up=3, device=self.device)
        for way, times in wall.items():
            self.add(part, name, way, wall_ms=statistics.median(times) / steps)
        found = {way: [] for way in calls}
        with subject.labelled():
            for number in range(min(self.rounds, 3)):
                ways = rotated(calls, number)
                events = {way: record(self.device, calls[way], 1) for way in ways}
                tables = {way: kernel_times(self.device, events[way], steps) for way in ways}
                for way in ways:
                    ms = busy_time(self.device, events[way], steps)
                    if self.device == "cuda" and way != "plain":
                        # not by operators: a kernel of Triton's outside of one belongs to none
                        own = tables[way].keys() - tables["plain"].keys()
                        norm = ms - busy_time(self.device, events[way], steps, without=own)
                    else:
                        norm = norm_times(self.device, events[way], steps)["norm.gated"]
                    launches = sum(count for count, _ in tables[way].values())
                    found[way].append((ms, norm, launches))
        for way, figures in found.items():
            ms, norm, launches = map(statistics.median, zip(*figures, strict=True))
            self.add(part, name, way, gpu_ms=ms, norm_ms=norm, launches=launches)
        if self.device == "cuda":
            for way, call in calls.items():
                torch.cuda.reset_peak_memory_stats()
                call()
                self.add(part, name, way, peak_GiB=torch.cuda.max_memory_allocated() / 2**30)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def check(setup: Setup, name: str, subject: Subject) -> None:
    """Logits and gradients against those with transformers' own norm, which is run twice."""
    tokens = setup.tokens_of(subject, min(setup.tokens, 512))
    parameters = list(subject.model.parameters())

    def results(way):
        model = subject.use(way)
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        grads = torch.autograd.grad(loss_of(model, tokens), parameters, allow_unused=True)
        return logits, [g for g in grads if g is not None]

    def norm(tensors):
        return sum(t.double().square().sum().item() for t in tensors) ** 0.5

    logits, grads = results("plain")
    for way in subject.ways:
        again, other = results(way)
        same = float(torch.equal(again, logits))
        error = norm([again.double() - logits.double()]) / norm([logits])
        difference = norm(a.double() - b.double() for a, b in zip(other, grads, strict=True))
        setup.add("check", name, way, same_logits=same, logits_error=error)
        setup.add("check", name, way, gradients_error=difference / norm(grads))


def train(setup: Setup, name: str, subject: Subject) -> None:
    """A step with AdamW."""
    tokens = setup.tokens_of(subject, setup.tokens)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-6, fused=True)

    def step(way):
        loss_of(subject.use(way), tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    calls = {way: lambda way=way: step(way) for way in subject.ways}
    setup.measure("train", name, subject, calls)


@torch.no_grad()
def prefill(setup: Setup, name: str, subject: Subject) -> None:
    """A forward of as many tokens, without gradients."""
    tokens = setup.tokens_of(subject, setup.tokens)
    calls = {
        way: lambda way=way: subject.use(way)(input_ids=tokens, logits_to_keep=1, use_cache=True)
        for way in subject.ways
    }
    setup.measure("prefill", name, subject, calls)


@torch.no_grad()
def decode(setup: Setup, name: str, subject: Subject) -> None:
    """Single tokens for each of a batch after a prompt, eager; each norm has a cache of its own."""
    prompt = setup.tokens_of(subject, setup.tokens // 4)
    token, calls, logits = prompt[:, -1:], {}, {}
    for way in subject.ways:
        cache = subject.use("plain")(input_ids=prompt, use_cache=True).past_key_values

        def steps(way=way, cache=cache):
            model = subject.use(way)
            for _ in range(setup.steps):
                logits[way] = model(input_ids=token, past_key_values=cache, use_cache=True).logits

        calls[way] = steps
        steps()
        same = float(torch.equal(logits[way], logits["plain"]))
        setup.add("decode", name, way, same_logits=same)
    setup.measure("decode", name, subject, calls, setup.steps)


PARTS = {"check": check, "prefill": prefill, "decode": decode, "train": train}


def overhead(setup: Setup) -> None:
    """Wall microseconds of a call through each door, and of `rmsnorm_fn` itself; lowest of the
    rounds, taken in turn. The rows are few, so that a GPU waits for the CPU."""
    x, z = (torch.randn(64, 128, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    w = torch.ones(128, device=setup.device)
    calls = {
        "rmsnorm_fn": lambda: gatednorm.rmsnorm_fn(x, w, None, z),
        "rms_norm_gated": lambda: gatednorm.rms_norm_gated(x, w, None, z),
        "fla.rms_norm_gated": lambda: fla.rms_norm_gated(x, z, w, None),
        "fla.rmsnorm_fn": lambda: fla.rmsnorm_fn(x, w, None, z),
        "mamba.rmsnorm_fn": lambda: mamba.rmsnorm_fn(x, w, None, z),
        "sglang.rms_norm_gated": lambda: sglang.rms_norm_gated(
            x=x, weight=w, bias=None, z=z, is_rms_norm=True
        ),
        "vllm.rmsnorm_fn": lambda: vllm.rmsnorm_fn(x, w, None, z),
    }
    loops = 20 if setup.tiny else 300
    for mode in ("inference", "training"):
        if mode == "training":
            x.requires_grad_(), w.requires_grad_()
            del calls["rms_norm_gated"]  # is for inference
        with torch.set_grad_enabled(mode == "training"):
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(setup.rounds):
                for name, call in calls.items():
                    best[name] = min(best[name], wall_time(call, loops, device=setup.device))
        for name, us in best.items():
            extra = us - best["rmsnorm_fn"]
            setup.add("overhead", mode, name, wall_us=us, over_rmsnorm_fn_us=extra)


def show(setup: Setup) -> None:
    """The figures, a line for each part, model and norm."""
    table = {}
    for row in setup.rows:
        place = (row["part"], row["model"], row["norm"])
        table.setdefault(place, {})[row["quantity"]] = row["value"]
    for part in dict.fromkeys(place[0] for place in table):
        lines = [
            {"model": place[1], "norm": place[2], **figures}
            for place, figures in table.items()
            if place[0] == part
        ]
        report.show(lines, part)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "overhead"])
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU")
    args = parser.parse_args()
    lift_the_guard()
    setup = Setup(args)
    run = report.about(args.device, "transformers", "flash-linear-attention")
    print(run, flush=True)

    def guarded(title, function, *arguments):
        start = time.perf_counter()
        print(title, flush=True)
        try:
            function(setup, *arguments)
        except Exception:  # of whatever this part came across: it is shown, and the rest runs
            traceback.print_exc()
        synchronize(args.device)
        print(f"   ({time.perf_counter() - start:.1f} s)", flush=True)
        # after every part, so that a run that is cut short leaves what it has
        report.write(args.out / "adoption.csv", setup.rows, run)

    if "overhead" in args.parts:
        guarded("overhead", overhead)
    for name in args.models:
        subject = Subject(name, args.tiny, args.device)
        gc.freeze()  # a collection would go through every object of the model
        for part in PARTS:
            if part in args.parts:
                guarded(f"{part} {name}", PARTS[part], name, subject)
        del subject
        gc.unfreeze()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    show(setup)


if __name__ == "__main__":
    main()
