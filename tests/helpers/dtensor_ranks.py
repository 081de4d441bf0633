"""DTensors over several processes, against one process.

    python tests/helpers/dtensor_ranks.py 2

How the ranks are started: each_rank.py.
"""

import itertools
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DeviceMesh,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gatednorm
from each_rank import device, refused, run_on_ranks
from many_ranks import travelled
from norm_cases import Case, inputs_of, same_bits


def dtensors() -> None:
    """Rows, whole groups and parts of groups over a mesh: the result and the gradients of one
    rank, in the placements of x."""
    size = dist.get_world_size()
    kind = device().type
    meshes = [init_device_mesh(kind, (size,))]
    if size == 4:
        meshes.append(init_device_mesh(kind, (2, 2), mesh_dim_names=("dp", "tp")))
    for (n, case), mesh, last in itertools.product(enumerate(DTENSORS), meshes, (0, 1, 2)):
        rows = [Shard(0)] * (mesh.ndim - 1) + [Shard(last)]
        parameter = [Replicate()] * (mesh.ndim - 1) + [Shard(0) if last == 2 else Replicate()]
        whole = [t if t is None else t.requires_grad_() for t in leaves_of(case)]
        options = {"is_rms_norm": case.is_rms_norm, **case.options}
        y = gatednorm.layernorm_fn(*whole, **options)
        parts = [
            None if t is None else distribute_tensor(t.detach(), mesh, p).requires_grad_()
            for t, p in zip(whole, (rows, parameter, parameter, rows), strict=True)
        ]
        ours = gatednorm.layernorm_fn(*parts, **options)
        assert ours.placements == tuple(rows), (n, ours.placements)
        torch.testing.assert_close(ours.full_tensor(), y, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for function in (gatednorm.layernorm_fn, gatednorm.rms_norm_gated):
                assert same_bits(function(*parts, **options).to_local(), ours.to_local())
        given = [[t for t in leaves if t is not None] for leaves in (parts, whole)]
        dy = y.detach().cos()
        wanted = torch.autograd.grad(y, given[1], dy)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):  # not always those of y
            gradient = distribute_tensor(dy, mesh, [*rows[:-1], placement])
            found = torch.autograd.grad(ours, given[0], gradient, retain_graph=True)
            for mine, one in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine.full_tensor(), one, rtol=1e-5, atol=1e-5)


def norm_and_projection() -> None:
    """Columns across a group, and those of the projection with them: the result and the gradients
    of one rank, and one number a row that travels."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    shapes = {"x": (6, 32), "z": (6, 32), "weight": (32,), "linear_weight": (8, 32)}
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(s, generator=generator).to(device()).requires_grad_() for s in shapes.values()
    ]
    parts = [
        distribute_tensor(t.detach(), mesh, [Shard(t.ndim - 1)]).requires_grad_() for t in whole
    ]
    out, ours = (gatednorm.gated_norm_linear(*leaves) for leaves in (whole, parts))
    torch.testing.assert_close(ours.full_tensor(), out, rtol=1e-5, atol=1e-5)
    for mine, one in zip(
        torch.autograd.grad(ours.full_tensor().sin().sum(), parts),
        torch.autograd.grad(out.sin().sum(), whole), strict=True,
    ):  # fmt: skip
        assert mine.placements == (Shard(mine.ndim - 1),)
        torch.testing.assert_close(mine.full_tensor(), one, rtol=1e-5, atol=1e-5)
    if device().type == "cpu":
        assert travelled(lambda: gatednorm.gated_norm_linear(*parts)) == [[6]]


def unequal_rows() -> None:
    """Ranks with different numbers of rows, and columns over the others."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device().type, (ranks // 2, 2) if ranks > 2 else (2, 1))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(device())
    parts = distribute_tensor(x, mesh, [Shard(0), Shard(1)]).requires_grad_()
    x.requires_grad_()
    for group_size in (None, 8):
        y = gatednorm.rmsnorm_fn(x, group_size=group_size)
        ours = gatednorm.rmsnorm_fn(parts, group_size=group_size)
        assert ours.shape == y.shape
        torch.testing.assert_close(ours.full_tensor(), y, rtol=1e-5, atol=1e-5)
        (dx,) = torch.autograd.grad(ours.full_tensor().sin().sum(), parts)
        (wanted,) = torch.autograd.grad(y.sin().sum(), x)
        torch.testing.assert_close(dx.full_tensor(), wanted, rtol=1e-5, atol=1e-5)


def compiled_before_any_other() -> None:
    """The first DTensor that the operators meet, in a compiled program; its gradient's rows are
    sharded otherwise than its own."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    x, w, _, z = leaves_of(DTENSORS[1])
    leaves = [x.requires_grad_(), w.requires_grad_()]
    placements = ([Shard(1)], [Replicate()])
    parts = [
        distribute_tensor(t.detach(), mesh, p).requires_grad_()
        for t, p in zip(leaves, placements, strict=True)
    ]

    def loss(x, w, z):
        return (gatednorm.layernorm_fn(x, w) * z).sum()

    once = torch.compile(loss, backend="aot_eager", fullgraph=True)
    once(*parts, distribute_tensor(z, mesh, [Shard(0)])).full_tensor().backward()
    for mine, one in zip(parts, torch.autograd.grad(loss(*leaves, z), leaves), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), one, rtol=1e-5, atol=1e-5)


DTENSORS = (  # outer dimensions of two sizes, which no mix-up survives
    Case((8, 4), 32, 1, False, False, bias=True),
    Case((8, 4), 32, 1, True, True),
    Case((8, 4), 8, 4, True, False),
    Case((8, 4), 16, 2, False, True, bias=True, weight=False),
    Case((8, 4), 16, 1, False, gated=False),
)


def leaves_of(case: Case) -> list[torch.Tensor | None]:
    i = inputs_of(case, device())
    return [None if t is None else t.detach() for t in (i.x, i.weight, i.bias, i.z)]


def a_parallel_plan() -> None:
    """`parallelize_module`: rows of a sequence, and columns between two linear layers; alone and
    with FSDP2 on top, of two ranks each where there are four."""
    for shape in ((2, 2),) if dist.get_world_size() == 4 else ((1, 2), (2, 1)):
        on_mesh(init_device_mesh(device().type, shape, mesh_dim_names=("dp", "tp")))


def on_mesh(mesh: DeviceMesh) -> None:

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.gate = torch.nn.Linear(6, 32), torch.nn.Linear(6, 32)
            self.norm = gatednorm.RMSNorm(32, norm_before_gate=False)
            self.last = torch.nn.Linear(32, 6)

        def forward(self, x):
            return self.last(self.norm(self.first(x), z=self.gate(x)))

    class Columns(ParallelStyle):
        """The parameters of the norm as the columns of the rows are."""

        def _apply(self, module, mesh):
            def shard(name, module, mesh):
                weight = distribute_tensor(module.weight, mesh, [Shard(0)])
                module.weight = torch.nn.Parameter(weight)

            return distribute_module(module, mesh, shard)

    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)).to(device())
    y = (one := Block().to(device()))(x)
    y.square().sum().backward()
    linear = {"use_local_output": False}
    plans = {
        "columns": {
            "first": ColwiseParallel(**linear), "gate": ColwiseParallel(**linear),
            "norm": Columns(), "last": RowwiseParallel(),
        },
        "sequence": {
            "first": ColwiseParallel(output_layouts=Shard(1), **linear),
            "gate": ColwiseParallel(output_layouts=Shard(1), **linear),
            "norm": SequenceParallel(),
            "last": RowwiseParallel(input_layouts=Shard(1)),
        },
    }  # fmt: skip
    for (name, plan), sharded in itertools.product(plans.items(), (False, True)):
        model = parallelize_module(Block().to(device()), mesh["tp"], plan)
        if sharded:
            for part in (model.norm, model):
                fully_shard(part, mesh=mesh["dp"])
        ours = model(x)
        close = {"rtol": 1e-5, "atol": 1e-5, "msg": name}
        torch.testing.assert_close(ours, y.detach(), **close)
        ours.square().sum().backward()
        for mine, theirs in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, **close)


def what_dtensors_refuse() -> None:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    columns = distribute_tensor(torch.ones(4, 32, device=device()), mesh, [Shard(1)])
    refused(
        TypeError,
        "process_group goes with local tensors, and x is a DTensor",
        lambda: gatednorm.rmsnorm_fn(columns, process_group=mesh.get_group()),
    )
    linear = distribute_tensor(torch.ones(8, 32, device=device()), mesh, [Shard(1)])
    wide = distribute_tensor(torch.ones(128, 128 * mesh.size(), device=device()), mesh, [Shard(1)])
    refused(
        TypeError,
        "process_group goes with local tensors, and x is a DTensor",
        lambda: gatednorm.gated_norm_linear(
            columns, None, None, linear, process_group=mesh.get_group()
        ),
    )
    refused(
        TypeError, "FP8 takes local tensors, and x is a DTensor",
        lambda: gatednorm.gated_norm_linear(
            wide, None, None, wide, group_size=128, precision="fp8_emulated"
        ),
    )  # fmt: skip
    inner = distribute_tensor(torch.ones(4, 2, 8 * mesh.size(), device=device()), mesh, [Shard(2)])
    refused(
        ValueError, "the columns of x must be sharded by Shard() alone, got placements",
        lambda: gatednorm.rmsnorm_fn(inner.flatten(1)),
    )  # fmt: skip
    refused(
        TypeError,
        "weight must be a DTensor as x is, got Tensor",
        lambda: gatednorm.rmsnorm_fn(columns, torch.ones(32, device=device())),
    )
    refused(
        ValueError,
        "group_size must divide the channels of x, got group_size=12",
        lambda: gatednorm.rmsnorm_fn(columns, group_size=12),
    )
    refused(
        TypeError,
        "out= takes local tensors, and x is a DTensor",
        lambda: gatednorm.rms_norm_gated(columns, out=columns),
    )
    wider = distribute_tensor(torch.ones(4, 64, device=device()), mesh, [Shard(1)])
    refused(
        ValueError, "z must have the shape of x, got (4, 64) and (4, 32)",
        lambda: gatednorm.rmsnorm_fn(columns, z=wider),
    )  # fmt: skip
    uneven = distribute_tensor(torch.ones(4, 33, device=device()), mesh, [Shard(1)])
    refused(ValueError, "must be equally wide, got 33", lambda: gatednorm.rmsnorm_fn(uneven))
    if mesh.size() == 4:
        both = init_device_mesh(device().type, (2, 2))
        twice = distribute_tensor(torch.ones(4, 32, device=device()), both, [Shard(1), Shard(1)])
        text = "must be sharded by one Shard() over one dimension of the mesh"
        refused(ValueError, text, lambda: gatednorm.rmsnorm_fn(twice))
        gatednorm.rmsnorm_fn(twice, group_size=8)
        parts = distribute_tensor(torch.ones(4, 2, 16, device=device()), both, [Shard(2), Shard(1)])
        text = "the columns of x must be sharded by Shard() alone, got placements"
        refused(ValueError, text, lambda: gatednorm.rmsnorm_fn(parts.flatten(1), group_size=8))


if __name__ == "__main__":
    size = int(sys.argv[1])
    checks = [compiled_before_any_other, dtensors, norm_and_projection, unequal_rows]
    checks.append(what_dtensors_refuse)
    run_on_ranks(size, [*checks, a_parallel_plan] if size == 4 else checks)
