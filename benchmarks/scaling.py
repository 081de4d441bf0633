"""Weak scaling of training: tokens/s of one process and of several with the same rows for each.

    python benchmarks/scaling.py                                # 1 and 2 GPUs, both models
    python benchmarks/scaling.py --strategy ddp fsdp tp         # each; with tp all share a model
    python benchmarks/scaling.py --processes 1 2 4 8
    python benchmarks/scaling.py --models fla size=fla_small trainer.accelerator=cpu  # an override

Everything is as in `train.py experiment=multi_gpu` (about 170M parameters, bf16, rows of 2048
tokens), with random bytes for data and no validation; each run is started by torchrun, warms up,
and then trains for `--seconds`. One process is timed once a model, with the first strategy. Writes
benchmarks/results/scaling.csv.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import report  # noqa: E402

WARM_UP, LOOK_EVERY = 20, 10  # steps


def main() -> None:
    parser = report.parser(__doc__, "scaling.csv")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["fla", "mamba2"])
    parser.add_argument("--strategy", nargs="+", choices=["ddp", "fsdp", "tp"], default=["ddp"])
    parser.add_argument("--rows", type=int, default=8, help="of 2048 tokens, per process and step")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="further key=value of train.py")
    args = parser.parse_intermixed_args()
    if args.worker:
        work(args.overrides, args.seconds, args.worker)
        return
    rows, failed = [], None
    for model in args.models:
        one = None
        for count, strategy in itertools.product(args.processes, args.strategy):
            if count == 1 and strategy != args.strategy[0]:
                continue
            try:
                row = measure(model, count, strategy, args)
            except subprocess.CalledProcessError as error:
                failed = f"{model}, {strategy}, {count} processes: exit code {error.returncode}"
                print(failed, flush=True)
                continue
            one = one or row["tokens_per_s"] / count
            row["times_one_process"] = f"{row['tokens_per_s'] / one:.3f}"
            row["tokens_per_s"] = round(row["tokens_per_s"])
            rows.append(row)
            print(
                f"{row['model']:8}{row['parameters'] / 1e6:7.1f}M  {row['strategy']:4}  "
                f"{count} x {row['device']}  {row['tokens_per_s']:>12,.0f} tokens/s  "
                f"{row['times_one_process']} times one  {row['gib']:.1f} GiB each",
                flush=True,
            )
            report.write(args.out, rows)  # what there is, should the next one fail
    if failed:
        sys.exit(failed)


def measure(model: str, count: int, strategy: str, args: argparse.Namespace) -> dict:
    """One run of torchrun, and the row of the table that its first process made."""
    tensor = strategy == "tp"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count), __file__),
            *("--worker", str(result), "--seconds", str(args.seconds)),
            *("experiment=multi_gpu", f"model={model}", f"optim.batch_size={count * args.rows}"),
            *(f"trainer.strategy={'ddp' if tensor else strategy}", f"runs_dir={folder}/runs"),
            *(f"trainer.tensor_parallel={count if tensor else 1}", *args.overrides),
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        return json.loads(result.read_text())


def work(overrides: list[str], seconds: float, result: Path) -> None:
    """Train as train.py does, in each of the processes; the first writes what it measured."""
    import numpy as np
    import torch
    from lightning.pytorch.callbacks import Callback

    from demo.config.command import compose
    from demo.config.schema import model_name
    from demo.data.batches import TrainLoader
    from demo.data.corpus import Documents
    from demo.training.callbacks import Progress, process_peak_memory
    from demo.training.module import LitLanguageModel, prepare_blocks
    from demo.training.processes import count_parameters, find_processes
    from demo.training.run import Run
    from demo.training.stopping import Signals
    from demo.training.trainer import build_trainer, record
    from models.language_model import LanguageModel

    class Window(Callback):
        """The steps after the warm-up, until `seconds` are over."""

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == WARM_UP:
                self.began = self.now(module)
            elif trainer.global_step > WARM_UP and trainer.global_step % LOOK_EVERY == 0:
                self.steps, self.took = trainer.global_step - WARM_UP, self.now(module) - self.began
                trainer.should_stop = trainer.strategy.broadcast(self.took > seconds)

        def now(self, module) -> float:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

    alone = ["trainer.checkpoint_every=100000", "trainer.validate_every=0"]
    config = compose("train", ["optim.steps=100000", *alone, *overrides])
    data, optim = config.data, config.optim
    processes = find_processes(config)
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model)
    text = np.random.default_rng(0).integers(0, 256, 4_000_000).astype(np.uint8)
    documents = Documents(text, np.array([0, text.size]))
    batches = TrainLoader(
        documents,
        config.seed,
        batch_size=optim.batch_size,
        sequence_length=data.sequence_length,
        steps=optim.steps,
        rank=processes.reader,
        world_size=processes.readers,
    )
    trainer, _ = build_trainer(config, processes, model)
    run = Run.create(config, rank=processes.rank)
    record(trainer, run, config, Signals())
    window = Window()
    trainer.callbacks = [window] + [c for c in trainer.callbacks if not isinstance(c, Progress)]
    prepare_blocks(model, config.trainer)
    module = LitLanguageModel(model, optim)
    with run.at_work(processes.rank):
        trainer.fit(module, batches)
    if processes.rank == 0:
        tokens = optim.batch_size * data.sequence_length
        device = trainer.strategy.root_device  # the module lies on the CPU again
        peak = process_peak_memory(device)
        row = {
            **report.about(device.type),
            "model": model_name(config.model),
            "parameters": count_parameters(config.model),
            "strategy": "tp" if processes.tensor_parallel > 1 else config.trainer.strategy,
            "precision": trainer.precision,
            "processes": processes.count,
            "rows": optim.batch_size,
            "tokens_per_row": data.sequence_length,
            "steps": window.steps,
            "gib": peak and round(peak / 2**30, 1),
            "tokens_per_s": window.steps * tokens / window.took,
        }
        result.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
