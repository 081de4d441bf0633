"""LayerNorm and RMSNorm: parameters and one call."""

import copy
import pickle

import pytest
import torch

import gatednorm
from gatednorm import LayerNorm, RMSNorm
from norm_cases import Case, inputs_of, same_bits


@pytest.mark.parametrize("norm_path", ["training", "inference"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["gate_after", "gate_before"])
@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_module_is_the_function(path, module, norm_before_gate, norm_path):
    norm = module(
        32, 1e-4, 8, norm_before_gate, path.device, activation="sigmoid", zero_centered=True,
        numerics="mamba2", path=norm_path,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(0))
    i = inputs_of(Case((3, 5), 8, 4, dtype=torch.float16), path.device)
    with torch.set_grad_enabled(norm_path == "training"):
        got = norm(i.x, i.z)
    want = gatednorm.gated_norm_ref(
        i.x.float(), norm.weight, norm.bias, i.z.float(), 1e-4, 8, norm_before_gate,
        is_rms_norm=module is RMSNorm, activation="sigmoid", zero_centered=True,
    )  # fmt: skip
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=4e-3, atol=4e-3)
    assert got.requires_grad == (norm_path == "training")


def test_parameters(path):
    """Ones, or zeros around which a centred weight lies; a bias for layer norm alone."""
    kwargs = {"device": path.device, "dtype": torch.float16}
    rms, layer = RMSNorm(16, **kwargs), LayerNorm(16, **kwargs)
    centred = RMSNorm(16, zero_centered=True, **kwargs)
    assert {k: float(v.sum()) for k, v in rms.state_dict().items()} == {"weight": 16.0}
    assert {k: float(v.sum()) for k, v in layer.state_dict().items()} == {"weight": 16.0, "bias": 0}
    assert {k: float(v.sum()) for k, v in centred.state_dict().items()} == {"weight": 0.0}
    assert rms.bias is None
    assert all(p.dtype == torch.float16 for p in layer.parameters())
    x = torch.randn(5, 16, device=path.device)
    assert same_bits(rms(x), centred(x))
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.bias.fill_(3.0)
    layer.reset_parameters()
    assert layer.weight.sum() == 16
    assert layer.bias.sum() == 0


def test_defaults_are_the_copies():
    """eps 1e-5, one group, the gate last, silu, a weight around one, fp32, training."""
    norm = RMSNorm(16)
    assert (norm.eps, norm.group_size, norm.norm_before_gate) == (1e-5, None, True)
    assert (norm.activation, norm.zero_centered, norm.numerics) == ("silu", False, "fp32")
    assert norm.path == "training"
    assert norm.weight.dtype == torch.float32


def test_training_moves_the_parameters(path):
    norm = LayerNorm(16, group_size=4, device=path.device)
    i = inputs_of(Case((9,), 4, 4), path.device)
    norm(i.x, i.z).backward(i.dy)
    for parameter in norm.parameters():
        assert parameter.grad.abs().min() > 0
    torch.optim.SGD(norm.parameters(), 0.1).step()
    assert not same_bits(norm.weight, torch.ones_like(norm.weight))


def test_path_switches_at_any_time(path):
    norm = RMSNorm(16, norm_before_gate=False, device=path.device)
    x, z = torch.randn(2, 5, 16, device=path.device)
    trained = norm(x, z)
    norm.path = "inference"
    with pytest.raises(RuntimeError, match=r"weight requires a gradient.*rmsnorm_fn"):
        norm(x, z)
    with torch.inference_mode():
        assert same_bits(norm(x, z), trained)
    norm.path = "training"
    assert norm(x, z).requires_grad


def test_copies_keep_everything(path):
    norm = RMSNorm(16, 1e-3, 4, False, path.device, activation="sigmoid", path="inference")
    x, z = torch.randn(2, 5, 16, device=path.device)
    with torch.no_grad():
        want = norm.requires_grad_(False)(x, z)
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert other.path == "inference"
            assert same_bits(other(x, z), want)
    assert "group_size=4" in repr(norm)
    assert "path=inference" in repr(norm)


BAD = {
    "width": (ValueError, r"hidden_size must be at least 1, got 0", {"hidden_size": 0}),
    "width_type": (TypeError, r"hidden_size must be an int, got 'a'", {"hidden_size": "a"}),
    "group_size": (
        ValueError, r"group_size must divide hidden_size, got group_size=5 and hidden_size=16; use",
        {"group_size": 5},
    ),
    "no_group": (ValueError, r"group_size must divide", {"group_size": 0}),
    "group_type": (TypeError, r"group_size must be an int.*4\.0", {"group_size": 4.0}),
    "activation": (ValueError, r"activation.*'gelu'", {"activation": "gelu"}),
    "numerics": (ValueError, r"numerics.*'fp8'", {"numerics": "fp8"}),
    "path": (ValueError, r"path must be one of.*'fast'", {"path": "fast"}),
    "eps": (ValueError, r"eps must be.*-1\.0", {"eps": -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("module", [LayerNorm, RMSNorm])
def test_bad_options(module, case):
    """Refused before any parameter is made."""
    error, pattern, changed = BAD[case]
    with pytest.raises(error, match=pattern):
        module(**{"hidden_size": 16, **changed})
