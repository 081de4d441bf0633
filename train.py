"""Train a small language model on text: `python train.py --help` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo.config.command import command
from demo.config.schema import TrainConfig, model_name

if TYPE_CHECKING:
    from demo.training.summary import Summary


def train(config: TrainConfig) -> Summary:
    """Check everything, make a run folder, train, validate before and after, draw the loss.

    Raises ConfigError, before there is a folder, for anything the user can put right.
    """
    # Imported here, so that --help and a misspelt key are answered at once.
    import lightning

    from demo.data.loaders import load_data
    from demo.training.loggers import check_loggers
    from demo.training.module import LitLanguageModel, prepare_blocks
    from demo.training.plots import compressors, plot_loss
    from demo.training.processes import check_devices, ends_in_a_line, find_processes
    from demo.training.resume import find_start, start_model
    from demo.training.run import PICTURE, VAL, Run, best_on_the_way
    from demo.training.stopping import Signals
    from demo.training.summary import Summary, announce
    from demo.training.trainer import build_trainer, record

    start = find_start(config)
    check_devices(start.config.trainer)
    check_loggers(start.config.trainer)
    processes = find_processes(start.config)
    rank = processes.rank
    lightning.seed_everything(start.config.seed, verbose=False)
    config, model, tokenizer = start_model(start, processes)
    data = load_data(config, tokenizer, processes.reader, processes.readers, start.position)
    trainer, throughput = build_trainer(config, processes, model)

    run = start.run or Run.create(config, tokenizer, rank)
    signals = Signals()
    record(trainer, run, config, signals)
    prepare_blocks(model, config.trainer)
    module = LitLanguageModel(model, config.optim, data.bytes_per_token)
    with run.at_work(rank, start.rows, start.saved), signals, ends_in_a_line(rank):
        announce(data.report, run)
        before = start.val_bpb
        if start.checkpoint is None:
            before = trainer.validate(module, data.validation, verbose=False)[0][VAL]
        trainer.fit(module, data.train, data.sample, ckpt_path=start.checkpoint, weights_only=True)
        after = trainer.validate(module, data.validation, verbose=False)[0][VAL]

    folder, speed = run.folder, throughput.tokens_per_s
    rows = run.read_metrics() if rank == 0 else ()
    best = best_on_the_way(rows)
    lossy = data.report.loses_text
    summary = Summary(folder, model, throughput.tokens, speed, before, after, best, lossy)
    if rank == 0:
        text = config.data.name or config.data.source
        title = f"{model_name(config.model)}, {summary.parameters / 1e6:.2f}M parameters, {text}"
        plot_loss(rows, folder / PICTURE, title, compressors(data.val_text))
    return summary


@command("train", compare="demo.training.summary:compare_runs")
def main(config: TrainConfig) -> Summary:
    from demo.training.summary import print_summary

    summary = train(config)
    print_summary(summary)
    return summary


if __name__ == "__main__":
    main()
