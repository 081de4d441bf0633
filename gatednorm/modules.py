"""The modules: parameters, and one call of a function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .distributed import name_of, process_group_of, share
from .functional import NORM_PATHS, layernorm_fn, rms_norm_gated
from .options import channels_in_group, make_options, one_of


def _noting(name: str) -> Any:
    def register(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooked = True
        return getattr(super(NotesHooks, self), name)(*args, **kwargs)

    return register


class NotesHooks(nn.Module):
    """A module that knows whether others may read its parameters instead of calling it.

    It notes that a hook was registered, since what `nn.Module` keeps of hooks is not public. One
    that was removed again counts too: its module goes on being called, which is only slower. A
    class with a `forward` of its own that does nothing but what its base's parameters say names
    it as `PLAIN_FORWARD`.
    """

    hooked = False
    PLAIN_FORWARD: Callable[..., Tensor] | None = None

    def is_plain(self) -> bool:
        """Whether a call does what `PLAIN_FORWARD` does and nothing else."""
        cls = type(self)
        own = cls.forward is cls.PLAIN_FORWARD and "forward" not in self.__dict__
        return own and not self.hooked

    register_forward_pre_hook = _noting("register_forward_pre_hook")
    register_forward_hook = _noting("register_forward_hook")
    register_full_backward_pre_hook = _noting("register_full_backward_pre_hook")
    register_full_backward_hook = _noting("register_full_backward_hook")
    register_backward_hook = _noting("register_backward_hook")


class LayerNorm(NotesHooks):
    """Gated layer norm over the last dimension; `y = (norm(x) * w + b) * act(z)` or gate before.

    Args:
        hidden_size: `D`, the channels of the last dimension.
        eps: added to the variance inside the root.
        group_size: channels in a norm group, a divisor of `hidden_size`; None for one group.
        norm_before_gate: the gate after the norm (True) or before it (False).
        activation: `silu` (alias `swish`) or `sigmoid`.
        zero_centered: the weight is stored around 0 and used as `1 + weight`.
        numerics: rounding points, see :func:`gatednorm.layernorm_fn`.
        process_group: of ranks that have `hidden_size` channels of each row each, as in
            :func:`gatednorm.layernorm_fn`; `group_size` counts channels of the whole row.
        path: `training` (autograd) or `inference` (:func:`gatednorm.rms_norm_gated`, which refuses
            to cut a graph); may be changed at any time.

    Raises:
        ValueError, TypeError: sizes or names that do not fit, before any parameter is made.
    """

    is_rms_norm = False
    weight: nn.Parameter
    bias: nn.Parameter | None
    # The name alone, and the ranks: a module is copied and saved, a process group cannot be.
    _process_group: str | None = None
    _ranks: list[int] | None = None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
        zero_centered: bool = False,
        numerics: str = "fp32",
        path: str = "training",
        process_group: "dist.ProcessGroup | None" = None,
    ):
        super().__init__()
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool):
            raise TypeError(f"hidden_size must be an int, got {hidden_size!r}; use for example 128")
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}; use a larger one")
        if process_group is not None:
            self._process_group = name_of(process_group)
            self._ranks = dist.get_process_group_ranks(process_group)
        options = make_options(
            eps, group_size, norm_before_gate, self.is_rms_norm, activation, zero_centered,
            numerics, None, self._process_group,
        )  # fmt: skip
        if self._process_group is None:
            channels_in_group(group_size, hidden_size, "hidden_size", "hidden_size")
        else:
            share(options, hidden_size)
        self.hidden_size = hidden_size
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.activation = activation
        self.zero_centered = zero_centered
        self.numerics = numerics
        self.path = path
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            None
            if self.is_rms_norm
            else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)),
        )
        self.reset_parameters()

    @property
    def path(self) -> str:
        return self._path

    @path.setter
    def path(self, value: str) -> None:
        one_of("path", value, NORM_PATHS)
        self._path = value

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        if self._process_group is None:
            return None
        found = process_group_of(self._process_group)
        if not torch.compiler.is_compiling() and self._ranks != dist.get_process_group_ranks(found):
            raise RuntimeError(
                f"process_group {self._process_group!r} must have the ranks {self._ranks}, with "
                f"which this module was made, got {dist.get_process_group_ranks(found)}; make the "
                "process groups in the order of that program, or the module anew"
            )
        return found

    def reset_parameters(self) -> None:
        (nn.init.zeros_ if self.zero_centered else nn.init.ones_)(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """`x`, `z` `[..., hidden_size]` to `[..., hidden_size]` in the dtype of `x`."""
        function = rms_norm_gated if self._path == "inference" else layernorm_fn
        return function(
            x,
            self.weight,
            self.bias,
            z,
            self.eps,
            self.group_size,
            self.norm_before_gate,
            is_rms_norm=self.is_rms_norm,
            activation=self.activation,
            zero_centered=self.zero_centered,
            numerics=self.numerics,
            process_group=None if self._process_group is None else self.process_group,
        )

    PLAIN_FORWARD = forward

    def extra_repr(self) -> str:
        ranks = "" if self._process_group is None else f", process_group={self._process_group}"
        return (
            f"{self.hidden_size}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}, activation={self.activation}, "
            f"zero_centered={self.zero_centered}, numerics={self.numerics}, path={self.path}{ranks}"
        )


class RMSNorm(LayerNorm):
    """Gated RMS norm over the last dimension, without a bias; arguments as :class:`LayerNorm`."""

    is_rms_norm = True
