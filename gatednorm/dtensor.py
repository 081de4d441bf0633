"""DTensors: the operators' sharding rules, and rows whose columns are sharded across a norm group.

Imported when the first DTensor comes along, since `torch.distributed.tensor` takes a second.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .call import dense_strides
from .options import Options, channels_in_group

Placements = list[Any]  # of a tensor, None for what is none


def _rules(x: Any, group_size: int | None, process_group: str | None) -> list[Placements]:
    """Placements of the rows, the parameters, their gradients, and the statistics."""
    rules: list[Placements] = [[Replicate()] * 4]
    _refuse(process_group)
    last = x.ndim - 1
    for dim in range(last):
        rules.append([Shard(dim), Replicate(), Partial(), Shard(dim)])
    # Columns that are whole groups, over however many dimensions of the mesh.
    if group_size and x.shape[-1] % (group_size * x.mesh.size()) == 0:
        rules.append([Shard(last), Shard(0), Shard(0), Shard(last)])
    return rules


def _refuse(process_group: str | None) -> None:
    if process_group is not None:
        raise TypeError(
            "process_group goes with local tensors, and x is a DTensor, whose mesh says what is "
            "shared; pass x.to_local(), or process_group=None"
        )


def _if_given(placement: Any, t: Any) -> Any:
    return None if t is None else placement


def register(forward: Any, backward: Any) -> None:
    """Teach DTensor the two operators (PyTorch documents `register_sharding` as experimental)."""

    @register_sharding(forward)
    def forward_rules(
        x: Any, weight: Any, bias: Any, z: Any, *options: Any
    ) -> Sequence[tuple[Placements, Placements]]:
        o = Options(*options[: len(Options())])
        found = []
        for rows, parameter, _, stats in _rules(x, o.group_size, o.process_group):
            mean = Replicate() if o.is_rms_norm else stats
            given = [rows, _if_given(parameter, weight), _if_given(parameter, bias)]
            inputs = [*given, _if_given(rows, z), *(None for _ in options)]
            found.append(([rows, mean, stats], inputs))
        return found

    @register_sharding(backward)
    def backward_rules(
        dy: Any, x: Any, weight: Any, bias: Any, z: Any, mean: Any, rstd: Any, *options: Any
    ) -> Sequence[tuple[Placements, Placements]]:
        n = len(Options()) - 1
        o = Options(*options[:n], *options[n + 1 :])
        with_output = any(options[n : n + 1])
        none = Replicate()  # what is absent is a tensor without elements
        found = []
        for rows, parameter, gradient, stats in _rules(x, o.group_size, o.process_group):
            outputs = [rows, *(none if t is None else gradient for t in (weight, bias))]
            outputs += [none if z is None else rows, rows if with_output else none]
            given = [_if_given(parameter, weight), _if_given(parameter, bias), _if_given(rows, z)]
            inputs = [rows, rows, *given, Replicate() if o.is_rms_norm else stats, stats]
            found.append((outputs, [*inputs, *(None for _ in options)]))
        return found


def by_columns(
    function: Callable[..., Tensor],
    x: DTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    options: Options,
) -> Tensor | None:
    """`function(x, weight, bias, z, **options)` on the local tensors of a DTensor whose columns are
    sharded, with the process group that shares them; None for any other, which the operator's rules
    serve.

    Raises:
        ValueError: placements that leave no way to run the norm.
        TypeError: a plain tensor beside the DTensor with its sharded columns; a process group.
    """
    _refuse(options.process_group)
    last, mesh, width = x.ndim - 1, x.device_mesh, x.shape[-1]
    channels_in_group(options.group_size, width, "the channels of x", "D")
    rows = [Replicate() if p.is_partial() else p for p in x.placements]
    columns = [i for i, p in enumerate(rows) if p.is_shard(last)]
    if any(type(p) is not Shard and getattr(p, "dim", None) == last for p in rows):
        raise ValueError(
            "the columns of x must be sharded by Shard() alone, got placements "
            f"{tuple(x.placements)}; redistribute x"
        )
    if not columns:
        return None
    given = {}
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("z", z)):
        if isinstance(t, DTensor):
            given[name] = t
        elif t is not None:
            raise TypeError(
                f"{name} must be a DTensor as x is, got {type(t).__name__}; use "
                "torch.distributed.tensor.distribute_tensor"
            )
    if z is not None and z.shape != x.shape:
        raise ValueError(
            f"z must have the shape of x, got {tuple(z.shape)} and {tuple(x.shape)}; pass one gate "
            "for each element"
        )
    ranks = math.prod(mesh.size(i) for i in columns)
    group = None
    if width % ranks:
        raise ValueError(
            f"the sharded columns of x must be equally wide, got {width} channels on {ranks} "
            "ranks; redistribute x to Replicate()"
        )
    if options.group_size is None or width // ranks % options.group_size:
        if len(columns) > 1 or any(type(p) not in (Shard, Replicate) for p in rows):
            raise ValueError(
                "a norm group that straddles ranks must be sharded by one Shard() over one "
                f"dimension of the mesh, got placements {tuple(x.placements)}; redistribute x"
            )
        group = mesh.get_group(columns[0])
    parameter = [Shard(0) if i in columns else Replicate() for i in range(mesh.ndim)]
    gradient = [
        own if own.is_shard() or not p.is_shard() else Partial()
        for own, p in zip(parameter, rows, strict=True)
    ]
    local = {}
    for name, t in given.items():
        placed, of_gradient = (rows, rows) if name in ("x", "z") else (parameter, gradient)
        local[name] = t.redistribute(mesh, placed).to_local(grad_placements=of_gradient)
    y = function(**local, **options._asdict() | {"process_group": group})
    # Ranks may have different numbers of rows.
    return DTensor.from_local(
        y, mesh, rows, run_check=False, shape=x.shape, stride=dense_strides(tuple(x.shape))
    )
