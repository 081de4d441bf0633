"""Whole models beside flash-linear-attention's in one run: forward and backward, wall and GPU time.

    python -m benchmarks.peers                    # on a GPU: results/peers.csv
    python -m benchmarks.peers --configs first    # a kernel of theirs in one configuration, untuned
    python -m benchmarks.peers --device cpu --tiny --models gated_deltanet

The models, batch and loss of benchmarks/models.py. The peers are FLA's models of the same sizes:
Gated DeltaNet, with the guard lifted that keeps its wrong gradients from Hopper, and Mamba2 with
mamba_ssm's Triton scan. Where causal_conv1d is missing, FLA's own Triton convolution stands in for
it, and FLA's layer calls convolution, scan and norm one after the other, as in its eval mode: the
function that fuses them needs causal_conv1d. Of mamba_ssm only a folder with its files has to be on
the path, since its CUDA extensions are not asked for.

Their autotuners compile hundreds of kernels; --compilers processes do that first, each for a share
of the configurations, and leave them in Triton's cache. "ours / peer" is the ratio of the times.
"""

import dataclasses
import importlib.util
import statistics
import subprocess
import sys
import time
import traceback

import torch

from benchmarks import report
from benchmarks.models import MODELS, Setup, loss_of
from gatednorm.bench.timing import wall_times


def without_init(package: str) -> None:
    """Make a package's files importable without running its __init__, where it is installed."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is not None:
        sys.modules[package] = importlib.util.module_from_spec(spec)


def choose_configs(choice: str, share: tuple[int, int] | None) -> None:
    """Which configurations Triton's autotuners try: all, the first, or the last; and of those the
    i-th of n shares, for a process that only compiles."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def chosen(configs):
        if choice != "all":
            return configs[:1] if choice == "first" else configs[-1:]
        mine = configs[share[0] :: share[1]] if share else configs
        return mine if len(mine) > 1 else configs[:2]  # a single one, if it fails, is an error

    def run_some(self, *args, **options):
        if not hasattr(self, "all_configs"):
            self.all_configs, self.configs = self.configs, chosen(self.configs)
        return run(self, *args, **options)

    Autotuner.run = run_some


def peer_model(name: str, config, setup: Setup) -> torch.nn.Module:
    """FLA's model of the same sizes, whose first output are the logits."""
    without_init("mamba_ssm")  # FLA looks for it when it is imported
    shared = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_dim,
        "use_cache": False,
    }
    if name == "gated_deltanet":
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
        from fla.ops.common import chunk_o

        chunk_o.TRITON_ABOVE_3_7_1 = True  # wrong gradients take the time of right ones
        ratio = {"hidden_ratio": int(config.mlp_ratio), "num_heads": config.num_heads}
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**shared, **ratio))
    else:
        from fla.layers import mamba2
        from fla.models import Mamba2Config, Mamba2ForCausalLM

        if setup.device == "cuda" and not mamba2.is_fast_path_available:
            raise ImportError("FLA has not found mamba_ssm, and would time plain PyTorch")
        sizes = {"state_size": config.d_state, "residual_in_fp32": False}
        model = Mamba2ForCausalLM(Mamba2Config(**shared, **sizes))
        if importlib.util.find_spec("causal_conv1d") is None:
            model.eval()
    return model.to(setup.device, torch.bfloat16)


def caller(model, tokens, targets):
    def call():
        model.zero_grad(set_to_none=True)
        loss_of(model, tokens, targets).backward()

    return call


def compile_all(args) -> None:
    """Fill Triton's cache: one process for each share of the configurations."""
    command = [sys.executable, "-m", "benchmarks.peers", "--device", args.device]
    command += ["--configs", args.configs, "--models", *args.models]
    command += ["--tiny"] if args.tiny else []
    workers = [
        subprocess.Popen([*command, "--share", str(i), str(args.compilers)], stdout=sys.stderr)
        for i in range(args.compilers)
    ]
    for worker in workers:
        worker.wait()


def main() -> None:
    parser = report.parser(__doc__, "peers.csv")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--configs", default="all", choices=["all", "first", "last"])
    parser.add_argument("--compilers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--share", type=int, nargs=2, help="of what such a process compiles")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU")
    args = parser.parse_args()
    if args.compilers:
        start = time.perf_counter()
        compile_all(args)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    choose_configs(args.configs, args.share and tuple(args.share))
    setup = Setup(args)
    run = report.about(args.device, "flash-linear-attention", "mamba_ssm")
    rows: list[dict] = []

    def add(name, whose, **quantities):
        place = {"model": name, "whose": whose, "configs": args.configs}
        for quantity, value in quantities.items():
            rows.append(place | {"quantity": quantity, "value": f"{value:.5g}"})
            print("  ", *rows[-1].values(), flush=True)

    for name in args.models:
        try:
            config, (tokens, targets) = setup.configs[name], setup.data()
            if args.share:  # every kernel once, in little memory
                config = dataclasses.replace(config, num_layers=1, vocab_size=128)
                caller(peer_model(name, config, setup), tokens % 128, targets % 128)()
                setup.synchronize()
                continue
            models = {"ours": setup.model(name), "peer": peer_model(name, config, setup)}
            calls = {whose: caller(model, tokens, targets) for whose, model in models.items()}
            for whose, model in models.items():
                start = time.perf_counter()
                calls[whose]()
                setup.synchronize()
                size = sum(parameter.numel() for parameter in model.parameters())
                took = time.perf_counter() - start
                add(name, whose, parameters_M=size / 1e6, first_call_s=took)
            walls = wall_times(calls, args.repeats, warm_up=3, device=args.device)
            found = {}
            for whose, call in calls.items():
                totals = setup.profile(call)[2]
                found[whose] = {"wall_ms": statistics.median(walls[whose]), **totals}
                add(name, whose, **found[whose])
            for what in ("wall_ms", "gpu_ms"):
                ratio = found["ours"][what] / found["peer"][what]
                add(name, "ours / peer", **{what.replace("ms", "ratio"): ratio})
        except Exception:  # a peer that is missing or fails: the other one still counts
            traceback.print_exc()
        report.write(args.out, rows, run)


if __name__ == "__main__":
    main()
