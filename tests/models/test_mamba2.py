"""The Mamba-2 mixer against transformers' Mamba2Mixer, and its own two forms."""

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.models.mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from models.mamba2 import Mamba2

# hidden size, d_state, head_dim, n_groups; the last two are layers of published models, the 130m
# of state-spaces (24 heads) and Codestral's shape scaled down in width alone
SIZES = {
    "D32-S16-P8-G1": (32, 16, 8, 1),
    "D48-S8-P12-G4": (48, 8, 12, 4),
    "D768-S128-P64-G1": (768, 128, 64, 1),
    "D256-S128-P64-G8": (256, 128, 64, 8),
}
LIMITS = {"no_limit": (0.0, float("inf")), "limit": (0.02, 0.06)}


def make(size="D48-S8-P12-G4", **options):
    torch.manual_seed(0)
    hidden, d_state, head_dim, groups = SIZES[size]
    layer = Mamba2(hidden, d_state=d_state, head_dim=head_dim, n_groups=groups, **options)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.D.normal_()
        layer.conv_bias.normal_()
    return layer


def transformers_layer(layer, bias=False):
    config = Mamba2Config(
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        hidden_size=layer.hidden_size,
        state_size=layer.d_state,
        n_groups=layer.n_groups,
        num_hidden_layers=1,
        chunk_size=64,
        use_bias=bias,
        time_step_limit=layer.dt_limit,
    )
    theirs = Mamba2Mixer(config, 0)

    def copy(target, read):
        target(theirs.conv1d.weight, read(layer.conv_weight)[:, None])
        target(theirs.conv1d.bias, read(layer.conv_bias))
        for name, parameter in layer.named_parameters():
            if not name.startswith("conv"):
                target(theirs.get_parameter(name), read(parameter))

    with torch.no_grad():
        copy(lambda their, our: their.copy_(our), lambda parameter: parameter)
    return theirs, config, copy


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers(size, limit, bias):
    """Outputs and the gradients of the input and of every parameter, with the same weights."""
    layer = make(size, dt_limit=LIMITS[limit], bias=bias)
    theirs, _, copy = transformers_layer(layer, bias)
    x = torch.randn(2, 70, layer.hidden_size, requires_grad=True)
    cotangent = torch.randn_like(x)
    y, _ = layer(x)
    (dx,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    y.backward(cotangent)
    expected = theirs(x)
    (dx_expected,) = torch.autograd.grad(expected, x, cotangent, retain_graph=True)
    expected.backward(cotangent)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dx_expected, rtol=1e-4, atol=1e-5)

    def compare(their, our):
        scale = float(their.grad.abs().max())
        torch.testing.assert_close(our, their.grad, rtol=1e-4, atol=1e-5 * max(1.0, scale))

    copy(compare, lambda parameter: parameter.grad)


def test_state_equals_transformers():
    """The state after a prompt and three steps, and the outputs of the steps, without a limit."""
    layer = make()
    theirs, config, _ = transformers_layer(layer)
    cache = DynamicCache(config=config)
    x = torch.randn(2, 40, layer.hidden_size)
    state, start = None, 0
    with torch.no_grad():
        for end in (37, 38, 39, 40):
            expected = theirs(x[:, start:end], cache_params=cache)
            y, state = layer(x[:, start:end], state, output_state=True)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            start = end
    torch.testing.assert_close(state[1], cache.get_recurrent_state(0, state_idx=0))
    conv = cache.get_conv_state(0, state_idx=0)
    torch.testing.assert_close(state[0].mT, conv[..., -3:], rtol=1e-5, atol=1e-5)


def test_norm_groups():
    """The norm has its own number of groups, by default that of the scan."""
    assert make().norm.group_size == 24
    assert make(norm_groups=1).norm.group_size == 96
    assert make(norm_groups=1).n_groups == 4


BAD = {
    "heads": ({"head_dim": 7}, "head_dim must divide expand"),
    "groups": ({"n_groups": 3}, "n_groups must divide the heads, got n_groups=3 and 8"),
    "norm_groups": ({"norm_groups": 5}, "norm_groups must divide"),
    "expand": ({"expand": 0.3, "head_dim": 1}, "head_dim must divide expand"),
    "state_0": ({"d_state": 0}, "d_state must be a positive integer, got 0"),
    "chunk_0": ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
    "path": ({"norm_path": "fast"}, "path must be one of training, inference, got 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Mamba2(48, **{"d_state": 8, "head_dim": 12, **options})
