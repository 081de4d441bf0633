"""Continue a text with a trained model: `python infer.py --help` says how."""

import os
import sys
from pathlib import Path

from configs.command import command
from configs.schema import ConfigError, InferConfig


def read_prompt(config: InferConfig) -> bytes:
    """The bytes to continue, exactly as they were given. Raises ConfigError."""
    if config.prompt is not None and config.prompt_file is not None:
        raise ConfigError(
            f"prompt and prompt_file cannot both be set, got prompt={config.prompt!r} and "
            f"prompt_file={config.prompt_file!r}; leave one out"
        )
    try:
        if config.prompt_file == "-":
            prompt = sys.stdin.buffer.read()
        elif config.prompt_file is not None:
            prompt = Path(config.prompt_file).read_bytes()
        else:
            prompt = os.fsencode("import " if config.prompt is None else config.prompt)
    except OSError as error:
        raise ConfigError(
            f"prompt_file must be a file that can be read, got {config.prompt_file!r} "
            f"({error.strerror}); give another path, or - for standard input"
        ) from error
    if not prompt:
        raise ConfigError("the prompt must have at least one character, got none; give some text")
    return prompt


@command("infer", texts=("prompt",), names=("model", "prompt_file", "checkpoint", "runs_dir"))
def main(config: InferConfig) -> None:
    prompt = read_prompt(config)

    # Imported here, so that --help and a misspelt key are answered at once.
    import torch

    from models.checkpoint import find_checkpoint, load_model
    from models.inference import Continuation

    folder = find_checkpoint(config.model, config.checkpoint, config.runs_dir)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be one that this machine has, got cuda; use device=cpu")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    model = load_model(folder, config.norm.path).to("cuda" if on_gpu else "cpu")

    text = Continuation(
        model,
        prompt,
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.seed,
    )
    sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    print(prompt.decode(errors="replace"), end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print(
        f"\n\nprefill {len(prompt)} tokens, {text.prefill_tokens_per_s:,.0f} tokens/s"
        f" | decode {len(text.tokens)} tokens, {text.decode_tokens_per_s:,.0f} tokens/s"
        f" | norm path: {model.norm_path} | checkpoint: {folder}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
