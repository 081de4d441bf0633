"""What is timed: shapes with their options, and those of published models."""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Case:
    """One row of a table: `rows x width` in groups, gate order, strides of z, norm."""

    rows: int
    width: int
    group_size: int | None = None
    norm_before_gate: bool = True
    z_strided: bool = False
    is_rms_norm: bool = True
    bias: bool = False
    activation: str = "silu"

    @property
    def name(self) -> str:
        parts = [f"{self.rows} x {self.width}"]
        if self.group_size:
            parts.append(f"{self.width // self.group_size} groups")
        parts.append("gate after" if self.norm_before_gate else "gate before")
        if self.z_strided:
            parts.append("z strided")
        if not self.is_rms_norm:
            parts.append("layer norm")
        if self.bias:
            parts.append("bias")
        if self.activation != "silu":
            parts.append(self.activation)
        return ", ".join(parts)


class Model(NamedTuple):
    """A published model and its gated norm for one token: a row a head, or one row."""

    name: str
    token: Case

    def case(self, tokens: int) -> Case:
        return replace(self.token, rows=self.token.rows * tokens)


def _mamba2(name: str, width: int, group_size: int | None = None) -> Model:
    """The gate comes first, and is a slice of the block's projection."""
    return Model(name, Case(1, width, group_size, norm_before_gate=False, z_strided=True))


# Heads, widths and groups as in each model's published config.
MODELS = {
    "qwen3-next": Model("Qwen3-Next 80B-A3B", Case(32, 128)),
    "qwen3.5": Model("Qwen3.5 27B", Case(48, 128)),
    "kimi-linear": Model("Kimi Linear 48B-A3B", Case(32, 128, activation="sigmoid")),
    "nemotron-h": _mamba2("Nemotron-H 8B", 8192, 1024),
    "granite-4": _mamba2("Granite 4.0-H-Small", 8192),
    "falcon-h1": _mamba2("Falcon-H1R 7B", 3072),
    "mamba2-2.7b": _mamba2("Mamba2 2.7B", 5120),
}
