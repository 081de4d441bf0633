"""The prompts that infer.py continues: of the command line, of a file, of standard input."""

import errno
import json
import os
import sys
from pathlib import Path

from demo.config.errors import ConfigError
from demo.config.schema import InferConfig


def read_prompts(config: InferConfig) -> list[bytes]:
    """The bytes to continue, exactly as they were given; of a `prompts_file`, a prompt for each
    line, without its line end (LF or CRLF), blank lines left out; where its name ends in .jsonl,
    each line is a JSON object with the prompt. Raises ConfigError."""
    given = [
        f"{name}={value!r}"
        for name in ("prompt", "prompt_file", "prompts_file")
        if (value := getattr(config, name)) is not None
    ]
    if len(given) > 1:
        raise ConfigError(
            "only one of prompt, prompt_file and prompts_file can be set, got "
            f"{' and '.join(given)}; leave one out"
        )
    if config.prompts_file is not None:
        lines = _read("prompts_file", config.prompts_file).split(b"\n")
        if config.prompts_file.lower().endswith(".jsonl"):
            prompts = [
                _from_json(line, f"line {number} of {config.prompts_file!r}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
        else:
            prompts = [line.removesuffix(b"\r") for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(
                f"prompts_file must have a line that is not blank, got {config.prompts_file!r} "
                "without one; write one prompt per line"
            )
        return prompts
    if config.prompt_file is not None:
        prompt = _read("prompt_file", config.prompt_file)
    else:
        prompt = os.fsencode("import " if config.prompt is None else config.prompt)
    if not prompt:
        raise ConfigError("the prompt must have at least one character, got none; give some text")
    return [prompt]


def _from_json(line: bytes, where: str) -> bytes:
    try:
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str) and prompt:
            return prompt.encode()
        what = f"prompt={json.dumps(prompt)[:40]}"
    except UnicodeError:
        what = "what is not text in UTF-8"
    except (ValueError, RecursionError):
        what = "what is not JSON"
    except (KeyError, TypeError):
        what = "no prompt"
    raise ConfigError(
        f"prompts_file must have a prompt of at least one character in each line, got {what} in "
        f'{where}; write for example {{"prompt": "import "}}'
    )


def _read(key: str, name: str) -> bytes:
    try:
        if name != "-":
            return Path(name).read_bytes()
        if sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed")
        return sys.stdin.buffer.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{key} must be a file that can be read, got {name!r} ({reason}); give another path, "
            "or - for standard input"
        ) from error
