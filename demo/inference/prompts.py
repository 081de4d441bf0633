"""The prompts that infer.py continues: of the command line, of a file, of standard input."""

import errno
import json
import os
import sys
from pathlib import Path

from demo.config.command import process_count
from demo.config.errors import ConfigError, first_line
from demo.config.schema import InferConfig


def read_prompts(config: InferConfig) -> list[bytes]:
    """The bytes to continue, exactly as they were given. A `prompts_file` has a prompt in each line
    that is not blank, without its line end (LF or CRLF); if its name ends in .jsonl, each line is a
    JSON object with the prompt. Raises ConfigError."""
    keys = ("prompt", "prompt_file", "prompts_file")
    given = {key: value for key in keys if (value := getattr(config, key)) is not None}
    if len(given) > 1:
        values = " and ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConfigError(
            f"only one of prompt, prompt_file and prompts_file can be set, got {values}; leave one "
            "out"
        )
    key, value = next(iter(given.items()), ("prompt", "import "))
    content = os.fsencode(value) if key == "prompt" else _read(key, value)
    if key != "prompts_file":
        if not content:
            raise ConfigError(
                "the prompt must have at least one character, got none; give some text"
            )
        return [content]
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(
            f"prompts_file must have a line that is not blank, got {value!r} without one; write "
            "one prompt per line"
        )
    if value.lower().endswith(".jsonl"):
        return [_from_json(line, f"line {number} of {value!r}") for number, line in lines]
    return [line.removesuffix(b"\r") for _, line in lines]


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
    if name == "-" and process_count() > 1:
        raise ConfigError(
            f"{key} must be a file for several processes, got '-', standard input, which only one "
            "of them could read; give a path"
        )
    try:
        if name != "-":
            return Path(name).read_bytes()
        if sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed")
        return sys.stdin.buffer.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"{key} must be a file that can be read, got {name!r} ({first_line(error)}); give "
            "another path, or - for standard input"
        ) from error
