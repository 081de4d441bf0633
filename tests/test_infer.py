"""infer.py: which checkpoint, which text, and what it says when something is wrong."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
from demo import Result, generate, load
from demo.checkpoints.checkpoint import (
    SHIPPED,
    WEIGHTS,
    build_model,
    find_checkpoint,
    save_config,
    save_weights,
)
from demo.checkpoints.tokenizer import TextTokenizer
from demo.config.command import compose
from demo.inference.output import Speeds
from small_runs import run, write_checkpoint
from text_sets import byte_level

PROMPTS = [
    "import ",
    "def f(a, b=1):\n    return '",
    "x = \"${y}\", 'z'  ",
    "{a: [b, c]}, d=e\\",
    "caf\u00e9 \U0001f600 ",
    "null",
    " ",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("way", ["prompt", "prompt_file", "standard input"])
def test_any_prompt_survives(prompt, way, run_folder, monkeypatch, capfd):
    Path("prompt (1).txt").write_bytes(prompt.encode())
    argument = {
        "prompt": f"prompt={prompt}",
        "prompt_file": "prompt_file=prompt (1).txt",
        "standard input": "prompt_file=-",
    }[way]
    arguments = ["model=mamba2", "max_new_tokens=3", argument]
    code, out, err = run(arguments, monkeypatch, capfd, prompt.encode())
    assert code == 0, err
    assert out.startswith(prompt)
    count = len(prompt.encode())
    assert f"prefill {count} token{'s' * (count > 1)}, " in err


LINES = b"import \n\ndef f(x):\n"


def json_lines(arguments, monkeypatch, capfd, stdin=LINES):
    code, out, err = run([*arguments, "output=json"], monkeypatch, capfd, stdin)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()], err


@pytest.mark.parametrize("batch_size", [1, 2])
def test_json_has_a_line_for_each_prompt_equal_to_the_library(
    batch_size, run_folder, monkeypatch, capfd
):
    arguments = ["model=mamba2", "prompts_file=-", "max_new_tokens=9", f"batch_size={batch_size}"]
    lines, err = json_lines(arguments, monkeypatch, capfd)
    assert "2 prompts | prefill 16 tokens, " in err
    results = generate(load(run_folder), ["import ", "def f(x):"], max_new_tokens=9)
    for line, result in zip(lines, results, strict=True):
        assert set(line) == set(result.__dataclass_fields__)
        assert [line["prompt"], line["text"]] == [result.prompt, result.text]
        assert [line["tokens"], line["finish"]] == [result.tokens, "length"]
        assert line["log_probs"] == pytest.approx(result.log_probs, abs=1e-5)
        assert line["prefill_s"] > 0
        assert line["decode_s"] > 0


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_several_texts_come_in_order_each_under_a_header(
    batch_size, run_folder, monkeypatch, capfd
):
    given = [b"import ", b"def ", b"x"]
    arguments = ["model=mamba2", "max_new_tokens=9", f"batch_size={batch_size}"]
    code, out, err = run([*arguments, "prompts_file=-"], monkeypatch, capfd, b"\n".join(given))
    assert code == 0, err
    results = generate(load(run_folder), given, max_new_tokens=9)
    texts = [
        f"==> {number} of 3 <==\n{result.prompt}{result.text}\n"
        for number, result in enumerate(results, 1)
    ]
    assert out == "\n".join(texts)


@pytest.mark.parametrize(
    ("argument", "stop"),
    [
        ("stop=a", ["a"]),
        ("stop=a b, c", ["a b, c"]),
        ("stop=\n\n", ["\n\n"]),
        ('stop=["\\n", "x y"]', ["\n", "x y"]),
        ("stop='def '", ["def "]),
        ("stop=]", ["]"]),
        ("stop=[]", []),
    ],
)
def test_stop_strings_are_taken_as_they_stand_or_as_json(
    argument, stop, run_folder, monkeypatch, capfd
):
    taken = []
    monkeypatch.setattr("demo.inference.output.print_texts", lambda *a: taken.append(a[-1].stop))
    assert run([argument], monkeypatch, capfd)[0] == 0
    assert taken == [stop]


def test_a_model_of_words_counts_tokens(tmp_path, monkeypatch, capfd):
    config = compose("train", ["model=mamba2", "model.hidden_size=32", "model.num_layers=1"])
    tokenizer = TextTokenizer(byte_level(), eos=0)
    config.model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder, config)
    save_weights(folder, build_model(config.model, "training").state_dict())
    tokenizer.save(folder)
    count = len(tokenizer.encode(b"import os"))
    assert count < 9
    arguments = [f"checkpoint={folder}", "prompt=import os", "max_new_tokens=4"]
    (line,), err = json_lines(arguments, monkeypatch, capfd)
    assert f"prefill {count} tokens" in err
    assert line["prompt_tokens"] == count
    assert line["text"] == tokenizer.decode(line["tokens"])


@pytest.mark.parametrize(
    ("argument", "words"), [("compare=true", "differ in a bit"), ("bench=true", "median")]
)
def test_tables(argument, words, run_folder, monkeypatch, capfd):
    arguments = [argument, "model=mamba2", "max_new_tokens=3", "bench_runs=2", "prompt=abc"]
    code, out, err = run(arguments, monkeypatch, capfd)
    assert code == 0, err
    assert words in out
    assert err.count("\n") == 1
    (line,), _ = json_lines(arguments, monkeypatch, capfd)
    assert line


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_both_norm_paths_write_the_same_text_and_say_which_ran(model, tmp_path, monkeypatch, capfd):
    write_checkpoint(tmp_path / "run", model)
    texts = []
    for path in ("inference", "training"):
        arguments = [f"checkpoint={tmp_path / 'run'}", f"norm={path}", "max_new_tokens=40"]
        code, out, err = run([*arguments, "temperature=1.5"], monkeypatch, capfd)
        assert code == 0, err
        assert f"norm path: {path}" in err
        texts.append(out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_without_a_run_the_shipped_checkpoint_is_taken_and_it_is_small(
    model, tmp_path, monkeypatch, capfd
):
    assert find_checkpoint(model, None, str(tmp_path)) == SHIPPED / model
    assert (SHIPPED / model / WEIGHTS).stat().st_size <= 4e6
    monkeypatch.chdir(tmp_path)
    arguments = [f"model={model}", "prompt='import '", "max_new_tokens=60", "temperature=0"]
    code, out, err = run(arguments, monkeypatch, capfd)
    assert code == 0, err
    assert str(SHIPPED / model) in err
    assert "\n" in out


@pytest.mark.parametrize("model", ["fla", "mamba2"])
def test_what_ships_goes_on_with_more_than_blanks(model):
    """By default: greedily, or with top_p=0.95, some of these end in nothing but spaces."""
    prompts = ["import ", "class A:", "class A:\n", "def f(x):\n", "    ", " ", "# ", "x", "("]
    results = generate(load(SHIPPED / model), prompts, batch_size=9, max_new_tokens=160)
    assert [r.prompt for r in results if len(r.text.split()) < 3] == []
    assert [r.prompt for r in results if not r.text[-60:].strip()] == []


def test_a_gpu_that_is_not_there_is_one_line(run_folder, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, out, err = run(["device=cuda"], monkeypatch, capfd)
    says = "device must be one that this machine has, got cuda; use device=cpu"
    assert (out, err) == ("", f"infer.py: error: {says}\n")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("argument", ["output=text", "output=json", "bench=true"])
def test_an_output_that_takes_no_more_is_one_line(argument, run_folder):
    command = [sys.executable, infer.__file__, "model=mamba2", "max_new_tokens=3"]
    with FULL.open("wb") as full:
        done = subprocess.run([*command, argument], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("infer.py: error: standard output must take the text, got an error (No ")


@pytest.mark.parametrize(("count", "says"), [(1, "1 token"), (2, "2 tokens"), (12345, "12,345 t")])
def test_speeds_are_written_as_one_speaks(count, says):
    speeds = Speeds()
    tokens = [0] * count
    speeds.add([Result("", tokens=tokens, prompt_tokens=count, prefill_s=1, decode_s=1)])
    assert str(speeds).startswith(f"prefill {says}")
    assert f" | decode {says}" in str(speeds)
    assert "1 tokens" not in str(speeds).replace("1 tokens/s", "")


def test_a_reader_that_leaves_is_no_error(run_folder):
    command = [sys.executable, infer.__file__, "model=mamba2", "max_new_tokens=4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(7) == b"import "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("closed", "other", "says"),
    [("1", "stderr", b"decode 2 tokens"), ("2", "stdout", b"import ")],
    ids=["stdout", "stderr"],
)
def test_a_stream_that_the_shell_closed_is_no_error(closed, other, says, run_folder):
    command = [sys.executable, infer.__file__, "model=mamba2", "max_new_tokens=2"]
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}>&-', *command]
    done = subprocess.run(shell, capture_output=True, check=True)
    assert says in getattr(done, other)
    assert b"Traceback" not in done.stderr


def test_the_command_streams_text_and_prints_speeds(run_folder):
    script = Path(infer.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "model=mamba2", "prompt_file=-", "max_new_tokens=5"],
        input=b"import os\ndef ",
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"import os\ndef ")
    assert b"decode 5 tokens" in done.stderr
    assert done.stderr.strip().count(b"\n") == 0
