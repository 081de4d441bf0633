"""Published checkpoints: transformers writes and runs the Mamba-2 ones, plain torch the others."""

import copy

import pytest
import torch
import torch.nn.functional as F

from demo.checkpoints.published import MAMBA2, published_config, published_weights
from demo.checkpoints.tokenizer import TextTokenizer
from models.generation import generate
from models.language_model import LanguageModel
from published_models import (
    FLA,
    fla_forward,
    fla_train,
    fla_weights,
    mamba2,
    train,
    write,
    write_state_spaces,
)
from small_runs import run
from text_sets import byte_level

LIMIT = (0.0, 0.05)


def load_published(folder, norm_path="inference"):
    """Without its tokenizer, which these folders lack."""
    config = published_config(folder)
    model = LanguageModel(config, norm_path=norm_path)
    model.load_state_dict(published_weights(folder, config), strict=not config.tie_embeddings)
    return model


@pytest.fixture(scope="module")
def trained():
    return train(mamba2(time_step_limit=(0.0, float("inf"))).train(), 200)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", ["random", "random-limit", "random-tied", "trained200"])
def test_mamba2_equals_transformers(weights, trained, tmp_path):
    """Logits, loss and the gradient of every parameter, from the checkpoint on disk, in fp32."""
    theirs = trained
    if weights != "trained200":
        limit = LIMIT if weights == "random-limit" else (0.0, float("inf"))
        theirs = mamba2(tie=weights == "random-tied", time_step_limit=limit)
    ours = load_published(save(theirs, tmp_path), norm_path="training")
    tokens = torch.randint(0, 64, (2, 75))
    expected = theirs(input_ids=tokens, labels=tokens)
    logits, _ = ours(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-4)
    theirs.zero_grad()
    expected.loss.backward()
    loss.backward()
    names = MAMBA2.names(ours)
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(names[name]).grad
        gradient = parameter.grad.view_as(reference)
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=name)


def test_infer_goes_on_as_transformers_generate(trained, tmp_path):
    """Greedily, with the tokenizer of the folder, whose vocabulary the model's is larger than."""
    tokenizer = TextTokenizer(byte_level())
    theirs = copy.deepcopy(trained)
    theirs.resize_token_embeddings(tokenizer.vocab_size + 5)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    prompt = torch.tensor([tokenizer.encode(b"!##%#")])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": tokenizer.eos}
    (text,) = theirs.generate(prompt, **options)
    assert len(set(text[5:].tolist())) > 2  # a trained model's continuation, not one token
    arguments = [f"checkpoint={tmp_path}", "prompt=!##%#", "temperature=0", "max_new_tokens=40"]
    code, out, err = run("infer", "model=mamba2", *arguments)
    assert code == 0, err
    assert out == tokenizer.decode(text.tolist()) + "\n"


def test_decoding_keeps_the_step_limit(tmp_path):
    """Steps equal the full forward with a limit, which transformers' cached decoding leaves out."""
    theirs = mamba2(time_step_limit=LIMIT)
    ours = load_published(save(theirs, tmp_path))
    tokens = torch.randint(0, 64, (1, 30))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        logits, state = ours(tokens[:, :10], output_state=True)
        pieces = [logits]
        for t in range(10, 30):
            logits, state = ours(tokens[:, t : t + 1], state, output_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_state_spaces_layout(file, tmp_path):
    theirs = write_state_spaces(tmp_path, file=file)
    ours = load_published(tmp_path)
    tokens = torch.randint(0, 59, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens)[0], theirs(input_ids=tokens).logits, rtol=0, atol=1e-4
        )


FLA_CASES = {
    "random-neg_eigval": (FLA, 0),
    "random-sigmoid": ({**FLA, "output_gate_activation": "sigmoid"}, 0),
    "trained200": ({**FLA, "vocab_size": 64, "allow_neg_eigval": False}, 200),
}


@pytest.mark.parametrize("case", FLA_CASES)
def test_gated_deltanet_in_the_layout_of_fla(case, tmp_path):
    """Logits and greedy text, against FLA's model in plain torch from the same tensors."""
    config, steps = FLA_CASES[case]
    weights = fla_train(steps, config) if steps else fla_weights(config)
    ours = load_published(write(tmp_path, config, weights))
    tokens = torch.randint(0, 50, (2, 45))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens)[0], fla_forward(weights, tokens, config), rtol=1e-4, atol=1e-4
        )
        text = tokens = torch.tensor([[5, 3, 7, 6, 2, 1, 0, 4]])
        for _ in range(12):
            logits = fla_forward(weights, text, config)
            text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
    continuation = torch.stack(list(generate(ours, tokens, 12, temperature=0)), dim=1)
    assert torch.equal(continuation, text[:, 8:])


def test_mlp_size_follows_flas_rule(tmp_path):
    config = {**FLA, "intermediate_size": None, "hidden_ratio": 4}
    weights = fla_weights({**FLA, "intermediate_size": 256})
    assert (
        load_published(write(tmp_path, config, weights)).blocks[0].mlp.out_proj.in_features == 256
    )
