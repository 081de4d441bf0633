"""Published checkpoints: transformers writes and runs the Mamba-2 ones, plain torch the others."""

import pytest
import torch
import torch.nn.functional as F

from demo.checkpoints.published import load_published
from models.generation import generate
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

LIMIT = (0.0, 0.05)


@pytest.fixture(scope="module")
def trained():
    return train(mamba2(time_step_limit=(0.0, float("inf"))).train(), 200)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def named_like_theirs(model):
    """Our gradients, by the names of transformers."""
    names = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
    }
    names["head.weight"] = "lm_head.weight"
    for name, parameter in model.named_parameters():
        theirs = names.get(name) or "backbone." + name.replace("blocks", "layers").replace(
            "mixer_norm", "norm"
        ).replace("conv_weight", "conv1d.weight").replace("conv_bias", "conv1d.bias")
        yield theirs, parameter


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
    for name, parameter in named_like_theirs(ours):
        reference = theirs.get_parameter(name).grad
        gradient = parameter.grad.view_as(reference)
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=name)


def test_greedy_continuation_equals_transformers(trained, tmp_path):
    ours = load_published(save(trained, tmp_path))
    prompt = torch.tensor([[5, 3, 7, 6, 2, 1, 0, 4]])
    expected = trained.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    tokens = torch.stack(list(generate(ours, prompt, 40, temperature=0)), dim=1)
    assert len(set(tokens[0].tolist())) > 2  # a trained model's continuation, not one token
    assert torch.equal(tokens, expected[:, 8:])


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


BAD_WEIGHTS = {
    "missing": (
        lambda w: w.pop("model.layers.1.attn.k_proj.weight"),
        "lacks the weight model.layers.1",
    ),
    "left_over": (
        lambda w: w.update({"model.layers.2.attn.A_log": torch.zeros(4)}),
        "no place for: model.layers.2.attn.A_log",
    ),
    "shape": (
        lambda w: w.update({"model.layers.0.attn.v_conv1d.weight": torch.zeros(64, 1, 3)}),
        r"v_conv1d.weight of .* must have shape \[64, 4\], got \[64, 3\]",
    ),
    "head": (lambda w: w.pop("lm_head.weight"), "lacks the weight lm_head.weight"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_weight_that_does_not_fit_is_named(case, tmp_path):
    change, message = BAD_WEIGHTS[case]
    weights = fla_weights()
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_published(write(tmp_path, FLA, weights))


BAD_CONFIGS = {
    "model_type": ({"model_type": "llama"}, "got model_type='llama'"),
    "attention": ({"attn": {"layers": [1]}}, "asks for attn="),
    "no_convolution": ({"use_short_conv": False}, "asks for use_short_conv=False"),
    "activation": ({"hidden_act": "gelu"}, "asks for hidden_act='gelu'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_an_option_that_the_model_lacks_is_named(case, tmp_path):
    change, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        load_published(write(tmp_path, {**FLA, **change}, fla_weights()))


def test_config_without_a_size(tmp_path):
    config = {key: value for key, value in FLA.items() if key != "head_dim"}
    with pytest.raises(ValueError, match="lacks 'head_dim'"):
        load_published(write(tmp_path, config, fla_weights()))


def test_damaged_files(tmp_path):
    write(tmp_path, FLA, fla_weights())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_published(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"must hold one of model\.safetensors"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_published(tmp_path)
