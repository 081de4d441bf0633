"""infer.py on checkpoints that other projects' code wrote, for models that were trained first."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
from demo.checkpoints.tokenizer import ByteTokenizer, TextTokenizer
from published_models import FLA, fla_forward, mamba2, train_weights, write
from text_sets import byte_level

TEXT = b"""import os
import sys


def read(path):
    with open(path) as file:
        return file.read()


def main(argv):
    for path in argv[1:]:
        sys.stdout.write(read(path))
"""
PROMPT = "def main("
NEW = 60


def learn(parameters, logits_of, tokens, steps=250):
    """AdamW on random windows of the text."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    tokens = torch.tensor(tokens)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 48, (4,), generator=generator)
        batch = torch.stack([tokens[start : start + 48] for start in starts])
        logits = logits_of(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0  # nearly by heart
    return loss


def command(model, folder):
    """What `python infer.py` prints, the prompt included."""
    arguments = [f"model={model}", f"checkpoint={folder}", f"prompt='{PROMPT}'", "temperature=0"]
    script = Path(infer.__file__)
    done = subprocess.run(
        [sys.executable, str(script), *arguments, f"max_new_tokens={NEW}"],
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize("tokens", ["bytes", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_mamba2_of_transformers_goes_on_as_its_own_generate(tokens, tmp_path):
    tokenizer = ByteTokenizer() if tokens == "bytes" else TextTokenizer(byte_level())
    unlimited = (0.0, float("inf"))
    model = mamba2(vocab_size=tokenizer.vocab_size, time_step_limit=unlimited).train()
    learn(
        model.parameters(), lambda batch: model(input_ids=batch).logits, tokenizer.encode(TEXT * 4)
    )
    model.eval().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    prompt = torch.tensor([tokenizer.encode(PROMPT.encode())])
    expected = model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    text = tokenizer.decode(expected[0].tolist())
    assert len(set(text)) > 8
    assert command("mamba2", tmp_path) == text + "\n"


@pytest.mark.slow
def test_gated_deltanet_in_flas_layout_goes_on_as_its_formula(tmp_path):
    """No package needed: the truth is the restatement in plain torch of test_published.py."""
    config = {**FLA, "vocab_size": 256, "allow_neg_eigval": False}
    tokenizer = ByteTokenizer()

    def learn_text(model):
        learn(model.parameters(), lambda batch: model(batch)[0], tokenizer.encode(TEXT * 4))

    weights = train_weights(learn_text, config)
    write(tmp_path, config, weights)
    text = tokens = torch.tensor([tokenizer.encode(PROMPT.encode())])
    with torch.no_grad():
        for _ in range(NEW):
            logits = fla_forward(weights, text, config)
            text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
    assert len(set(text[0, tokens.shape[1] :].tolist())) > 8
    assert command("fla", tmp_path) == tokenizer.decode(text[0].tolist()) + "\n"
