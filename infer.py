"""Continue a text with a trained model: `python infer.py --help` says how."""

import sys

from demo.config.command import command
from demo.config.errors import ConfigError
from demo.config.schema import InferConfig
from demo.inference.prompts import read_prompts


@command("infer")
def main(config: InferConfig) -> None:
    prompts = read_prompts(config)

    # Imported here, so that --help and a misspelt key are answered at once.
    import torch

    from demo.checkpoints.checkpoint import load
    from demo.inference.measure import bench, compare, show
    from demo.inference.output import print_json, print_texts, readable
    from demo.inference.texts import Options

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be one that this machine has, got cuda; use device=cpu")
    loaded = load(
        config.checkpoint, config.model, norm_path=config.norm.path, runs_dir=config.runs_dir
    )
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    loaded.model.to("cuda" if on_gpu else "cpu")

    said = [f"checkpoint: {readable(loaded.folder)}"]
    if config.compare or config.bench:
        measure = compare if config.compare else bench
        show(measure(loaded, prompts[0], config.max_new_tokens, config.bench_runs), config.output)
    else:
        write = print_json if config.output == "json" else print_texts
        speeds = write(loaded, prompts, config.batch_size, Options.of(config))
        said = [str(speeds), f"norm path: {loaded.model.norm_path}", *said]
    print(" | ".join(said), file=sys.stderr)


if __name__ == "__main__":
    main()
