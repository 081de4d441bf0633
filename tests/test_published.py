"""Published checkpoints: transformers writes and runs the Mamba-2 ones, plain torch the others."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from models.checkpoints.published import FORMATS, load_published
from models.generation import generate
from models.language_model import LanguageModel

LIMIT = (0.0, 0.05)


def mamba2(tie=False, vocab_size=64, **options):
    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=8,
        head_dim=8,
        vocab_size=vocab_size,
        hidden_size=32,
        state_size=16,
        num_hidden_layers=2,
        n_groups=2,
        chunk_size=32,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
                parameter.uniform_(0.5, 1.5)
    return model


def train(model, steps, parameters_of=None):
    """AdamW on a language with structure: each token follows from the last two."""
    generator = torch.Generator().manual_seed(0)
    trained = model if parameters_of is None else parameters_of
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = torch.randint(0, 64, (4, 48), generator=generator)
        for t in range(2, 48):
            tokens[:, t] = (3 * tokens[:, t - 1] + tokens[:, t - 2] + 1) % 8
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained.eval()


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


def write_state_spaces(folder, vocab_size=59, file="model.safetensors"):
    """Random weights under the names, the config and the padded vocabulary of state-spaces, and
    the same model of transformers."""
    theirs = mamba2(tie=True, vocab_size=-(-vocab_size // 16) * 16)
    weights = {
        name.replace("embeddings", "embedding"): value.clone()
        for name, value in theirs.state_dict().items()
    }
    weights["lm_head.weight"] = weights["backbone.embedding.weight"].clone()
    config = {
        "d_model": 32,
        "n_layer": 2,
        "d_intermediate": 0,
        "vocab_size": vocab_size,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 8, "ngroups": 2},
        "attn_layer_idx": [],
        "rms_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if file == "pytorch_model.bin":
        torch.save(weights, folder / file)
    elif file == "sharded":
        shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
        for shard in set(shards.values()):
            part = {name: weights[name] for name in weights if shards[name] == shard}
            save_file(part, folder / shard)
        index = {"weight_map": shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / file)
    return theirs


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
def test_state_spaces_layout(file, tmp_path):
    theirs = write_state_spaces(tmp_path, file=file)
    ours = load_published(tmp_path)
    tokens = torch.randint(0, 59, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens)[0], theirs(input_ids=tokens).logits, rtol=0, atol=1e-4
        )


FLA = {
    "model_type": "gated_deltanet",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_dim": 8,
    "expand_v": 2.0,
    "conv_size": 4,
    "hidden_ratio": 4,
    "intermediate_size": 40,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "vocab_size": 50,
    "tie_word_embeddings": False,
    "allow_neg_eigval": True,
    "attn": None,
    "use_gate": True,
    "use_short_conv": True,
    "fuse_norm": True,
}


def fla_weights(c=FLA):
    """Random weights with flash-linear-attention's names and shapes."""
    torch.manual_seed(0)
    d, heads = c["hidden_size"], c["num_v_heads"]
    key = c["num_heads"] * c["head_dim"]
    width = int(c["head_dim"] * c["expand_v"])
    value = heads * width
    shapes = {
        "model.embeddings.weight": (c["vocab_size"], d),
        "lm_head.weight": (c["vocab_size"], d),
    }
    shapes["model.norm.weight"] = (d,)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        rows = {"q": key, "k": key, "v": value, "g": value, "a": heads, "b": heads}
        shapes |= {f"{p}attn.{name}_proj.weight": (n, d) for name, n in rows.items()}
        shapes |= {f"{p}attn.{name}_conv1d.weight": (rows[name], 1, 4) for name in "qkv"}
        shapes |= {f"{p}attn.A_log": (heads,), f"{p}attn.dt_bias": (heads,)}
        shapes |= {f"{p}attn.o_norm.weight": (width,), f"{p}attn.o_proj.weight": (d, value)}
        shapes |= {f"{p}attn_norm.weight": (d,), f"{p}mlp_norm.weight": (d,)}
        inner = c["intermediate_size"]
        shapes |= {f"{p}mlp.gate_proj.weight": (inner, d), f"{p}mlp.up_proj.weight": (inner, d)}
        shapes[f"{p}mlp.down_proj.weight"] = (d, inner)
    return {name: 0.3 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}


def fla_forward(w, tokens, c=FLA):
    """flash-linear-attention's GatedDeltaNetForCausalLM in plain torch, weight by weight."""

    def rms(x, weight):
        return F.rms_norm(x, weight.shape, weight, c["norm_eps"])

    x = w["model.embeddings.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "attn_norm.weight"])
        qkv = []
        for name in "qkv":
            y = F.linear(h, w[f"{p}attn.{name}_proj.weight"]).mT
            kernel = w[f"{p}attn.{name}_conv1d.weight"]
            y = F.silu(F.conv1d(F.pad(y, (3, 0)), kernel, groups=len(kernel))).mT
            heads = c["num_v_heads"] if name == "v" else c["num_heads"]
            qkv.append(y.unflatten(-1, (heads, -1)))
        a = F.linear(h, w[f"{p}attn.a_proj.weight"]) + w[f"{p}attn.dt_bias"]
        g = -w[f"{p}attn.A_log"].exp() * F.softplus(a)
        beta = torch.sigmoid(F.linear(h, w[f"{p}attn.b_proj.weight"]))
        beta = 2 * beta if c["allow_neg_eigval"] else beta
        o, _ = torch_recurrent_gated_delta_rule(*qkv, g, beta, use_qk_l2norm_in_kernel=True)
        gate = F.linear(h, w[f"{p}attn.g_proj.weight"]).unflatten(-1, (c["num_v_heads"], -1))
        act = torch.sigmoid if c.get("output_gate_activation") == "sigmoid" else F.silu
        o = rms(o, w[f"{p}attn.o_norm.weight"]) * act(gate)
        x = x + F.linear(o.flatten(2), w[f"{p}attn.o_proj.weight"])
        h = rms(x, w[p + "mlp_norm.weight"])
        up = F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"])) * F.linear(
            h, w[p + "mlp.up_proj.weight"]
        )
        x = x + F.linear(up, w[p + "mlp.down_proj.weight"])
    return F.linear(rms(x, w["model.norm.weight"]), w["lm_head.weight"])


def write(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def fla_train(steps, c=FLA):
    """A model of ours that learned the language of `train`, as weights with FLA's names."""
    return train_weights(
        lambda model: train(lambda input_ids, labels: _loss(model, input_ids), steps, model), c
    )


def train_weights(learn, c=FLA):
    """What `learn` makes of a new model of ours, as weights with FLA's names."""
    torch.manual_seed(0)
    arguments, entries = FORMATS["gated_deltanet"]
    model = LanguageModel(**arguments(c))
    learn(model)
    filled, weights = {}, {}
    for source, target, rows in entries(model):
        parameter = model.get_parameter(target).detach()
        start = filled.get(target, 0)
        filled[target] = start + (len(parameter) if rows is None else rows)
        value = parameter[start : filled[target]].clone()
        weights[source] = value[:, None] if "conv1d" in source else value
    return weights


def _loss(model, tokens):
    logits = model(tokens)[0][:, 1:-1]
    return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()))


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
