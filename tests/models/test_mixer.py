"""What both mixers share: each submodule is called, and what does not fit is refused."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import mixer as mixer_module
from models import products, rows
from models.gated_deltanet import GatedDeltaNet
from models.mamba2 import Mamba2
from scan_checks import make_mixer
from small_models import MIXERS, small_model


class LowRank(nn.Module):
    """A linear layer and an adapter, as LoRA adds one; it has no weight of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, out = linear, linear.out_features
        self.adapter = nn.Sequential(nn.Linear(linear.in_features, 2), nn.Linear(2, out))

    def forward(self, x):
        return self.linear(x) + self.adapter(x)


@pytest.fixture(params=[False, True], ids=["as_on_a_cpu", "padded"])
def padded(request, monkeypatch):
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: request.param)


@pytest.mark.parametrize(
    ("tokens", "fuse"), [(1, False), (300, False), (300, True)], ids=["1", "300", "300-fused"]
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_submodule_is_called(mixer, tokens, fuse, padded):
    """A forward hook of each sees every call, and a module in its place does the work."""
    model = small_model(mixer, mlp_ratio=1.0)
    for block in model.blocks:
        block.mixer.fuse_norm_linear = fuse
    text, called = torch.randint(0, 32, (1, tokens)), []
    leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(text)
    assert sorted(called) == sorted(leaves)
    for block in model.blocks:
        block.mixer.in_proj = LowRank(block.mixer.in_proj)
        block.mixer.out_proj = LowRank(block.mixer.out_proj)
    called.clear()
    _, state = model(text, output_state=True)
    model(text, state)[0].sum().backward()
    assert sorted(called) == sorted(2 * list(leaves))
    for block in model.blocks:
        for linear in (block.mixer.in_proj, block.mixer.out_proj):
            assert all(p.grad.any() for p in linear.adapter[1].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("gated_deltanet", {}),
        ("gated_deltanet", {"num_heads": 1, "use_gate": False}),
        ("mamba2", {"bias": True}),
        ("mamba2", {"n_groups": 2}),
    ],
    ids=["heads", "one_head_no_gate", "bias", "groups"],
)
def test_norm_and_projection_as_one_keep_less_for_the_same_result(mixer, options, dtype):
    layer = make_mixer(mixer, **options).to(dtype)
    x = torch.randn(2, 40, 32, dtype=dtype, requires_grad=True)
    results, held = [], []
    for layer.fuse_norm_linear in (False, True):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            y, _ = layer(x)
        held.append(sum(saved.values()))
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])))
    assert held[0] - held[1] == 2 * 40 * layer.inner_size * x.element_size()
    for apart, fused in zip(*results, strict=True):  # the weight's gradient adds in another order
        torch.testing.assert_close(fused, apart)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("mixer", "options"),
    [(Mamba2, {"d_state": 16, "head_dim": 64}), (GatedDeltaNet, {"num_heads": 2, "head_dim": 64})],
    ids=["mamba2", "gated_deltanet"],
)
def test_norm_and_projection_in_fp8(mixer, options):
    """Close to those in full precision, and not the same."""
    torch.manual_seed(0)
    layer, x = mixer(128, **options), torch.randn(1, 20, 128, requires_grad=True)
    layer.fuse_norm_linear = True
    results = []
    for layer.norm_linear_precision in (None, "fp8_emulated"):
        y, _ = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.out_proj.weight])))
    for plain, fp8 in zip(*results, strict=True):
        assert 0 < (fp8 - plain).norm() < 0.15 * plain.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_the_padded_product_is_the_same(bias, monkeypatch):
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    linear, plain = mixer_module.PaddedLinear(12, 70, bias=bias), nn.Linear(12, 70, bias=bias)
    plain.load_state_dict(linear.state_dict())  # the same keys
    x = torch.randn(2, 5, 12, requires_grad=True)
    results = []
    for module in (linear, plain):
        y = module(x)
        gradients = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
        results.append((y, *gradients))
    assert results[0][0].stride() == (5 * 128, 128, 1)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_products_of_gradients_read_the_zeros_behind_the_rows(monkeypatch):
    """So that their columns are a multiple of 16 bytes; nothing behind rows of someone else."""
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    widths, read = [], rows.with_zeros

    def recorded(dy):
        wide = read(dy)
        widths.append(wide.shape[1])
        return wide

    monkeypatch.setattr(products, "with_zeros", recorded)
    linear, x = mixer_module.PaddedLinear(12, 70), torch.randn(2, 5, 12, requires_grad=True)
    results = []
    for y in (linear(x), F.linear(x, linear.weight, linear.bias)):
        parts = mixer_module.split(y, [40, 20, 10])
        loss = sum(part.sin().sum() * (i + 1) for i, part in enumerate(parts))
        results.append(torch.autograd.grad(loss, [x, *linear.parameters()]))
    assert widths == [72]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    wider = torch.full((5, 128), float("nan"))[:, :70]
    assert read(wider) is wider
    room = rows.side_by_side((torch.ones(2, 5, 70), torch.ones(2, 5, 4))).flatten(0, 1)
    assert read(room).shape[1] == 80
    assert read(room[:, :70]).shape[1] == 70  # others' gradients lie behind these


@pytest.mark.parametrize("together", [True, False], ids=["side_by_side", "apart"])
def test_a_split_has_its_gradient_in_one_piece(together, monkeypatch):
    """Without a copy where the parts' gradients lie side by side, and else in padded rows."""
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    x = torch.randn(2, 5, 70, requires_grad=True)
    expected = torch.randn(2, 5, 70)
    parts = expected.split([40, 20, 10], -1)
    if not together:
        parts = [part.clone() for part in parts]
    (dx,) = torch.autograd.grad(mixer_module.split(x, [40, 20, 10]), x, parts)
    assert torch.equal(dx, expected)
    assert (dx.data_ptr() == expected.data_ptr()) == together
    assert dx.stride(1) == (70 if together else 128)


def test_gradients_that_only_look_like_one_row(monkeypatch):
    """Sums of parts: expanded numbers, which happen to lie one after the other."""
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    x, found = torch.randn(2, 3, 4, requires_grad=True), []
    for parts in (mixer_module.split(x, [1, 3]), x.split([1, 3], -1)):
        sums = torch.stack([part.sum() for part in parts])
        found.append(torch.autograd.grad(sums @ torch.tensor([2.0, 3.0]), x)[0])
    assert torch.equal(*found)


def test_room_for_tokens_first():
    """A row is not as wide as a batch."""
    x = torch.randn(3, 16, 8).transpose(0, 1)
    assert rows.gradient_like(x).untyped_storage().nbytes() == x.numel() * 4


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "padded"])
def test_a_products_result_is_an_ordinary_tensor(exact, monkeypatch):
    """It may change in place; float64 stays so under autocast; frozen weights keep no inputs."""
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    linear, x = mixer_module.PaddedLinear(12, 70), torch.randn(2, 5, 12, requires_grad=True)
    linear.exact = exact
    y = linear(x)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        linear.requires_grad_(False)(x)
    assert kept == [(70, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.double()(x.double()).dtype == torch.float64


def test_a_gradient_with_room_beside_it_stays_where_it_is():
    """The others and zeros for the padding are written around it, once; nothing is written beside a
    part that only looks like it."""
    whole = torch.randn(2, 5, 70)
    left, part, right = whole.split([10, 40, 20], -1)
    here = rows.gradient_like(part)
    here._base.fill_(float("nan"))
    here.copy_(part)
    together = rows.side_by_side((left, here, right))
    assert torch.equal(together, whole)
    assert together.data_ptr() == here._base.data_ptr()
    assert torch.equal(here._base[..., 70:], torch.zeros(2, 5, 58))
    for other in (here, torch.zeros(2, 5, 128)[..., 10:50]):
        before = other._base.clone()
        copied = rows.side_by_side((left.neg(), other, right))
        assert torch.equal(copied, torch.cat((left.neg(), other, right), -1))
        assert torch.equal(other._base, before)
    for alone in (torch.randn(2, 5, 8), torch.randn(1, 8).expand(2, 5, 8), whole.mT):
        assert rows.gradient_like(alone).is_contiguous()


@pytest.mark.parametrize("mixer", MIXERS)
def test_bad_state(mixer):
    layer, x = make_mixer(mixer), torch.randn(2, 3, 32)
    _, (conv, scan) = layer(x, output_state=True)
    for state, message in (
        ((conv[:1], scan), "the convolution's state must have shape"),
        ((conv, scan[:1]), "initial_state must have shape"),
        ((conv, scan.double()), "initial_state must be torch.float32"),
        ((conv.double(), scan), "the convolution's state must be torch.float32"),
        ((conv.to("meta"), scan), "must be on the device of the input"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, state)


BAD = [
    ("gated_deltanet", {"num_v_heads": 3}, "multiple of num_heads, got 3 and 2"),
    ("gated_deltanet", {"head_dim": 5, "expand_v": 1.5}, "must be a whole number from 1, got 5"),
    ("gated_deltanet", {"expand_v": 1e-9}, "must be a whole number from 1, got 16"),
    ("gated_deltanet", {"num_heads": 0}, "num_heads must be a positive integer, got 0"),
    ("mamba2", {"head_dim": 7}, "head_dim must divide expand"),
    ("mamba2", {"n_groups": 3}, "n_groups must divide the heads, got n_groups=3 and 4"),
    ("mamba2", {"norm_groups": 5}, "norm_groups must divide"),
    ("mamba2", {"expand": 0.3, "head_dim": 1}, "head_dim must divide expand"),
    ("mamba2", {"d_state": 0}, "d_state must be a positive integer, got 0"),
    *(
        (mixer, options, message)
        for mixer in MIXERS
        for options, message in (
            ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
            ({"conv_size": 0}, "conv_size must be a positive integer, got 0"),
            ({"norm_path": "fast"}, "path must be one of training, inference, got 'fast'"),
        )
    ),
]


@pytest.mark.parametrize(("mixer", "options", "message"), BAD)
def test_bad_sizes(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(mixer, **options)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from models import gated_deltanet, generation, kernels, language_model, mamba2
mamba2.Mamba2(32, d_state=16, head_dim=16)(torch.zeros(1, 70, 32))[0].sum().backward()
"""


def test_the_models_need_no_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_what_lies_behind_a_padded_row_has_no_effect(monkeypatch):
    """NaN in all memory that nobody has written; 16-bit products read the padding."""
    monkeypatch.setattr(mixer_module, "pays_to_pad", lambda x: True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    linear = mixer_module.PaddedLinear(64, 200).bfloat16()
    x = torch.randn(1, 100, 64, dtype=torch.bfloat16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        parts = mixer_module.split(linear(x), [72, 128])
        (dx,) = torch.autograd.grad(sum(part.float().square().sum() for part in parts), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert dx.isfinite().all()
