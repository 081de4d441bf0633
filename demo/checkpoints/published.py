"""Published checkpoints: their configuration and weights, as those of a LanguageModel.

Three formats, told apart by their `config.json`:

- transformers' Mamba-2 (`Mamba2ForCausalLM`), `"model_type": "mamba2"`;
- the state-spaces project's (`MambaLMHeadModel`), `"ssm_cfg": {"layer": "Mamba2"}`;
- flash-linear-attention's Gated DeltaNet (`GatedDeltaNetForCausalLM`),
  `"model_type": "gated_deltanet"`.

Every function raises ValueError, which names the file, the option or the weight that is wrong.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from demo.checkpoints.hub import download
from demo.checkpoints.tokenizer import (
    OPTIONS,
    TOKENIZER,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_of,
)
from demo.checkpoints.weights import model_on_meta, read_pickle, read_safetensors
from demo.config.errors import first_line
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.language_model import LanguageModel

PUBLISHED_CONFIG = "config.json"
WHOLE, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# What the state-spaces project's models were trained with, which their folders do not hold.
NEOX, NEOX_TOKENS = "EleutherAI/gpt-neox-20b", 50277

# By our name of a parameter: the name of the same tensor in a checkpoint, or the names of several
# that are stacked, with the rows of each.
Names = dict[str, str | dict[str, int]]


class Format(NamedTuple):
    """How one project lays out its checkpoints."""

    config: Callable[[dict], ModelConfig]  # of the content of a config.json
    names: Callable[[LanguageModel], Names]


def download_published(name: str) -> Path:
    """The local copy of a checkpoint on the Hugging Face hub, `owner/name`."""
    about = (PUBLISHED_CONFIG, TOKENIZER, OPTIONS)
    folder = download(name, *about, "*.safetensors", f"*.{INDEX.partition('.')[2]}")
    if not (folder / WHOLE).exists() and not (folder / INDEX).exists():
        folder = download(name, *about, PICKLE)
    return folder


def published_config(folder: Path) -> ModelConfig:
    """The config of the model in a folder with a `config.json`."""
    values = _read_json(folder / PUBLISHED_CONFIG)
    try:
        return _format(values).config(values)
    except KeyError as error:
        reason = f"{error.args[0]!r} is missing"
    except (TypeError, ArithmeticError):
        reason = "its sizes must be numbers that can be computed with"
    except ValueError as error:
        raise ValueError(f"{folder / PUBLISHED_CONFIG}: {error}") from error
    raise ValueError(f"{folder / PUBLISHED_CONFIG}: {reason}; take the one of the checkpoint")


def published_tokenizer(folder: Path) -> Tokenizer:
    """The folder's own tokenizer, or the one that its project names, or bytes for a vocabulary of
    256."""
    if (folder / TOKENIZER).is_file():
        return tokenizer_of(folder)
    values = _read_json(folder / PUBLISHED_CONFIG)
    vocab_size = values.get("vocab_size")
    if "ssm_cfg" in values and vocab_size == NEOX_TOKENS:
        return load_tokenizer(NEOX)
    if vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise ValueError(
        f"{str(folder)!r} must hold {TOKENIZER}, as its model has a vocabulary of {vocab_size} and "
        "not the 256 bytes, got none; copy the model's there"
    )


def published_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a LanguageModel of `config`, by its names; a tied head is left out.

    Args:
        folder: With `model.safetensors`, several such files and their index, or
            `pytorch_model.bin`.
        config: What `published_config` makes of the folder.
    """
    weights = _read_weights(folder)
    try:
        model = model_on_meta(config, len(weights))
    except ValueError as error:
        raise ValueError(
            f"{folder / PUBLISHED_CONFIG}: {error}; take the one of the checkpoint"
        ) from error
    names = _format(_read_json(folder / PUBLISHED_CONFIG)).names(model)
    converted = {}
    for ours, parameter in model.named_parameters():
        parts, theirs = [], names[ours]
        for name, rows in ({theirs: len(parameter)} if isinstance(theirs, str) else theirs).items():
            value = weights.pop(name, None)
            if value is not None and value.dim() == 3 and value.shape[1] == 1:
                value = value[:, 0]  # of a depthwise convolution
            shape = [rows, *parameter.shape[1:]]
            if value is None or list(value.shape) != shape:
                given = "none" if value is None else list(value.shape)
                raise ValueError(
                    f"{folder} must hold the weight {name} of shape {shape}, got {given}; take the "
                    "config.json that belongs to it, or download it again"
                )
            parts.append(value)
        converted[ours] = torch.cat(parts)
    if config.tie_embeddings:
        weights.pop(names["head.weight"], None)  # some store it a second time
    if weights:
        left = f"{', '.join(sorted(weights)[:5])}{' and more' if len(weights) > 5 else ''}"
        raise ValueError(
            f"{folder} holds weights that its config.json has no place for: {left}; take the "
            "config.json that belongs to them"
        )
    return converted


# ---- files ----


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read as JSON ({first_line(error)}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, got {type(content).__name__}; download it again"
        )
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WHOLE).exists():
        return read_safetensors(folder / WHOLE)[0]
    if (folder / INDEX).exists():
        files = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
            raise ValueError(f"{folder / INDEX} must name the file of each weight; get it again")
        return {
            name: value
            for file in sorted(set(files.values()))
            for name, value in read_safetensors(folder / file)[0].items()
        }
    if (folder / PICKLE).exists():
        return read_pickle(folder / PICKLE)
    raise ValueError(
        f"{folder} must hold one of {WHOLE}, {INDEX} or {PICKLE}, got none of them; download the "
        "weights too"
    )


# ---- formats ----


def _format(values: dict[str, Any]) -> Format:
    kind, ssm = values.get("model_type"), values.get("ssm_cfg")
    if isinstance(ssm, dict) and ssm.get("layer") == "Mamba2":
        return STATE_SPACES
    if kind not in ("mamba2", "gated_deltanet"):
        raise ValueError(
            f"model_type must be mamba2 or gated_deltanet, got {kind!r}; name a checkpoint of "
            "transformers' Mamba2, of state-spaces, or of flash-linear-attention"
        )
    return MAMBA2 if kind == "mamba2" else GATED_DELTANET


def _require(values: dict, **allowed: tuple) -> None:
    """Refuse options that our models do not have, unless their value means the same as without."""
    for name, choices in allowed.items():
        if name in values and values[name] not in choices:
            raise ValueError(
                f"{name} must be one of {list(choices)}, got {values[name]!r}, which this model "
                "does not have; name another checkpoint"
            )


def _limits(value: list) -> tuple[float, float]:
    """A pair of numbers; transformers writes infinity as `{"__float__": "Infinity"}`."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"the limits of the step must be two numbers, got {value!r}")
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in value)
    return low, high


def _mamba2_config(values: dict) -> ModelConfig:
    _require(values, hidden_act=("silu", "swish"))
    config = Mamba2Config(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        d_state=values["state_size"],
        head_dim=values["head_dim"],
        expand=values.get("expand", 2),
        n_groups=values["n_groups"],
        conv_size=values.get("conv_kernel", 4),
        conv_bias=values.get("use_conv_bias", True),
        bias=values.get("use_bias", False),
        dt_limit=_limits(values.get("time_step_limit", [0, float("inf")])),
    )
    heads, inner = values["num_heads"], config.expand * config.hidden_size
    if heads * config.head_dim != inner:
        raise ValueError(
            f"num_heads * head_dim must be expand * hidden_size, got {heads} * {config.head_dim} "
            f"and {config.expand} * {config.hidden_size}; take the one of the checkpoint"
        )
    return config


def _state_spaces_config(values: dict) -> ModelConfig:
    ssm = values["ssm_cfg"]
    _require(values, d_intermediate=(0,), attn_layer_idx=([], None), rms_norm=(True,))
    _require(ssm, rmsnorm=(True,), norm_before_gate=(False,), d_ssm=(None,), D_has_hdim=(False,))
    multiple = values.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        vocab_size=-(-values["vocab_size"] // multiple) * multiple,
        hidden_size=values["d_model"],
        num_layers=values["n_layer"],
        tie_embeddings=values.get("tie_embeddings", True),
        norm_eps=1e-5,
        d_state=ssm.get("d_state", 128),
        head_dim=ssm.get("headdim", 64),
        expand=ssm.get("expand", 2),
        n_groups=ssm.get("ngroups", 1),
        conv_size=ssm.get("d_conv", 4),
        conv_bias=ssm.get("conv_bias", True),
        bias=ssm.get("bias", False),
        dt_limit=_limits(ssm.get("dt_limit", [0, float("inf")])),
    )


def _gated_deltanet_config(values: dict) -> ModelConfig:
    _require(
        values,
        attn=(None,),
        use_short_conv=(True,),
        attnres_block_size=(None,),
        hidden_act=("swish", "silu"),
    )
    activation = values.get("output_gate_activation", "swish")
    return GatedDeltaNetConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        mlp_ratio=values.get("hidden_ratio") or 4,
        mlp_size=values.get("intermediate_size"),
        tie_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("norm_eps", 1e-6),
        num_heads=values["num_heads"],
        head_dim=values["head_dim"],
        expand_v=values.get("expand_v", 2.0),
        num_v_heads=values.get("num_v_heads"),
        conv_size=values.get("conv_size", 4),
        allow_neg_eigval=values.get("allow_neg_eigval", False),
        use_gate=values.get("use_gate", True),
        gate_activation="silu" if activation == "swish" else activation,
    )


def _mamba2_names(model: LanguageModel, embedding: str) -> Names:
    names: Names = {
        "embedding.weight": f"backbone.{embedding}.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"backbone.layers.{i}"
        names[f"{ours}.mixer_norm.weight"] = f"{theirs}.norm.weight"
        for name in ("dt_bias", "A_log", "D", "norm.weight"):
            names[f"{ours}.mixer.{name}"] = f"{theirs}.mixer.{name}"
        for kind in ("weight", "bias"):
            names[f"{ours}.mixer.in_proj.{kind}"] = f"{theirs}.mixer.in_proj.{kind}"
            names[f"{ours}.mixer.out_proj.{kind}"] = f"{theirs}.mixer.out_proj.{kind}"
            names[f"{ours}.mixer.conv_{kind}"] = f"{theirs}.mixer.conv1d.{kind}"
    return names


def _gated_deltanet_names(model: LanguageModel) -> Names:
    names: Names = {
        "embedding.weight": "model.embeddings.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    for i, block in enumerate(model.blocks):
        ours, theirs, mixer = f"blocks.{i}", f"model.layers.{i}", block.mixer
        key, value = mixer.num_heads * mixer.head_dim, mixer.num_v_heads * mixer.v_head_dim
        convolved = {"q": key, "k": key, "v": value}
        gate = {"g": value} if model.config.use_gate else {}
        projected = {**convolved, **gate, "b": mixer.num_v_heads, "a": mixer.num_v_heads}
        inner = block.mlp.out_proj.in_features
        names |= {
            f"{ours}.mixer_norm.weight": f"{theirs}.attn_norm.weight",
            f"{ours}.mixer.in_proj.weight": {
                f"{theirs}.attn.{name}_proj.weight": rows for name, rows in projected.items()
            },
            f"{ours}.mixer.conv_weight": {
                f"{theirs}.attn.{name}_conv1d.weight": rows for name, rows in convolved.items()
            },
            f"{ours}.mixer.A_log": f"{theirs}.attn.A_log",
            f"{ours}.mixer.dt_bias": f"{theirs}.attn.dt_bias",
            f"{ours}.mixer.norm.weight": f"{theirs}.attn.o_norm.weight",
            f"{ours}.mixer.out_proj.weight": f"{theirs}.attn.o_proj.weight",
            f"{ours}.mlp_norm.weight": f"{theirs}.mlp_norm.weight",
            f"{ours}.mlp.in_proj.weight": {
                f"{theirs}.mlp.{name}_proj.weight": inner for name in ("gate", "up")
            },
            f"{ours}.mlp.out_proj.weight": f"{theirs}.mlp.down_proj.weight",
        }
    return names


MAMBA2 = Format(_mamba2_config, lambda model: _mamba2_names(model, "embeddings"))
STATE_SPACES = Format(_state_spaces_config, lambda model: _mamba2_names(model, "embedding"))
GATED_DELTANET = Format(_gated_deltanet_config, _gated_deltanet_names)
