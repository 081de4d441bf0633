"""Continue a text with a trained model: `python infer.py --help` says how."""

import sys
from pathlib import Path

from demo.config.command import command
from demo.config.errors import about
from demo.config.schema import InferConfig
from demo.inference.prompts import read_prompts


@command("infer")
def main(config: InferConfig) -> None:
    prompts = read_prompts(config)

    # Imported here, so that --help and a misspelt key are answered at once.
    from demo.checkpoints.checkpoint import load
    from demo.inference.measure import bench, compare, count_exact
    from demo.inference.printing import (
        print_json,
        print_measurement,
        print_scores,
        print_texts,
        speed_line,
    )
    from demo.inference.ranks import on_devices
    from demo.inference.scoring import score
    from demo.inference.text_generation import Options, in_batches

    options = {"norm_path": config.norm.path, "exact": config.exact, "runs_dir": config.runs_dir}
    loaded = load(config.checkpoint, config.model, **options)
    with on_devices(loaded.model, config.device):
        said, counted = [], []
        if config.compare or config.bench:
            measure = compare if config.compare else bench
            measured = measure(loaded, prompts[0], config.max_new_tokens, config.bench_runs)
            print_measurement(measured, config.output)
        elif config.max_new_tokens == 0:
            with about():
                print_scores(score(loaded, prompts), config.output)
        else:
            batches = in_batches(loaded, prompts, config.batch_size, Options.of(config))
            if config.output == "json":
                results = print_json(batches)
            else:
                results = print_texts(batches, len(prompts))
            said = [speed_line(results), f"norm path: {loaded.model.norm_path}"]
            if config.exact:
                counted = [count_exact(loaded, prompts, [r for batch in results for r in batch])]
        folder, here = loaded.folder, Path.cwd()
        folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
        print(*said, f"checkpoint: {folder / (loaded.weights or '')}", sep=" | ", file=sys.stderr)
        for line in counted:
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
