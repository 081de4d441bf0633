"""Cases of the gated norm: tensors anywhere in memory, the float64 truth, what error is allowed.

A tensor lies in a larger buffer full of NaN: a read outside of it shows in the result, a write
outside of it shows in the buffer. Results start as NaN too, so what is not written shows.
"""

import contextlib
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import gatednorm
from gatednorm import gated_norm_ref

NAN = float("nan")
SHORT = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where `[*outer, D]` lies: memory order of the outer dimensions, columns around a row, offset.

    `order=None` is the order of the shape; `left` and `right` make it a slice of a packed
    projection; `expand` makes the first outer dimension a repetition of one (inputs only).
    """

    order: tuple[int, ...] | None = None
    left: int = 0
    right: int = 0
    offset: int = 0
    expand: bool = False

    def empty(self, shape, dtype, device) -> tuple[Tensor, Tensor]:
        """A view of `shape` and the buffer that it lies in, all NaN."""
        *outer, width = shape
        order = self.order or tuple(range(len(outer)))
        sizes = [outer[i] for i in order]
        if self.expand and outer:
            sizes[order.index(0)] = 1
        row = self.left + width + self.right
        count = row
        for size in sizes:
            count *= size
        # The tail is where rows that a tile has too many would be written.
        tail = min(64 * row, 1 << 14)
        buffer = torch.full((self.offset + count + tail,), NAN, dtype=dtype, device=device)
        packed = buffer[self.offset : self.offset + count].view(*sizes, row)[
            ..., self.left : self.left + width
        ]
        back = [order.index(i) for i in range(len(outer))]
        view = packed.permute(*back, len(outer))
        return view.expand(*outer, width) if self.expand and outer else view, buffer

    def place(self, values: Tensor, dtype, device) -> tuple[Tensor, Tensor]:
        view, buffer = self.empty(values.shape, dtype, device)
        source = values[:1] if self.expand and values.dim() > 1 else values
        target = view[:1] if self.expand and values.dim() > 1 else view
        target.copy_(source)
        return view, buffer


DENSE = Layout()


@dataclass(frozen=True)
class Case:
    """Options, dtypes and layouts of one call; the values follow from the seed."""

    outer: tuple[int, ...] = (5,)
    group_size: int = 16
    groups: int = 1
    is_rms_norm: bool = True
    norm_before_gate: bool = True
    gated: bool = True
    activation: str = "silu"
    weight: bool = True
    bias: bool = False
    zero_centered: bool = False
    numerics: str = "fp32"
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    z_dtype: torch.dtype | None = None
    w_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    layouts: dict[str, Layout] = field(default_factory=dict, hash=False)
    magnitude: float = 1.0
    seed: int = 0

    @property
    def width(self) -> int:
        return self.group_size * self.groups

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.outer, self.width)

    @property
    def options(self) -> dict:
        """Keyword arguments of the public functions (those that differ by role left out)."""
        return {
            "eps": self.eps,
            "group_size": None if self.groups == 1 else self.group_size,
            "norm_before_gate": self.norm_before_gate,
            "activation": self.activation,
            "zero_centered": self.zero_centered,
            "numerics": self.numerics,
        }

    def layout(self, name: str) -> Layout:
        return self.layouts.get(name, DENSE)

    def id(self) -> str:
        gate = ("gate_after" if self.norm_before_gate else "gate_before") if self.gated else "plain"
        parts = ["rms" if self.is_rms_norm else "layer", gate, self.activation]
        parts += [] if self.weight else ["no_weight"]
        parts += [name for name in ("bias", "zero_centered") if getattr(self, name)]
        parts += [] if self.numerics == "fp32" else [self.numerics]
        parts += [f"g{self.group_size}", f"M{'x'.join(map(str, self.outer))}", f"D{self.width}"]
        return "-".join([*parts, SHORT[self.dtype], *(["strided"] if self.layouts else [])])


@dataclass
class Inputs:
    """The tensors of a case, in their layouts, and the buffers that they lie in."""

    x: Tensor
    z: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    buffers: list[Tensor]

    def snapshot(self) -> list[Tensor]:
        return [b.clone() for b in self.buffers]

    def unchanged_since(self, before: list[Tensor]) -> bool:
        return all(map(same_bits, self.buffers, before))


def inputs_of(case: Case, device: str = "cpu") -> Inputs:
    g = torch.Generator().manual_seed(case.seed)

    def values(*shape, scale=1.0, shift=0.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift

    buffers = []

    def put(name, value, dtype):
        view, buffer = case.layout(name).place(value, dtype, device)
        buffers.append(buffer)
        return view

    out_dtype = case.out_dtype or case.dtype
    w_dtype = case.w_dtype or case.dtype
    x = put("x", values(*case.shape, scale=case.magnitude, shift=0.3), case.dtype)
    z = put("z", values(*case.shape, scale=1.5), case.z_dtype or case.dtype) if case.gated else None
    shift = 0.0 if case.zero_centered else 1.0
    w = put("w", values(case.width, scale=0.3, shift=shift), w_dtype) if case.weight else None
    b = put("b", values(case.width, scale=0.5), w_dtype) if case.bias else None
    dy = put("dy", values(*case.shape), out_dtype)
    return Inputs(x, z, w, b, dy, buffers)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, NaN included."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between `a` and `b`, floats of two bytes."""

    def index(t):
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (index(a) - index(b)).abs()


@contextlib.contextmanager
def poisoned_memory():
    """Every new uninitialised tensor of floats holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def differentiate(case: Case, inputs: Inputs, dtype=None, upcast: bool = True) -> dict[str, Tensor]:
    """`y` and the gradients by PyTorch's autograd over the reference, in the dtypes of the inputs
    or all in `dtype`."""

    def leaf(t):
        return None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()

    x, z, w, b = map(leaf, (inputs.x, inputs.z, inputs.weight, inputs.bias))
    y = gated_norm_ref(
        x, w, b, z, upcast=upcast, is_rms_norm=case.is_rms_norm, **case.options,
        out_dtype=dtype or case.out_dtype,
    )  # fmt: skip
    given = {"dx": x, "dz": z, "dw": w, "db": b}
    given = {k: t for k, t in given.items() if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), inputs.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(given, grads, strict=True))}


def scales(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The size of each result: the absolute values of the terms that it is the sum of.

    Per row `[..., 1]` for `y`, `dx`, `dz`, per channel for `dw`, `db`. Where terms cancel, the
    result is smaller than this, and no arithmetic of finite precision is accurate relative to it.
    """

    def to64(t):
        return None if t is None else t.detach().double()

    x, z, w, b, dy = map(to64, (inputs.x, inputs.z, inputs.weight, inputs.bias, inputs.dy))
    one = torch.ones_like(x)
    act, slope = one, one
    if z is not None:
        s = torch.sigmoid(z)
        act = s if case.activation == "sigmoid" else z * s
        slope = s * (1 - s) if case.activation == "sigmoid" else s + (z * s * (1 - s)).abs()
    first = z is not None and not case.norm_before_gate
    u = (x * act if first else x).unflatten(-1, (case.groups, case.group_size))
    mean = 0 * u.mean(-1, keepdim=True) if case.is_rms_norm else u.mean(-1, keepdim=True)
    rstd = torch.rsqrt((u - mean).pow(2).mean(-1, keepdim=True) + case.eps)
    xhat = ((u.abs() + mean.abs()) * rstd).flatten(-2)
    rstd = rstd.expand_as(u).flatten(-2)
    scale_w = one if w is None else (w.abs() + case.zero_centered) * one
    h = xhat * scale_w + (0 if b is None else b.abs())
    after = one if first or z is None else act.abs()
    g = dy.abs() * after

    def largest(t):
        return t.unflatten(-1, (case.groups, -1)).amax(-1, keepdim=True).expand(
            *t.shape[:-1], case.groups, case.group_size
        ).flatten(-2)  # fmt: skip

    dxhat = g * scale_w
    inner = (dxhat * xhat).unflatten(-1, (case.groups, -1)).mean(-1, keepdim=True)
    total = dxhat.unflatten(-1, (case.groups, -1)).mean(-1, keepdim=True)
    spread = inner.expand(*u.shape).flatten(-2) * xhat
    if not case.is_rms_norm:
        spread = spread + total.expand(*u.shape).flatten(-2)
    du = rstd * (dxhat + spread)
    rows = tuple(range(x.dim() - 1))

    def summed(t):
        return t.sum(rows) if rows else t

    found = {"y": largest(h * after), "dx": largest(du * (act.abs() if first else one))}
    found["dz"] = largest(du * x.abs() * slope if first else dy.abs() * h * slope)
    found["dw"] = summed(g * xhat)
    found["db"] = summed(g)
    return found


def worst(error: Tensor, scale: Tensor) -> float:
    """The largest error in units of the scale."""
    ratio = torch.where(scale > 0, error / scale.clamp_min(1e-300), torch.zeros_like(error))
    return float(ratio.max()) if ratio.numel() else 0.0


def check_results(case: Case, inputs: Inputs, got: dict[str, Tensor]) -> None:
    """Every result against float64, with at most twice the error of plain PyTorch plus 4 eps.

    Both errors are relative to `scales`. Plain PyTorch computes the same expression in the dtype of
    `x`; where that overflows it grants nothing. Results that are rounded once must also lie within
    half a unit of that rounding, plus 16 eps of fp32.
    """
    truth = differentiate(case, inputs, torch.float64)
    plain = differentiate(case, inputs, upcast=False)
    scale = scales(case, inputs)
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert set(got) == set(truth)
    for name, value in got.items():
        assert value.shape == truth[name].shape, name
        assert value.dtype == plain[name].dtype, name
        assert not value.isnan().any(), f"{name} of {case.id()}: not everything was written"
        error = (value.double() - truth[name]).abs()
        stored = torch.finfo(value.dtype)
        unit = max(stored.eps, torch.finfo(compute).eps)
        if case.numerics != "fp32":
            unit = max(unit, torch.finfo(case.dtype).eps)
        quantum = stored.smallest_normal * stored.eps
        granted = worst((plain[name].double() - truth[name]).abs(), scale[name])
        granted = granted if granted < 64 * torch.finfo(case.dtype).eps else 0.0
        allowed = (2 * granted + 4 * unit) * scale[name] + quantum
        assert (error <= allowed).all(), (
            f"{name} of {case.id()}: error {worst(error, scale[name]):.3g}, plain PyTorch "
            f"{granted:.3g} of the scale, eps {unit:.3g}"
        )
        if case.numerics == "fp32":
            fine = 16 * torch.finfo(compute).eps * scale[name]
            once = 0.5 * stored.eps * (truth[name].abs() + fine) + fine + quantum
            # A gradient of a parameter is rounded to its own dtype after a sum over all rows.
            assert (error <= once + 2 * granted * (compute == case.dtype) * scale[name]).all(), (
                f"{name} of {case.id()}: rounded more than once, error "
                f"{worst(error, scale[name]):.3g} of the scale, eps {stored.eps:.3g}"
            )


def _arguments(inputs: Inputs) -> tuple:
    return inputs.x, inputs.weight, inputs.bias, inputs.z


def through_autograd(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """`layernorm_fn` and `backward()`; in poisoned memory."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in _arguments(inputs)]
    with poisoned_memory():
        y = gatednorm.layernorm_fn(
            *leaves, is_rms_norm=case.is_rms_norm, **case.options, out_dtype=case.out_dtype
        )
        present = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(y, present, inputs.dy))
    found = {"y": y.detach()}
    for name, leaf in zip(("dx", "dw", "db", "dz"), leaves, strict=True):
        if leaf is not None:
            found[name] = next(grads)
    return found


def through_buffers(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """`layernorm_forward(out=)`, `layernorm_backward(dx=, dz=)` into the case's layouts.

    What surrounds `out`, `dx` and `dz` must still be NaN afterwards.
    """
    device = inputs.x.device

    def empty(name, like_dtype):
        layout = replace(case.layout(name), expand=False)
        return layout.empty(case.shape, like_dtype, device)

    out, out_buffer = empty("out", case.out_dtype or case.dtype)
    dx, dx_buffer = empty("dx", case.dtype)
    dz, dz_buffer = empty("dz", case.z_dtype or case.dtype)
    given = _arguments(inputs)
    with poisoned_memory():
        y, mean, rstd = gatednorm.layernorm_forward(
            *given, is_rms_norm=case.is_rms_norm, **case.options, out=out
        )
        _, dw, db, _ = gatednorm.layernorm_backward(
            inputs.dy, *given, mean, rstd, is_rms_norm=case.is_rms_norm, **case.options,
            dx=dx, dz=dz if case.gated else None,
        )  # fmt: skip
    assert y is out
    found = {"y": out.clone(), "dx": dx.clone(), "dz": dz.clone(), "dw": dw, "db": db}
    for name, view, buffer in (
        ("out", out, out_buffer), ("dx", dx, dx_buffer), ("dz", dz, dz_buffer),
    ):  # fmt: skip
        view.fill_(NAN)
        assert buffer.isnan().all(), f"{name} of {case.id()}: written outside of the view"
    absent = {"dz": case.gated, "dw": case.weight, "db": case.bias}
    return {k: v for k, v in found.items() if absent.get(k, True)}


def check(case: Case, device: str, route=through_autograd) -> dict[str, Tensor]:
    """Run a case, compare it with float64, and see that its inputs are as they were."""
    inputs = inputs_of(case, device)
    before = inputs.snapshot()
    got = route(case, inputs)
    assert inputs.unchanged_since(before), f"{case.id()}: an input was written to"
    check_results(case, inputs, got)
    return got


# ---- hypothesis ----

OUTER = [
    (), (1,), (2,), (3,), (5,), (9,), (17,), (33,), (70,),
    (2, 3), (3, 1), (5, 7), (2, 1, 3), (3, 2, 4), (2, 3, 5), (2, 1, 3, 2), (0,), (3, 0),
]  # fmt: skip
GROUP_SIZES = [
    1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 129, 255, 256, 257, 320, 500,
    512, 513, 600, 640, 768, 1000, 1001, 1024, 1280, 1536, 2047, 2048, 2560, 4097,
]  # fmt: skip


@st.composite
def layouts(draw, outer_dims: int, inputs: bool) -> Layout:
    order = None
    if outer_dims in (2, 3):
        order = draw(st.sampled_from([None, tuple(reversed(range(outer_dims)))]))
        if outer_dims == 3:
            order = draw(st.sampled_from([None, (0, 2, 1), (1, 0, 2), (2, 1, 0)]))
    return Layout(
        order=order,
        left=draw(st.sampled_from([0, 1, 8, 16])) if outer_dims < 4 else 0,
        right=draw(st.sampled_from([0, 3, 16])) if outer_dims < 4 else 0,
        offset=draw(st.sampled_from([0, 1, 2, 8])),
        expand=inputs and outer_dims in (1, 2) and draw(st.integers(0, 9)) == 9,
    )


@st.composite
def cases(draw, dtypes: list[torch.dtype], max_elements: int = 30_000) -> Case:
    """Any call: every option, odd sizes, layouts of their own for every tensor."""
    outer = draw(st.sampled_from(OUTER))
    group_size = draw(st.sampled_from(GROUP_SIZES))
    groups = draw(st.sampled_from([1, 2, 3, 8]))
    rows = 1
    for size in outer:
        rows *= size
    if rows * group_size * groups > max_elements:
        groups = 1
    if rows * group_size > max_elements:
        outer = outer[-1:] if rows and outer[-1] * group_size <= max_elements else (3,)
    dtype = draw(st.sampled_from(dtypes))
    others = [None, *dtypes]
    return Case(
        outer=outer,
        group_size=group_size,
        groups=groups,
        is_rms_norm=draw(st.booleans()),
        norm_before_gate=draw(st.booleans()),
        gated=draw(st.sampled_from([True, True, True, False])),
        activation=draw(st.sampled_from(["silu", "sigmoid", "swish"])),
        weight=draw(st.sampled_from([True, True, False])),
        bias=draw(st.booleans()),
        zero_centered=draw(st.booleans()),
        numerics=draw(st.sampled_from(["fp32", "fp32", "mamba2", "qwen3_next", "torchtitan"])),
        eps=draw(st.sampled_from([1e-5, 1e-6, 1e-3, 1.0])),
        dtype=dtype,
        z_dtype=draw(st.sampled_from(others)),
        w_dtype=draw(st.sampled_from(others)),
        out_dtype=draw(st.sampled_from(others)),
        layouts={
            name: draw(layouts(len(outer), name in ("x", "z", "dy")))
            for name in ("x", "z", "dy", "out", "dx", "dz")
        },
        magnitude=draw(st.sampled_from([1.0, 0.05, 20.0])),
        seed=draw(st.integers(0, 3)),
    )
