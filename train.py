"""Train a small language model on text: `python train.py --help` says how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo.config.command import command
from demo.config.schema import TrainConfig, model_name

if TYPE_CHECKING:
    from demo.training.runs import Summary


def train(config: TrainConfig) -> Summary:
    """Check everything, make a run folder, train, validate before and after, draw the loss.

    Raises ConfigError, before there is a folder, for anything the user can put right.
    """
    # Imported here, so that --help and a misspelt key are answered at once.
    import lightning

    from demo.checkpoints.checkpoint import METRICS, PICTURE
    from demo.data.loaders import load_data
    from demo.training.lit import LitLanguageModel
    from demo.training.parallel import prepare_blocks
    from demo.training.plots import compressors, plot_loss
    from demo.training.processes import check_devices, find_processes
    from demo.training.resume import continue_metrics, find_stopped
    from demo.training.runs import Summary, build_trainer, create_run, record, running
    from demo.training.start import start_model

    stopped = find_stopped(config)
    config = stopped.config if stopped else config
    check_devices(config.trainer)
    processes = find_processes(config)
    lightning.seed_everything(config.seed, verbose=False)
    config, model, tokenizer = start_model(config, stopped, processes)
    batches, held_out, bytes_per_token, val_text = load_data(
        config, tokenizer, processes.rank, processes.count, stopped.data if stopped else None
    )
    trainer, throughput = build_trainer(config, processes, model)

    run = stopped.run if stopped else create_run(config, tokenizer, processes.rank)
    record(trainer, run, config.trainer)
    prepare_blocks(model, config.trainer)
    module = LitLanguageModel(model, config.optim, bytes_per_token)
    with running(run, processes.rank):
        if stopped and stopped.checkpoint:
            before = continue_metrics(trainer.logger, stopped.rows)
            trainer.fit(module, batches, ckpt_path=stopped.checkpoint)
        else:
            (before,) = trainer.validate(module, held_out, verbose=False)
            trainer.fit(module, batches)
        (after,) = trainer.validate(module, held_out, verbose=False)

    scores = {"before": before["val_bpb"], "after": after["val_bpb"]}
    summary = Summary(run, model, throughput.tokens, throughput.tokens_per_s, **scores)
    if processes.rank == 0:
        text = config.data.name or config.data.source
        title = f"{model_name(config.model)}, {summary.parameters / 1e6:.2f}M parameters, {text}"
        plot_loss(run / METRICS, run / PICTURE, title, compressors(val_text))
    return summary


@command("train", compare="demo.training.runs:compare_runs")
def main(config: TrainConfig) -> Summary:
    summary = train(config)
    from demo.training.runs import print_summary

    print_summary(summary)
    return summary


if __name__ == "__main__":
    main()
