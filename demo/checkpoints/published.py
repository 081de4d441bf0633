"""Published checkpoints: their configuration and weights, as a LanguageModel.

Three formats, told apart by their ``config.json``:

- transformers' Mamba-2 (``Mamba2ForCausalLM``), ``"model_type": "mamba2"``;
- the state-spaces one (``MambaLMHeadModel``), ``"ssm_cfg": {"layer": "Mamba2"}``;
- flash-linear-attention's Gated DeltaNet (``GatedDeltaNetForCausalLM``),
  ``"model_type": "gated_deltanet"``.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from demo.checkpoints.files import unreadable
from demo.checkpoints.hub import download
from demo.checkpoints.tokenizer import FILE as TOKENIZER
from demo.checkpoints.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_of
from demo.config.errors import first_line
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.language_model import LanguageModel

# What the state-spaces project's models were trained with, which their folders do not hold.
NEOX, NEOX_TOKENS = "EleutherAI/gpt-neox-20b", 50277

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class Entry(NamedTuple):
    """One tensor of a checkpoint, and the rows of the parameter that it fills."""

    source: str
    target: str
    rows: int | None = None  # None: all of them


def download_published(name: str) -> Path:
    """The local copy of a checkpoint on the Hugging Face hub, ``owner/name``.

    Raises:
        ValueError: where the files, the network or the package that reaches the hub are missing.
    """
    about = ("config.json", "tokenizer.json", "tokenizer_config.json")
    folder = download(name, *about, "*.safetensors", "*.safetensors.index.json")
    if not any((folder / file).exists() for file in WEIGHT_FILES):
        folder = download(name, *about, "pytorch_model.bin")
    return folder


def published_name(folder: str | Path) -> str:
    """What the command line calls the model of a published checkpoint.

    Raises:
        ValueError: for a ``config.json`` that is of another model, or cannot be read.
    """
    config = _read_json(Path(folder) / "config.json")
    return "fla" if _format(config, Path(folder)) == "gated_deltanet" else "mamba2"


def published_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a published checkpoint: its own, or the one that its project names, or bytes
    for a vocabulary of 256.

    Raises:
        ValueError: for a damaged file, and where there is none.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).is_file():
        return tokenizer_of(folder)
    config = _read_json(folder / "config.json")
    if "ssm_cfg" in config and config.get("vocab_size") == NEOX_TOKENS:
        return load_tokenizer(NEOX)
    if config.get("vocab_size") == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise ValueError(
        f"{str(folder)!r} must hold {TOKENIZER}, as its model has a vocabulary of "
        f"{config.get('vocab_size')} and not the 256 bytes, got none; copy the model's there"
    )


def load_published(
    folder: str | Path,
    *,
    norm_path: str = "inference",
) -> LanguageModel:
    """A model with the configuration and weights of a published checkpoint, in fp32 on the CPU.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, a sharded one with its index, or
            the state-spaces project's ``pytorch_model.bin``.
        norm_path: "training" or "inference".
    Raises:
        ValueError: naming the file, option or weight: an unknown format, an option that this
            model does not have, and a weight that is missing, left over or of the wrong shape.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    format_config, entries = FORMATS[_format(config, folder)]
    try:
        config = format_config(config)
        weights = _read_weights(folder)
        if config.num_layers > len(weights):
            raise ValueError(
                f"{folder} must hold weights for each of the {config.num_layers} layers of "
                f"its config.json, got {len(weights)} weights in all; take the config.json of the "
                "checkpoint"
            )
        with torch.device("meta"):  # sizes that no machine could hold need no memory there
            shapes = LanguageModel(config, norm_path=norm_path)
    except KeyError as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks {error.args[0]!r}; take the one of the checkpoint"
        ) from error
    except (TypeError, ArithmeticError, RuntimeError) as error:  # the last two for absurd sizes
        raise ValueError(
            f"{folder / 'config.json'} must have numbers for sizes ({first_line(error)}); take "
            "the one of the checkpoint"
        ) from error
    _fill(shapes, dict(weights), list(entries(shapes)), folder)
    model = LanguageModel(config, norm_path=norm_path)
    _fill(model, weights, list(entries(model)), folder)
    return model


# ---- files ----


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file} cannot be read as JSON ({reason}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, got {type(content).__name__}; download it again"
        )
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if file is None:
        raise ValueError(
            f"{folder} must hold one of {', '.join(WEIGHT_FILES)}, got none of them; download the "
            "weights too"
        )
    if file.suffix == ".bin":
        return _read_pickle(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        parts = _read_json(file).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(v, str) for v in parts.values()):
            raise ValueError(f"{file} must name a file for each weight; download it again")
        names = sorted(set(parts.values()))
        return {key: value for name in names for key, value in load_file(folder / name).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read ({unreadable(error)}); download it again"
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """What torch.save wrote, without running code of it. torch's own reasons are left out: they
    advise to read the file again and run its code."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (PermissionError, IsADirectoryError) as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} must be a pickle of nothing but tensors, and is damaged or holds other "
            "objects, whose code was not run; use a checkpoint in safetensors, or download it again"
        ) from error
    except Exception as error:  # of any kind: it depends on which bytes are wrong
        raise ValueError(f"{file} is cut short or damaged; download it again") from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise ValueError(
            f"{file} must hold tensors by their names, and nothing else; take the weights of the "
            "model alone, not those of its training"
        )
    return weights


def _fill(model: LanguageModel, weights: dict[str, Tensor], entries: list[Entry], folder: Path):
    """Copy every entry into its rows; nothing may be missing, left over or of another shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = dict.fromkeys(parameters, 0)
    with torch.no_grad():
        for source, target, rows in entries:
            parameter = parameters[target]
            start = filled[target]
            part = parameter[start : start + rows] if rows is not None else parameter
            filled[target] += len(part)
            if source not in weights:
                if target == "head.weight" and parameter is model.embedding.weight:
                    continue  # a tied head is usually not stored twice
                raise ValueError(
                    f"{folder} lacks the weight {source}, of shape {list(part.shape)}: its "
                    "config.json does not belong to it, or it is incomplete; download it again"
                )
            value = weights.pop(source)
            if value.dim() == 3 and value.shape[1] == 1:
                value = value[:, 0]  # the weight of a depthwise convolution
            if value.shape != part.shape:
                raise ValueError(
                    f"the weight {source} of {folder} must have shape {list(part.shape)}, got "
                    f"{list(value.shape)}; take the config.json that belongs to it"
                )
            part.copy_(value)
    if weights:
        raise ValueError(
            f"{folder} holds weights that its config.json has no place for: "
            f"{', '.join(sorted(weights)[:5])}{' and more' if len(weights) > 5 else ''}; take the "
            "config.json that belongs to them"
        )
    short = [name for name, rows in filled.items() if rows != len(parameters[name])]
    assert not short, f"parameters without a weight: {short}"


# ---- formats ----


def _format(config: dict, folder: Path) -> str:
    if config.get("model_type") in ("mamba2", "gated_deltanet"):
        return config["model_type"]
    ssm = config.get("ssm_cfg")
    if isinstance(ssm, dict) and ssm.get("layer") == "Mamba2":
        return "state_spaces"
    raise ValueError(
        f"{folder / 'config.json'} must be of a Mamba-2 or Gated DeltaNet model, got "
        f"model_type={config.get('model_type')!r}; name a checkpoint of transformers' Mamba2, of "
        "state-spaces, or of flash-linear-attention"
    )


def _require(config: dict, **allowed: tuple) -> None:
    """Options that the model does not have, unless they have a value that means the same."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"config.json asks for {name}={config[name]!r}, which this model does not have; "
                f"it loads checkpoints with {name} in {list(values)}"
            )


def _limits(value: list) -> tuple[float, float]:
    """A pair of numbers; transformers writes infinity as ``{"__float__": "Infinity"}``."""
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in value)
    return low, high


def _mamba2_config(c: dict) -> ModelConfig:
    _require(c, hidden_act=("silu", "swish"))
    if c["num_heads"] * c["head_dim"] != c.get("expand", 2) * c["hidden_size"]:
        raise ValueError(
            f"config.json must have num_heads * head_dim = expand * hidden_size, got "
            f"{c['num_heads']} * {c['head_dim']} and {c.get('expand', 2)} * {c['hidden_size']}"
        )
    return Mamba2Config(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        tie_embeddings=c.get("tie_word_embeddings", False),
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        d_state=c["state_size"],
        head_dim=c["head_dim"],
        expand=c.get("expand", 2),
        n_groups=c["n_groups"],
        conv_size=c.get("conv_kernel", 4),
        conv_bias=c.get("use_conv_bias", True),
        bias=c.get("use_bias", False),
        dt_limit=_limits(c.get("time_step_limit", [0, float("inf")])),
    )


def _state_spaces_config(c: dict) -> ModelConfig:
    ssm = c["ssm_cfg"]
    _require(c, d_intermediate=(0,), attn_layer_idx=([], None), rms_norm=(True,))
    _require(ssm, rmsnorm=(True,), norm_before_gate=(False,), d_ssm=(None,), D_has_hdim=(False,))
    multiple = c.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        vocab_size=-(-c["vocab_size"] // multiple) * multiple,
        hidden_size=c["d_model"],
        num_layers=c["n_layer"],
        tie_embeddings=c.get("tie_embeddings", True),
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


def _gated_deltanet_config(c: dict) -> ModelConfig:
    _require(
        c,
        attn=(None,),
        use_short_conv=(True,),
        attnres_block_size=(None,),
        hidden_act=("swish", "silu"),
    )
    ratio = c.get("hidden_ratio") or 4
    activation = c.get("output_gate_activation", "swish")
    return GatedDeltaNetConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        mlp_ratio=ratio,
        mlp_size=c.get("intermediate_size"),
        tie_embeddings=c.get("tie_word_embeddings", False),
        norm_eps=c.get("norm_eps", 1e-6),
        num_heads=c["num_heads"],
        head_dim=c["head_dim"],
        expand_v=c.get("expand_v", 2.0),
        num_v_heads=c.get("num_v_heads"),
        conv_size=c.get("conv_size", 4),
        allow_neg_eigval=c.get("allow_neg_eigval", False),
        use_gate=c.get("use_gate", True),
        gate_activation="silu" if activation == "swish" else activation,
    )


def _mamba2_entries(model: LanguageModel, embedding: str) -> Iterator[Entry]:
    yield Entry(f"backbone.{embedding}.weight", "embedding.weight")
    for i, block in enumerate(model.blocks):
        theirs, ours = f"backbone.layers.{i}", f"blocks.{i}"
        yield Entry(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
        for name in ("in_proj.weight", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight"):
            yield Entry(f"{theirs}.mixer.{name}", f"{ours}.mixer.{name}")
        if block.mixer.in_proj.bias is not None:
            yield Entry(f"{theirs}.mixer.in_proj.bias", f"{ours}.mixer.in_proj.bias")
            yield Entry(f"{theirs}.mixer.out_proj.bias", f"{ours}.mixer.out_proj.bias")
        yield Entry(f"{theirs}.mixer.conv1d.weight", f"{ours}.mixer.conv_weight")
        if block.mixer.conv_bias is not None:
            yield Entry(f"{theirs}.mixer.conv1d.bias", f"{ours}.mixer.conv_bias")
    yield Entry("backbone.norm_f.weight", "norm.weight")
    yield Entry("lm_head.weight", "head.weight")


def _gated_deltanet_entries(model: LanguageModel) -> Iterator[Entry]:
    yield Entry("model.embeddings.weight", "embedding.weight")
    for i, block in enumerate(model.blocks):
        theirs, ours, mixer = f"model.layers.{i}", f"blocks.{i}", block.mixer
        key = mixer.num_heads * mixer.head_dim
        value = mixer.num_v_heads * mixer.v_head_dim
        yield Entry(f"{theirs}.attn_norm.weight", f"{ours}.mixer_norm.weight")
        for name, rows in (("q", key), ("k", key), ("v", value)):
            yield Entry(f"{theirs}.attn.{name}_conv1d.weight", f"{ours}.mixer.conv_weight", rows)
        heads = mixer.num_v_heads
        for name, rows in (
            ("q", key),
            ("k", key),
            ("v", value),
            ("g", mixer.widths[1]),
            ("b", heads),
            ("a", heads),
        ):
            if rows:
                yield Entry(
                    f"{theirs}.attn.{name}_proj.weight", f"{ours}.mixer.in_proj.weight", rows
                )
        for name in ("A_log", "dt_bias"):
            yield Entry(f"{theirs}.attn.{name}", f"{ours}.mixer.{name}")
        yield Entry(f"{theirs}.attn.o_norm.weight", f"{ours}.mixer.norm.weight")
        yield Entry(f"{theirs}.attn.o_proj.weight", f"{ours}.mixer.out_proj.weight")
        yield Entry(f"{theirs}.mlp_norm.weight", f"{ours}.mlp_norm.weight")
        inner = block.mlp.out_proj.weight.shape[1]
        for name in ("gate", "up"):
            yield Entry(f"{theirs}.mlp.{name}_proj.weight", f"{ours}.mlp.in_proj.weight", inner)
        yield Entry(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.out_proj.weight")
    yield Entry("model.norm.weight", "norm.weight")
    yield Entry("lm_head.weight", "head.weight")


FORMATS: dict[
    str, tuple[Callable[[dict], ModelConfig], Callable[[LanguageModel], Iterator[Entry]]]
] = {
    "mamba2": (_mamba2_config, lambda model: _mamba2_entries(model, "embeddings")),
    "state_spaces": (_state_spaces_config, lambda model: _mamba2_entries(model, "embedding")),
    "gated_deltanet": (_gated_deltanet_config, _gated_deltanet_entries),
}
