"""The models' Triton kernels: on a GPU, and under Triton's interpreter without one."""

import itertools

import pytest
import torch

from models import chunks, kernels, rows, short_conv, token_log_probs
from models import mixer as mixer_module
from models.exact import CHUNK
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from models.ssd import chunk_ssd, recurrent_ssd
from models.swiglu import swiglu
from paths import GPU, TRITON
from scan_checks import assert_close, make_delta, results
from small_models import MIXERS, small_model

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="needs triton"),
    *([pytest.mark.gpu] if GPU else []),
]
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """The kernels on any device; without a GPU the interpreter runs them."""
    monkeypatch.setattr(kernels, "usable", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", 1 << 40)


def inputs(*shape, sequences=None):
    made = make_delta(*shape, torch.float32, sequences)
    return [x.detach().to(DEVICE).requires_grad_() for x in made]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 24, 70), (130, 33, 5), (64, 128, 64)])
def test_product(rows, inner, columns, bias):
    """Against float64; and a row alone has the bits that it has among others."""
    from models.kernels import product

    g = torch.Generator().manual_seed(0)
    shapes = ((rows, inner), (columns, inner), (columns, 2))
    x, weight, b = (torch.randn(shape, generator=g).to(DEVICE) for shape in shapes)
    b = b[:, 1] if bias else None
    y = product.linear(x, weight, b, 64)
    assert y.stride() == (columns + -columns % 64, 1)
    truth = torch.nn.functional.linear(x.double(), weight.double(), b.double() if bias else None)
    torch.testing.assert_close(y, truth.float(), rtol=1e-5, atol=1e-5)
    for row in range(0, rows, 43):  # at its place in a tile: numpy, which computes here, needs that
        start = row // 64 * 64
        others = torch.cat((torch.randn_like(x[start:row]), x[row : row + 1]))
        assert torch.equal(product.linear(others, weight, b, 64)[-1], y[row])


@pytest.mark.parametrize("words", [5, 4096, 9001])
def test_log_probs(words):
    """Values and gradients against float64; and a row alone has the bits it has among others."""
    g = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 3, words + 1, generator=g)).to(DEVICE)[..., 1:].requires_grad_()
    tokens = torch.randint(0, words, (2, 3), generator=g).to(DEVICE)
    ours = token_log_probs(logits, tokens)
    wide = logits.detach().double().requires_grad_()
    truth = wide.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=3e-6)
    cotangent = torch.randn(2, 3, generator=g).to(DEVICE)
    (grad,) = torch.autograd.grad(ours, logits, cotangent)
    (expected,) = torch.autograd.grad(truth, wide, cotangent.double())
    # 1 - p of a likely token has the roundings of 1
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=3e-7)
    assert torch.equal(token_log_probs(logits[1, 2].clone(), tokens[1, 2]), ours[1, 2])


def test_log_probs_of_a_column_of_tokens():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 70, generator=g).to(DEVICE)
    tokens = torch.randint(0, 70, (3, 4), generator=g).to(DEVICE)
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:2])[:, 0]
    torch.testing.assert_close(token_log_probs(logits, tokens[:, 1]), expected)


def test_log_probs_without_a_number():
    """A block of words that are ruled out is none; a token that is not there gives NaN."""
    logits = torch.randn(3, 9001, device=DEVICE)
    logits[:, :5000] = float("-inf")
    tokens = torch.tensor([7000, -100, 9001], device=DEVICE)
    found = token_log_probs(logits, tokens)
    torch.testing.assert_close(found[0], logits[0].log_softmax(-1)[7000])
    assert found[1:].isnan().all()


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mixer", MIXERS)
def test_exact_mode(mixer, monkeypatch):
    """The bits of a training forward in a prefill of two pieces, decoding and another batch; and
    values and gradients as plain PyTorch in float64 has them."""
    if not GPU:  # numpy's products need a chunk's rows at the same places in a tile
        from models.kernels import product

        monkeypatch.setitem(product.TILES, 4, ({"BI": CHUNK, "BJ": 32, "BK": 64}, {}))
    sizes = {"head_dim": 16, **({"d_state": 12} if mixer == "mamba2" else {})}
    model = small_model(mixer, **sizes, mlp_size=24).to(DEVICE)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (2, CHUNK + 9), generator=g).to(DEVICE)
    model.exact = True
    expected, _ = model(tokens)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with torch.inference_mode():
        parts, state, start = [], None, 0
        for end in (CHUNK - 3, CHUNK + 5, CHUNK + 6, CHUNK + 7, CHUNK + 9):
            logits, state = model(tokens[:1, start:end], state, output_state=True)
            parts, start = [*parts, logits], end
    assert torch.equal(torch.cat(parts, dim=1), expected[:1])
    model.cpu().double().exact = False
    truth, _ = model(tokens.cpu())
    right = torch.autograd.grad(truth.square().sum(), list(model.parameters()))
    ours = [x.cpu() for x in (expected, *grads)]
    assert_close(ours, (truth, *right), 1e-5 if not GPU else 1e-3)


CASES = {  # batch, tokens, heads, value heads, K, V; the chunk; offsets
    "T70-K16-V24": ((2, 70, 2, 2, 16, 24), 32, None),
    "T33-K32-V80": ((1, 33, 1, 1, 32, 80), 32, None),
    "one-chunk": ((1, 12, 2, 2, 16, 16), 32, None),
    "packed-K12-V16": ((1, 60, 1, 2, 12, 16), 32, [0, 3, 3, 36, 60]),
}


@pytest.mark.parametrize("case", CASES)
def test_delta_kernels_equal_the_recurrence(case):
    """Outputs, final states and gradients; more columns than a tile holds, packed sequences, value
    heads that share a key head, sizes that fill no tile."""
    shape, chunk_size, offsets = CASES[case]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    tensors = inputs(*shape, sequences=None if offsets is None else len(offsets) - 1)
    actual = results(chunk_gated_delta_rule, tensors, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = results(recurrent_gated_delta_rule, wide, cu_seqlens=cu_seqlens)
    assert_close(actual, expected, 1e-5 if not GPU else 1e-3)


def test_delta_kernels_in_16_bits():
    """Chunks of 64 tokens, the last of them short."""
    tensors = [x.detach() for x in inputs(1, 130, 1, 2, 32, 80)]
    tensors = [x.half() for x in tensors[:3]] + tensors[3:]
    tensors = [x.requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    actual = results(chunk_gated_delta_rule, tensors, chunk_size=64)
    assert_close(actual, results(recurrent_gated_delta_rule, wide), 3e-3)


def test_delta_kernels_read_tokens_in_place():
    """Slices of packed projections, and a gradient of the output that has strides of its own."""
    q, k, v, g, beta, state = inputs(2, 40, 2, 2, 16, 16)
    packed = torch.cat((q, k, v), dim=-1).detach().requires_grad_()
    pair = torch.stack((g, beta), dim=-1).detach().requires_grad_()

    def of_slices(scan):
        def function(packed, pair, **options):
            o, final = scan(*packed.split(16, -1), *pair.unbind(-1), chunk_size=32, **options)
            return o.transpose(1, 2), final

        return function

    wide = [x.detach().double().requires_grad_() for x in (packed, pair, state)]
    actual = results(of_slices(chunk_gated_delta_rule), [packed, pair, state])
    expected = results(of_slices(recurrent_gated_delta_rule), wide)
    assert_close(actual, expected, 1e-5 if not GPU else 1e-3)


@pytest.mark.parametrize(
    ("dim_k", "chunk_size", "count"), [(12, 32, 1), (12, 16, 0), (12, 64, 0), (132, 32, 0)]
)
def test_delta_kernels_ran(dim_k, chunk_size, count, monkeypatch):
    """A size that the kernels take goes through them, and one that they do not take does not."""
    from models.kernels import gated_delta_rule

    ran, forward = [], gated_delta_rule.forward
    monkeypatch.setattr(gated_delta_rule, "forward", lambda *a: ran.append(1) or forward(*a))
    with torch.no_grad():
        chunk_gated_delta_rule(*inputs(1, 20, 1, 1, dim_k, 8)[:5], chunk_size=chunk_size)
    assert len(ran) == count


@pytest.mark.parametrize("kind", ["float64", "cpu"])
def test_what_no_kernel_holds_is_plain_pytorch(kind, monkeypatch):
    monkeypatch.undo()
    device = DEVICE if kind == "float64" else "cpu"
    x = torch.ones(1, 3, 4, dtype=torch.float64 if kind == "float64" else None, device=device)
    assert kernels.find("short_conv", x) is None


@pytest.fixture
def ran(monkeypatch):
    """How often the kernels of SSD computed a forward."""
    from models.kernels import ssd

    counts, forward = [], ssd.forward
    monkeypatch.setattr(ssd, "forward", lambda *a: counts.append(1) or forward(*a))
    return counts


def ssd_results(function, tensors, **options):
    """As scan_checks.results, from a packed projection: x, B and C are slices of it with tokens far
    apart."""
    packed, dt, a, d, bias, state = tensors
    heads, dim, size = state.shape[1:]
    rest = packed.shape[-1] - 5 - heads * dim
    _, x, b, c, _ = packed.split([3, heads * dim, rest // 2, rest // 2, 2], dim=-1)
    x = x.unflatten(-1, (heads, dim))
    b, c = (t.unflatten(-1, (-1, size)) for t in (b, c))
    options |= {"D": d, "dt_bias": bias, "dt_softplus": True, "output_final_state": True}
    y, final = function(x, dt, a, b, c, initial_state=state, **options)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g).to(t) for t in (y, final)]
    return (y, final, *torch.autograd.grad((y, final), tensors, cotangents))


@pytest.mark.parametrize(("chunk_size", "groups"), [(16, 1), (12, 2)])
@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 25, 43]], ids=["batch", "packed"])
def test_ssd_kernels_equals_the_recurrence(offsets, groups, chunk_size, ran):
    """Outputs, final states and all gradients, of all options; chunks that are no power of 2, and
    states of more columns than a tile."""
    g = torch.Generator().manual_seed(0)
    batch = 2 if offsets is None else 1
    shapes = {"packed": (batch, 43, 69 + 40 * groups), "dt": (batch, 43, 4), "A": (4,)}
    shapes |= {"D": (4,), "bias": (4,), "state": (2 if offsets is None else 4, 4, 16, 20)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].abs()
    tensors = [x.to(DEVICE).requires_grad_() for x in tensors.values()]
    options = {"dt_limit": (0.1, 1.5), "chunk_size": chunk_size}
    options["cu_seqlens"] = None if offsets is None else torch.tensor(offsets)
    actual = ssd_results(chunk_ssd, tensors, **options)
    assert ran == [1]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = ssd_results(recurrent_ssd, wide, **options)
    assert_close(actual, expected, 1e-5 if not GPU else 1e-3)


def test_ssd_kernels_in_chunks_of_one_token(ran):
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 3, 40, generator=g).to(DEVICE)
    dt, a = torch.rand(2, 3, 2, generator=g).to(DEVICE), torch.tensor([-1.0, -0.1]).to(DEVICE)
    b, c = (torch.randn(2, 3, 1, 8, generator=g).to(DEVICE) for _ in range(2))
    inputs = (packed[..., 5:37].unflatten(-1, (2, 16)), dt, a, b, c)
    y, _ = chunk_ssd(*inputs, chunk_size=1)
    assert ran == [1]
    torch.testing.assert_close(y, recurrent_ssd(*inputs)[0], rtol=1e-4, atol=1e-4)


def test_ssd_kernels_without_a_skip_and_for_large_decays(ran):
    """Decays whose inverse overflows; no D; a chunk that does not fit is plain PyTorch."""
    g = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(1, 40, n, 16, generator=g).to(DEVICE) for n in (2, 1, 1))
    dt, a = torch.rand(1, 40, 2, generator=g).to(DEVICE), torch.tensor([-1.0, -200.0]).to(DEVICE)
    tensors = [t.requires_grad_() for t in (x, dt, a, b, c)]

    def gradients(function, inputs, **options):
        y, _ = function(*inputs, **options)
        cotangent = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
        return (y, *torch.autograd.grad(y, inputs, cotangent.to(y.dtype)))

    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = gradients(recurrent_ssd, wide)
    for size, taken in ((32, 1), (128, 0)):
        ran.clear()
        actual = gradients(chunk_ssd, tensors, chunk_size=size)
        assert len(ran) == taken
        assert_close(actual, expected, 1e-5 if not GPU else 1e-3)


TAPS = {  # taps, and whether there is a state, and a bias
    "4-state-bias": (4, True, True),
    "4-no_state": (4, False, True),
    "2-no_bias": (2, True, False),
    "1-no_state-no_bias": (1, False, False),
    "1-state": (1, True, True),
}


@pytest.mark.parametrize("offsets", [[0, 1], [0, 2, 4], [0, 45], [0, 2, 2, 67]], ids=str)
@pytest.mark.parametrize("case", TAPS)
def test_conv_kernels(case, offsets):
    """Outputs, states and gradients, on a slice of a packed projection with an odd width; of one
    sequence, of a batch, and of packed sequences."""
    taps, with_state, with_bias = TAPS[case]
    count, ends = len(offsets) - 1, offsets[1:]
    batch = count if offsets == [0, 2, 4] else 1
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, ends[-1] // batch, 29, generator=g).to(DEVICE).requires_grad_()
    weight = torch.randn(19, taps, generator=g).to(DEVICE).requires_grad_()
    bias = torch.randn(19, 2, generator=g).to(DEVICE)[:, 1]
    bias = bias.requires_grad_() if with_bias else None
    state = torch.randn(count, taps - 1, 19, generator=g).to(DEVICE).requires_grad_()
    given = state if with_state else None
    leaves = [x for x in (packed, weight, bias, given) if x is not None and x.numel()]
    cu_seqlens = torch.tensor(offsets) if batch == 1 else None
    y, final = short_conv.short_conv(packed[..., 5:24], weight, bias, given, cu_seqlens)
    expected, last = [], []
    rows = packed[..., 5:24].flatten(0, 1)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        before = state[i] if with_state else torch.zeros(taps - 1, 19, device=DEVICE)
        padded = torch.cat((before, rows[start:end]))
        if start < end:
            conv = torch.nn.functional.conv1d(padded.mT, weight[:, None], bias, groups=19)
            expected.append(torch.nn.functional.silu(conv.mT))
        last.append(padded[end - start :])
    expected, last = torch.cat(expected).view(y.shape), torch.stack(last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(final, last)
    cotangents = [torch.randn(x.shape, generator=g).to(DEVICE) for x in (y, final)]
    ours = torch.autograd.grad((y, final), leaves, cotangents)
    theirs = torch.autograd.grad((expected, last), leaves, cotangents)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_swiglu_of_an_odd_width():
    with pytest.raises(ValueError, match="gate and value of one width, got 7 channels"):
        swiglu(torch.ones(3, 7, device=DEVICE))


@pytest.mark.parametrize("shape", [(3, 5, 70), (2, 2, 2050)], ids=["part", "more_than_a_program"])
def test_swiglu(shape):
    """Values and gradients against float64, which plain PyTorch computes."""
    g = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=g)).to(DEVICE).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, truth = swiglu(x), swiglu(wide)
    dy = torch.randn(y.shape, generator=g).to(DEVICE)
    (dx,), (expected,) = (
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(truth, wide, dy.double()),
    )
    torch.testing.assert_close(y, truth.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled(mixer):
    """The operators call the kernels; packed sequences leave room that no chunk fills."""
    sizes = {"head_dim": 16, "num_layers": 1, **({"d_state": 12} if mixer == "mamba2" else {})}
    plain, compiled = (small_model(mixer, **sizes).to(DEVICE).blocks[0] for _ in range(2))
    torch.compiler.reset()
    compiled.compile(backend="aot_eager", fullgraph=True)
    x, results = torch.randn(1, 40, 24, device=DEVICE), []
    cu_seqlens = torch.tensor([0, 32, 32, 40], dtype=torch.int32)
    for block in (plain, compiled):
        y, state = block(x, None, True, cu_seqlens)
        loss = y.square().sum() + sum(t.square().sum() for t in state)
        results.append((y, *state, *torch.autograd.grad(loss, list(block.parameters()))))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize(
    ("mixer", "options", "expected"),
    [
        ("mamba2", {}, [False]),
        ("gated_deltanet", {}, [False, False]),
        ("gated_deltanet", {"num_v_heads": 4}, [True, False, False]),  # q and k are sums
    ],
    ids=["mamba2", "gated_deltanet", "value_heads"],
)
def test_gradients_of_a_rows_parts_are_written_into_the_rows(mixer, options, expected, monkeypatch):
    """The convolution's and the values' gradients; with the bits that copied ones have."""
    block = small_model(mixer, head_dim=16, num_layers=1, **options).to(DEVICE).blocks[0]
    x, found, moved = torch.randn(2, 9, 24, device=DEVICE, requires_grad=True), [], []
    beside = rows.side_by_side

    def recorded(parts):
        whole, widths = beside(parts), [part.shape[-1] for part in parts]
        starts = itertools.accumulate(widths[:-1], initial=0)
        places = (whole.data_ptr() + start * whole.element_size() for start in starts)
        moved.append(all(p.data_ptr() != at for p, at in zip(parts, places, strict=True)))
        return whole

    monkeypatch.setattr(mixer_module, "side_by_side", recorded)
    for pad in (False, True):
        monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x, pad=pad: pad)
        y, _ = block(x, None, False, None)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()])))
    assert moved == expected
    assert_close(*found, 1e-6 if not GPU else 1e-3)


def test_grids_of_long_rows_fit_a_gpu(monkeypatch):
    """More chunks and more sequences than the second dimension of a CUDA grid holds; no kernel
    runs."""
    from triton.runtime.jit import KernelInterface

    grids, count = [], (1 << 16) + 1
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda _, grid: lambda *a, **k: grids.append(grid)
    )
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32)
    sizes = {"device": DEVICE, "requires_grad": True}
    q, k, v = (torch.zeros(1, count, 1, 16, **sizes) for _ in range(3))
    g, beta = (torch.zeros(1, count, 1, **sizes) for _ in range(2))
    weight = torch.zeros(16, 4, **sizes)
    state = torch.zeros(count, 3, 16, **sizes)
    for y, _ in (
        chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens),
        chunk_ssd(q, g, g[0, 0], k, v, cu_seqlens=cu_seqlens),
        short_conv.short_conv(q[:, :, 0], weight, None, state, cu_seqlens),
    ):
        y.sum().backward()
    assert len(grids) > 10
    for x, *others in grids:
        assert x < 1 << 31
        assert all(size < 1 << 16 for size in others)
