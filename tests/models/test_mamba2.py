"""The Mamba-2 mixer against transformers' Mamba2Mixer, and its own two forms."""

import pytest
import torch
from transformers.models.mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from models.mamba2 import Mamba2
from scan_checks import assert_equal_to_transformers, assert_states_equal_to_transformers

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

    theirs.config = config
    return theirs, copy


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers(size, limit, bias):
    layer = make(size, dt_limit=LIMITS[limit], bias=bias)
    x = torch.randn(2, 70, layer.hidden_size)
    assert_equal_to_transformers(layer, *transformers_layer(layer, bias), x)


def test_state_equals_transformers():
    layer = make()  # without a limit, which theirs leaves out when it decodes
    assert_states_equal_to_transformers(layer, *transformers_layer(layer))


def test_norm_groups():
    """The norm has its own number of groups, by default that of the scan."""
    assert make().norm.group_size == 24
    assert make(norm_groups=1).norm.group_size == 96
    assert make(norm_groups=1).n_groups == 4
