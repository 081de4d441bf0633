"""The norm over several processes, against float64 of the whole row.

    python tests/helpers/many_ranks.py quick

How the ranks are started: each_rank.py. On GPUs: gpu_ranks.py.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from each_rank import device, refused, run_on_ranks  # isort: skip (first: it finds the packages)

import gatednorm
from gatednorm import autograd, distributed
from gatednorm.kernels import launch
from norm_cases import Case, Inputs, Layout, check, inputs_of, same_bits

Tensors = dict[str, torch.Tensor]
Part = Callable[[Case, Inputs, dict], Tensors]


def columns_of(case: Case) -> slice:
    """This rank's columns."""
    own = case.width // dist.get_world_size()
    return slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)


def parts_of(case: Case, i: Inputs) -> list[torch.Tensor | None]:
    """This rank's x, weight, bias, z: views of the whole rows, so packed slices."""
    own = columns_of(case)
    return [None if t is None else t[..., own] for t in (i.x, i.weight, i.bias, i.z)]


def options_of(case: Case) -> dict:
    return {"is_rms_norm": case.is_rms_norm, **case.options, "process_group": dist.group.WORLD}


def by_autograd(case: Case, i: Inputs) -> Tensors:
    leaves = [None if t is None else t.detach().requires_grad_() for t in parts_of(case, i)]
    y = gatednorm.layernorm_fn(*leaves, out_dtype=case.out_dtype, **options_of(case))
    with torch.no_grad():
        again = gatednorm.layernorm_fn(*leaves, out_dtype=case.out_dtype, **options_of(case))
    assert same_bits(again, y.detach()), "inference has other bits"
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, present, i.dy[..., columns_of(case)]))
    names = zip(("dx", "dw", "db", "dz"), leaves, strict=True)
    return {"y": y.detach(), **{name: next(grads) for name, t in names if t is not None}}


def by_hand(case: Case, i: Inputs) -> Tensors:
    """`layernorm_forward` and `layernorm_backward`, into slices of packed results."""
    given, own, options = parts_of(case, i), columns_of(case), options_of(case)
    packed = torch.full((3, *case.shape), float("nan"), dtype=case.dtype, device=device())
    out, dx, dz = packed[..., own]
    _, mean, rstd = gatednorm.layernorm_forward(*given, out=out, **options)
    dz = dz if case.gated else None
    _, dw, db, _ = gatednorm.layernorm_backward(
        i.dy[..., own], *given, mean, rstd, dx=dx, dz=dz, **options
    )
    found = {"y": out, "dx": dx, "dz": dz, "dw": dw, "db": db}
    return {name: t for name, t in found.items() if t is not None}


def gathered(parts: Tensors) -> Tensors:
    """The columns of all ranks side by side."""
    whole = {}
    for name, part in parts.items():
        everyone = [torch.empty_like(part.contiguous()) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, part.contiguous())
        whole[name] = torch.cat(everyone, -1)
    return whole


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """What this rank hands to each exchange of the norm; that nothing else travels is seen by
    :func:`travelled`."""
    sent, send = [], distributed.all_gather

    def counted(everyone, own, process_group):
        sent.append(own.numel() * own.element_size())
        send(everyone, own, process_group)

    distributed.all_gather = counted
    try:
        yield sent
    finally:
        distributed.all_gather = send


def travelled(run: Callable[[], object]) -> list[list[int]]:
    """The shapes of what this rank hands to collectives, as the profiler sees gloo's."""
    run()  # the first call of a kind compares ranks
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        run()
    return [event.input_shapes[0] for event in found.events() if event.name.startswith("gloo:")]


def nothing_else_travels() -> None:
    """One number a row, or two, in each direction; nothing for groups within a rank."""
    x = torch.randn(6, 16).requires_grad_()
    for rms, group_size in itertools.product((True, False), (None, 8)):

        def step(rms=rms, group_size=group_size):
            options = {"is_rms_norm": rms, "group_size": group_size}
            y = gatednorm.layernorm_fn(x, None, None, x, **options, process_group=dist.group.WORLD)
            y.square().sum().backward()

        numbers = [6 if rms else 12]
        assert travelled(step) == [numbers] * 2 * (group_size is None), (rms, group_size)


def check_case(case: Case, run=by_autograd) -> None:
    """Results and gradients against float64, and the bytes that travelled."""
    with bytes_sent() as sent:
        check(case, device(), lambda case, i: gathered(run(case, i)))
    rows = case.outer[0] * (case.outer[1] if len(case.outer) > 1 else 1)
    straddles = case.group_size > case.width // dist.get_world_size()
    number = 8 if case.dtype == torch.float64 else 4
    each = rows * number * (1 if case.is_rms_norm else 2)
    times = 3 if run is by_autograd else 2  # forward, forward without gradients, backward
    assert sent == [each] * times * straddles, (case.id(), sent)


def cases(groups: int, width: int) -> Iterator[Case]:
    """Every gate order, both norms, and with them the other options in turn."""
    kinds = itertools.product((True, False), ((True, True), (False, True), (True, False)))
    numerics = itertools.cycle(("fp32", "mamba2", "qwen3_next", "torchtitan"))
    third = torch.float16 if device().type == "cuda" else torch.float64
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, third))
    for n, (rms, (before, gated)) in enumerate(kinds):
        case = Case(
            (5, 3) if n % 2 else (37,), width // groups, groups, rms, before, gated,
            activation="sigmoid" if n % 3 == 1 else "silu", weight=n != 4, bias=not rms,
            zero_centered=n % 2 == 1, numerics=next(numerics), dtype=next(dtypes), seed=n,
            layouts={name: Layout(left=3, right=2) for name in ("x", "z", "dy")},
        )  # fmt: skip
        yield case
        yield replace(case, dtype=next(dtypes), numerics="fp32", layouts={})


# ---- the checks; each runs on every rank ----


def some_options() -> None:
    """One group over all ranks."""
    for n, case in enumerate(cases(1, 16 * dist.get_world_size())):
        check_case(case, by_hand if n % 2 else by_autograd)


def groups_of_two_ranks() -> None:
    """Half of the ranks share a group; and with some options each has one of its own, or two."""
    size = dist.get_world_size()
    own = [case for each in (1, 2) for case in list(cases(each * size, 8 * size))[:2]]
    for n, case in enumerate([*own, *list(cases(2, 8 * size))[::2]]):
        check_case(case, by_hand if n % 2 else by_autograd)


def every_option() -> None:
    size = dist.get_world_size()
    for groups in {1, size // 2, size, 2 * size}:
        for n, case in enumerate(cases(groups, 100 * size)):
            check_case(case, by_hand if n % 2 else by_autograd)


@contextmanager
def on_kernels() -> Iterator[None]:
    """The Triton kernels, without a GPU run by the interpreter."""
    backend, autograd.backend = autograd.backend, lambda device_type: launch
    try:
        yield
    finally:
        autograd.backend = backend


def by_kernels(*some: Case) -> None:
    with on_kernels():
        for n, case in enumerate(some):
            check_case(case, by_hand if n % 2 else by_autograd)


def kernels() -> None:
    before = Case((3,), 32 * dist.get_world_size(), 1, False, False, bias=True)
    by_kernels(before, replace(before, is_rms_norm=True, norm_before_gate=True, bias=False))


def kernels_of_every_kind() -> None:
    """Two pieces and one, groups on one rank and on several; chunks."""
    size = dist.get_world_size()
    for n, case in enumerate(list(cases(1, 1))[::2]):
        own, groups = ((600, 1), (40, size))[n % 3 == 2]
        case = replace(case, dtype=torch.float32, outer=(3,), groups=groups)
        by_kernels(replace(case, group_size=own * size // groups))
    by_kernels(Case((2,), 17_000 * size, 1, False, False, bias=True))


def bits_of_other_splits() -> None:
    """RMS norm by the kernels: the same bits on two and four ranks; on one, within rounding."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((4,), 256, 1, True, False)
    i = inputs_of(case, device())

    def run(count: int, place: int, group) -> Tensors:
        own = slice(place * 256 // count, (place + 1) * 256 // count)
        x, w, z = leaves = [t[..., own].detach().requires_grad_() for t in (i.x, i.weight, i.z)]
        y = gatednorm.rmsnorm_fn(x, w, None, z, norm_before_gate=False, process_group=group)
        dx, _, dz = torch.autograd.grad(y, leaves, i.dy[..., own])
        return {"y": y.detach(), "dx": dx, "dz": dz}

    with on_kernels():
        found = gathered(run(size, rank, dist.group.WORLD))
        if size == 4:
            halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
            two = gathered(run(2, rank % 2, halves[rank // 2]))
            for name, t in found.items():
                assert same_bits(two[name], torch.cat([t, t], -1)), name
        one = run(1, 0, None)
    for name, t in found.items():
        assert (one[name] - t).abs().max() <= 2e-7 * t.abs().max(), name


def a_rank_that_differs() -> None:
    """An error on every rank, at the first call of each group, which may then go on, and at its
    first call with other options."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(3, 8, device=device())
    odd = rank == size - 1
    everyone = list(range(size))
    differences = {
        "x must be the same on every rank, got [3, 8] in torch.float32 on rank 0 and [3, 9]": {
            "x": torch.randn(3, 9, device=device()) if odd else x
        },
        "eps must be the same on every rank, got 1e-06 on rank 0 and 1e-05": {
            "eps": 1e-5 if odd else 1e-6
        },
        "group_size must be the same": {"group_size": 4 if odd else None},
        "z must be the same on every rank, got [3, 8] in torch.float32 on rank 0 and None": {
            "z": None if odd else x
        },
    }
    for text, change in differences.items():
        group = dist.new_group(everyone)
        given = {"x": x, "process_group": group} | change
        refused(ValueError, text, lambda given=given: gatednorm.rmsnorm_fn(**given))
        gatednorm.rmsnorm_fn(x, process_group=group)
    later = {"eps": 1e-2 if odd else 1e-3, "process_group": group}
    refused(ValueError, "eps must be the same", lambda: gatednorm.rmsnorm_fn(x, **later))
    later = {"group_size": 4 if odd else 2, "process_group": group}
    refused(ValueError, "group_size must be the same", lambda: gatednorm.rmsnorm_fn(x, **later))
    linear = torch.randn(6 if odd else 5, 8, device=device())
    refused(
        ValueError, "linear_weight must be the same on every rank, got [5, 8] in torch.float32",
        lambda: gatednorm.gated_norm_linear(x, None, None, linear, process_group=group),
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    results = [gatednorm.rmsnorm_fn(leaf, eps=eps, process_group=group) for eps in (0.1, 0.2)]
    refused(ValueError, "eps must be the same", lambda: results[odd].sum().backward())
    # From now on every call is looked at.
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        given |= differences.popitem()[1]
        refused(ValueError, "z must be the same", lambda: gatednorm.rmsnorm_fn(**given))
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def groups_that_do_not_fit() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for group_size in (5, 3 * size * 8, 12, 0, -8):
        call = lambda n=group_size: gatednorm.rmsnorm_fn(  # noqa: E731
            torch.randn(3, 8, device=device()), group_size=n, process_group=dist.group.WORLD
        )
        refused(ValueError, f"got group_size={group_size}, 8 channels a rank", call)
    make = lambda: gatednorm.RMSNorm(8, group_size=5, process_group=dist.group.WORLD)  # noqa: E731
    refused(ValueError, "group_size must divide the channels of a rank", make)
    others = dist.new_group([0])
    x = torch.randn(3, 8, device=device())
    if rank:
        call = lambda: gatednorm.rmsnorm_fn(x, process_group=others)  # noqa: E731
        refused(ValueError, "process_group must be one that this rank is part of", call)
    else:
        alone = gatednorm.rmsnorm_fn(x, process_group=others)
        assert same_bits(alone, gatednorm.rmsnorm_fn(x)), "a world of one has other bits"


def modules_and_projection() -> None:
    """Modules, copied and saved; and the projection, whose results are shares of a sum."""
    import copy
    import io

    case = Case((6, 2), 32, 1, True, False, dtype=torch.float32)
    i, own = inputs_of(case, device()), columns_of(case)
    x, w, _, z = parts_of(case, i)
    norm = gatednorm.RMSNorm(
        x.shape[-1], norm_before_gate=False, process_group=dist.group.WORLD, device=device()
    )
    norm.weight.data = w.clone()
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    y = gatednorm.rmsnorm_fn(
        x, w, None, z, 1e-5, norm_before_gate=False, process_group=dist.group.WORLD
    )
    for module in (norm, copy.deepcopy(norm), torch.load(file, weights_only=False)):
        assert same_bits(module(x, z).detach(), y)
        assert module.process_group is dist.group.WORLD
    linear = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).to(device())
    refused(
        ValueError,
        "linear_bias must be None with a process_group of several ranks",
        lambda: gatednorm.gated_norm_linear(
            x, None, None, linear[:, : x.shape[-1]], linear_bias=linear[:, 0],
            process_group=dist.group.WORLD,
        ),
    )  # fmt: skip

    def leaves(*tensors):
        return [t.detach().clone().requires_grad_() for t in tensors]

    options = {"eps": 1e-5, "norm_before_gate": False}
    whole = leaves(i.x, i.z, i.weight, linear)
    part = leaves(x, z, w, linear[:, own])
    out = gatednorm.gated_norm_linear(*part, process_group=dist.group.WORLD, **options)
    total = out.detach().clone()
    dist.all_reduce(total)
    truth = gatednorm.gated_norm_linear(*whole, **options)
    torch.testing.assert_close(total, truth.detach())
    dout = torch.ones_like(total)
    for mine, full in zip(
        torch.autograd.grad(out, part, dout), torch.autograd.grad(truth, whole, dout), strict=True
    ):
        torch.testing.assert_close(mine, full[..., own], rtol=1e-5, atol=1e-5)


def projection_in_fp8() -> None:
    """Groups on one rank: blocks of 128 columns and squares of the weight lie on one too, so that
    the shares add up to what one process has, and gradients are its columns."""
    size = dist.get_world_size()
    case = Case((6,), 128, size, norm_before_gate=False, dtype=torch.float32)
    i, own = inputs_of(case), columns_of(case)
    g = torch.Generator().manual_seed(1)
    linear, dout = torch.randn(128, 128 * size, generator=g), torch.randn(6, 128, generator=g)
    options = {"norm_before_gate": False, "precision": "fp8_emulated"}

    def run(group_size, process_group, *tensors):
        x, z, w, lw = leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = gatednorm.gated_norm_linear(
            x, z, w, lw, group_size=group_size, process_group=process_group, **options
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    x, w, _, z = parts_of(case, i)
    part = run(128, dist.group.WORLD, x, z, w, linear[:, own])
    total = part[0].clone()
    dist.all_reduce(total)
    whole = run(128, None, i.x, i.z, i.weight, linear)
    torch.testing.assert_close(total, whole[0], rtol=0, atol=1e-4)  # in another order
    for mine, full in zip(part[1:], whole[1:], strict=True):
        torch.testing.assert_close(mine, full[..., own])
    refused(
        ValueError, "a norm group must lie on one rank with precision='fp8_emulated', got one over",
        lambda: run(None, dist.group.WORLD, x, z, w, linear[:, own]),
    )  # fmt: skip


def compiled() -> None:
    """One graph, with the bits of an eager call; functions and modules; groups in a rank too."""
    case = Case((6,), 32, 1, False, True, bias=True)
    i = inputs_of(case, device())
    norm = gatednorm.LayerNorm(
        32 // dist.get_world_size(), process_group=dist.group.WORLD, device=device()
    )
    group = dist.new_group(list(range(dist.get_world_size())))

    def function(x, w, b, z):
        inside = gatednorm.layernorm_fn(x * 3, w, b, z, group_size=8, process_group=group)
        return gatednorm.layernorm_fn(x * 2, w, b, z, process_group=group) + norm(x, z) + inside

    def run(f):
        leaves = [t.detach().requires_grad_() for t in parts_of(case, i)]
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    f = torch.compile(function, fullgraph=True, backend="aot_eager")
    text = "is not known in this process; before a compiled or loaded program uses it"
    refused(RuntimeError, text, lambda: run(f))
    wanted = run(function)
    torch.compiler.reset()
    for got, want in zip(run(f), wanted, strict=True):
        assert same_bits(got, want)
    if device().type == "cuda":
        torch.compiler.reset()
        f = torch.compile(function, fullgraph=True)  # whose own sums may be rounded once
        torch.testing.assert_close(run(f), wanted, rtol=1e-5, atol=1e-5)
    # What the compiler is told of the statistics: two groups a row.
    shapes, meta = [], torch.empty(6, 16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        gatednorm.rmsnorm_fn(meta, group_size=8, process_group=group)
    assert (6, 2) in shapes, shapes


CHECKS = {
    "quick": (
        2,
        [
            *(some_options, kernels, a_rank_that_differs, groups_that_do_not_fit),
            *(projection_in_fp8, nothing_else_travels),
        ],
    ),
    "groups": (
        4,
        [
            *(groups_that_do_not_fit, a_rank_that_differs, some_options, groups_of_two_ranks),
            bits_of_other_splits,
        ],
    ),
    "two": (2, [every_option, kernels_of_every_kind, modules_and_projection]),
    "compiled": (2, [compiled]),
    "four": (
        4, [every_option, bits_of_other_splits, a_rank_that_differs, groups_that_do_not_fit],
    ),
}  # fmt: skip


if __name__ == "__main__":
    run_on_ranks(*CHECKS[sys.argv[1]])
