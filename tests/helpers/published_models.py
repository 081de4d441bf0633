"""Models as other projects publish them. transformers writes and runs the Mamba-2 ones; the
layouts of state-spaces and flash-linear-attention are written here; plain torch runs the latter.
"""

import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from demo.checkpoints.published import GATED_DELTANET
from models.language_model import LanguageModel


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
    model = LanguageModel(GATED_DELTANET.config(c))
    learn(model)
    weights, names = {}, GATED_DELTANET.names(model)
    for ours, parameter in model.named_parameters():
        theirs = names[ours]
        rows = {theirs: len(parameter)} if isinstance(theirs, str) else theirs
        parts = parameter.detach().split(list(rows.values()))
        for name, part in zip(rows, parts, strict=True):
            weights[name] = (part[:, None] if "conv1d" in name else part).clone()
    return weights


def _loss(model, tokens):
    logits = model(tokens)[0][:, 1:-1]
    return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()))
