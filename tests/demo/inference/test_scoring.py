"""What a model makes of a prompt itself, against its logits in float64."""

import json
import math

import pytest
import torch

from demo import score
from demo.checkpoints.checkpoint import Loaded
from demo.checkpoints.tokenizer import TextTokenizer
from demo.inference import scoring
from demo.inference.measure import training_log_probs
from demo.inference.printing import print_scores
from small_runs import run, write_checkpoint
from text_sets import TEXTS, byte_level

TEXT = "import os\n\n\ndef f(x, y=1):\n    return caf\u00e9 + \U0001f600\n"


def expected(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None])[0][0, :-1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("piece", [1024, 7, 1], ids=["at once", "in pieces", "one by one"])
def test_each_token_has_its_log_probability(piece, loaded, monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", piece)
    found = score(loaded, TEXT)
    assert found.tokens == list(TEXT.encode())
    assert found.log_probs[0] is None
    assert found.log_probs[1:] == pytest.approx(expected(loaded.model, found.tokens), abs=2e-4)
    assert found.log_prob == pytest.approx(sum(found.log_probs[1:]))
    assert found.bytes == len(TEXT.encode()) - 1
    assert found.bits_per_byte == pytest.approx(-found.log_prob / math.log(2) / found.bytes)
    assert found.prompt == TEXT


@pytest.mark.parametrize("piece", [1024, 7], ids=["at once", "in pieces"])
def test_in_exact_mode_they_are_those_of_the_training_forward(piece, loaded, monkeypatch):
    """To the bit, as those that generation reports are."""
    monkeypatch.setattr(scoring, "PIECE", piece)
    monkeypatch.setattr(loaded.model, "exact", True)
    found = score(loaded, TEXT)
    tokens = torch.tensor(found.tokens)
    want = training_log_probs(loaded.model, tokens[:1], tokens[1:])
    assert torch.equal(torch.tensor(found.log_probs[1:]), want)


@pytest.mark.parametrize("norm_path", ["training", "inference"])
def test_the_model_stays_in_its_mode(norm_path, loaded):
    training = loaded.model.training
    try:
        loaded.model.train()
        assert score(loaded, TEXT).log_prob < 0
        assert loaded.model.training
    finally:
        loaded.model.train(training)


def test_bytes_of_a_tokenizer_are_those_of_the_text(tmp_path):
    tokenizer = TextTokenizer(byte_level(TEXTS))
    model = write_checkpoint(tmp_path / "run", "mamba2", sharp=12, tokenizer=tokenizer)
    found = score(Loaded(model, tokenizer, tmp_path, "mamba2"), TEXT)
    assert len(found.tokens) < len(TEXT.encode())
    assert found.bytes == len(TEXT.encode()) - len(tokenizer.decode(found.tokens[:1]).encode())
    assert found.log_probs[1:] == pytest.approx(expected(model, found.tokens), abs=2e-4)


@pytest.mark.parametrize("prompt", ["", "a"])
def test_a_prompt_of_one_token_has_nothing_to_score(prompt, loaded):
    with pytest.raises(ValueError, match="at least two tokens to be scored, got b'"):
        score(loaded, prompt)


def test_several_are_a_list_and_a_table_and_lines_of_json(loaded, capsys):
    found = score(loaded, ["abc", b"caf\xc3\xa9 \xff"])
    assert [len(s.tokens) for s in found] == [3, 7]
    assert found[1].bytes == 6
    print_scores(found, "text")
    table = capsys.readouterr().out
    print_scores(found, "json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for one, record in zip(found, records, strict=True):
        assert record == one.record()
        assert f"{one.bits_per_byte:.3f}" in table
        assert f"{one.log_prob:,.1f}" in table


def test_the_command_scores_a_file(run_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    arguments = ["model=mamba2", "prompt_file=text.txt", "max_new_tokens=0"]
    code, out, err = run("infer", *arguments)
    assert (code, err) == (0, "checkpoint: runs/a/model.safetensors\n")
    assert "bits per byte" in out
    code, out, _ = run("infer", *arguments, "output=json")
    record = json.loads(out)
    assert len(record["log_probs"]) == len(record["tokens"]) == 3 * len(TEXT.encode())


def test_on_a_terminal_a_long_prompt_shows_progress(loaded, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "PIECE", 8)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    score(loaded, TEXT)
    out, err = capsys.readouterr()
    assert "Scoring" in err
    assert out == ""
    score(loaded, TEXT[:8])
    assert capsys.readouterr().err == ""
