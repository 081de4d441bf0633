"""infer.py: which checkpoint, which text, and what it says when something is wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
from demo import Result, generate, load
from demo.checkpoints.checkpoint import SHIPPED, WEIGHTS
from demo.checkpoints.tokenizer import TextTokenizer
from demo.inference.printing import speed_line
from models import token_log_probs
from small_runs import run as run_script
from small_runs import write_checkpoint
from text_sets import byte_level


def run(*arguments: str, stdin: bytes = b"") -> tuple[str, str]:
    """Standard output and standard error of `python infer.py <arguments>`."""
    code, out, err = run_script("infer", *arguments, stdin=stdin)
    assert code == 0, err
    return out, err


@pytest.mark.parametrize(
    "prompt", [" ", "def f(a, b=1):\n  ", "{a: 'caf\u00e9 \U0001f600'}, ${d}=e\\"]
)
@pytest.mark.parametrize("way", ["prompt={}", "prompt_file=prompt (1).txt", "prompt_file=-"])
def test_any_prompt_survives(prompt, way, run_folder):
    Path("prompt (1).txt").write_bytes(prompt.encode())
    argument = way.replace("{}", prompt)
    out, err = run("model=mamba2", "max_new_tokens=3", argument, stdin=prompt.encode())
    assert out.startswith(prompt)
    count = len(prompt.encode())
    assert f"prefill {count} token{'s' * (count > 1)}, " in err


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_several_prompts_in_order_as_text_and_as_json(batch_size, run_folder):
    given = [b"import ", b"def f(x):", b"x"]
    arguments = ("model=mamba2", "max_new_tokens=9", f"batch_size={batch_size}", "prompts_file=-")
    results = generate(load(run_folder), given, max_new_tokens=9)
    out, err = run(*arguments, stdin=b"\n\n".join(given))
    assert "3 prompts | prefill 17 tokens, " in err
    assert out == "\n".join(
        f"==> {number} of 3 <==\n{result.prompt}{result.text}\n"
        for number, result in enumerate(results, 1)
    )
    out, err = run(*arguments, "output=json", stdin=b"\n\n".join(given))
    assert "3 prompts | prefill 17 tokens, " in err
    for line, result in zip(map(json.loads, out.splitlines()), results, strict=True):
        expected = dataclasses.asdict(result)
        for key in ("prefill_s", "decode_s"):
            del expected[key]
            assert line.pop(key) > 0
        assert line.pop("log_probs") == pytest.approx(expected.pop("log_probs"), abs=1e-5)
        assert line == expected


def test_a_model_with_a_tokenizer_counts_its_tokens(tmp_path):
    tokenizer = TextTokenizer(byte_level(), eos=0)
    write_checkpoint(tmp_path / "run", "mamba2", tokenizer=tokenizer)
    count = len(tokenizer.encode(b"import os"))
    assert count < 9
    arguments = (f"checkpoint={tmp_path / 'run'}", "prompt=import os", "max_new_tokens=4")
    out, err = run(*arguments, "output=json")
    line = json.loads(out)
    assert f"prefill {count} tokens" in err
    assert line["prompt_tokens"] == count
    assert line["text"] == tokenizer.decode(line["tokens"])


@pytest.mark.parametrize(
    ("argument", "words"), [("compare=true", "differ in a bit"), ("bench=true", "median")]
)
def test_tables(argument, words, run_folder):
    arguments = (argument, "model=mamba2", "max_new_tokens=3", "bench_runs=2", "prompt=abc")
    out, err = run(*arguments)
    assert words in out
    assert err == "checkpoint: runs/a/model.safetensors\n"
    assert json.loads(run(*arguments, "output=json")[0])


@pytest.mark.parametrize("path", ["inference", "training"])
def test_the_norm_path_that_ran_is_named(path, run_folder):
    """That both write the same is in test_bench_and_compare.py."""
    _, err = run("model=mamba2", f"norm={path}", "max_new_tokens=1")
    assert f"norm path: {path}" in err


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_exact_mode_counts_what_training_reproduces(model, tmp_path, monkeypatch):
    """And the lines of JSON hold all bits of the log-probabilities."""
    given = [b"import os", b"def f(x):\n" * 9]
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(json.dumps({"prompt": prompt.decode()}) for prompt in given)
    Path("prompts.jsonl").write_text(lines)
    arguments = (f"model={model}", "prompts_file=prompts.jsonl", "batch_size=2", "output=json")
    arguments += ("max_new_tokens=40",)
    out, err = run(*arguments, "exact=true")
    words = "log-probabilities equal the training forward's, bit for bit"
    assert err.splitlines()[-1] == f"80 of 80 {words}"
    loaded = load(SHIPPED / model, norm_path="training", exact=True)
    for prompt, line in zip(given, map(json.loads, out.splitlines()), strict=True):
        tokens = torch.tensor([*loaded.tokenizer.encode(prompt), *line["tokens"]])
        logits, _ = loaded.model(tokens[None, :-1])
        expected = token_log_probs(logits[0, -40:], tokens[-40:])
        assert torch.equal(torch.tensor(line["log_probs"]), expected)
    assert words not in run(*arguments)[1]
    table = ("compare=true", f"model={model}", "max_new_tokens=20", "bench_runs=1")
    assert json.loads(run(*table, "exact=true", "output=json")[0])["equal_log_probs"] == 20
    assert json.loads(run(*table, "output=json")[0])["equal_log_probs"] < 20


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_without_a_run_the_shipped_checkpoint_is_taken_and_it_is_small(
    model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out, err = run(f"model={model}", "prompt='import '", "max_new_tokens=60", "temperature=0")
    assert f"checkpoint: {SHIPPED / model / WEIGHTS}\n" in err
    assert "\n" in out
    assert (SHIPPED / model / WEIGHTS).stat().st_size <= 4e6


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_what_ships_goes_on_with_more_than_blanks(model):
    """By default: greedily, or with top_p=0.95, some of these end in nothing but spaces."""
    prompts = ["import ", "class A:", "class A:\n", "def f(x):\n", "    ", " ", "# ", "x", "("]
    results = generate(load(SHIPPED / model), prompts, batch_size=9, max_new_tokens=160)
    assert [r.prompt for r in results if len(r.text.split()) < 3] == []
    assert [r.prompt for r in results if not r.text[-60:].strip()] == []


def test_a_gpu_that_is_not_there_is_one_line(run_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = run_script("infer", "device=cuda")
    says = "device must be one that torch can use, got cuda; use device=cpu"
    assert answer == (2, "", f"infer.py: error: {says}\n")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (1, "prefill 1 token, 1 tokens/s | decode 1 token"),
        (2, "prefill 2 tokens, 2 tokens/s | decode 2 tokens, 1 tokens/s"),
        (12345, "prefill 12,345 tokens, 12,345 tokens/s | decode 12,345 tokens, 12,344 tokens/s"),
    ],
)
def test_the_line_of_speeds(tokens, says):
    result = Result("", tokens=[0] * tokens, prompt_tokens=tokens, prefill_s=1, decode_s=1)
    assert speed_line([[result]]) == says


# ---- the command itself ----

COMMAND = [sys.executable, infer.__file__, "model=mamba2"]


def test_a_reader_that_leaves_is_no_error(run_folder):
    command = [*COMMAND, "max_new_tokens=4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(7) == b"import "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("closed", ["1>&-", "2>&-"], ids=["stdout", "stderr"])
def test_a_stream_that_the_shell_closed_is_no_error(closed, run_folder):
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', *COMMAND, "prompt_file=-", "max_new_tokens=2"]
    done = subprocess.run(shell, input=b"import os\ndef ", capture_output=True, check=True)
    if closed == "2>&-":
        assert done.stdout.startswith(b"import os\ndef ")
    else:
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("prefill 14 tokens, ")
        assert " | decode 2 tokens" in line


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """And only the first of them says anything."""
    arguments = ["model=mamba2", "max_new_tokens=40", "temperature=0", "repetition_penalty=1.2"]
    arguments += ["output=json", "device=cpu", f"runs_dir={tmp_path}"]
    ours = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         infer.__file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    one, two = (json.loads(out) for out in (run(*arguments)[0], ours.stdout))
    assert two["tokens"] == one["tokens"]
    assert two["log_probs"] == pytest.approx(one["log_probs"], abs=1e-4)
    assert ours.stderr.count("prefill") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prompt_file=-"], "prompt_file must be a file for several processes, got '-'"),
        (["exact=true"], "torchrun: exact mode needs a single rank, got 3"),
        (["model=mamba2"], "torchrun: num_heads must be a multiple of the number of ranks, got 4"),
    ],
)
def test_what_several_processes_cannot_do(arguments, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run_script("infer", *arguments, "runs_dir=none")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
