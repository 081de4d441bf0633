"""The Gated DeltaNet layer against transformers' Qwen3NextGatedDeltaNet, and its own two forms."""

import pytest
import torch
from transformers.models.qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from models.gated_deltanet import GatedDeltaNet
from scan_checks import assert_equal_to_transformers, assert_states_equal_to_transformers
from small_models import learn, small_model


def make(num_heads=2, num_v_heads=4, head_dim=16, expand_v=0.5, seed=0, **options):
    torch.manual_seed(seed)
    return GatedDeltaNet(
        24,
        num_heads=num_heads,
        num_v_heads=num_v_heads,
        head_dim=head_dim,
        expand_v=expand_v,
        norm_eps=1e-6,
        **options,
    )


def transformers_layer(layer):
    """Qwen3-Next's layer, and how to copy or compare weights, which it has in another order.

    Its projections hold, for each key head in turn, q, k, the v and the gates of that head's value
    heads; and b and a likewise.
    """
    key_heads, value_heads = layer.num_heads, layer.num_v_heads
    config = Qwen3NextConfig(
        hidden_size=layer.hidden_size,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=layer.head_dim,
        linear_value_head_dim=layer.v_head_dim,
        linear_conv_kernel_dim=layer.conv_weight.shape[1],
        rms_norm_eps=layer.norm.eps,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    key, value = key_heads * layer.head_dim, value_heads * layer.v_head_dim
    rows = torch.arange(sum(layer.widths)).split([key, key, value, value, value_heads, value_heads])
    by_head = [r.view(key_heads, -1) for r in rows]
    order_qkvz = torch.cat(by_head[:4], dim=1).flatten()
    order_ba = torch.cat(by_head[4:], dim=1).flatten()

    def copy(target, read):
        for name, ours in (
            ("in_proj_qkvz", read(layer.in_proj.weight)[order_qkvz]),
            ("in_proj_ba", read(layer.in_proj.weight)[order_ba]),
            ("conv1d", read(layer.conv_weight)[:, None]),
            ("norm", read(layer.norm.weight)),
            ("out_proj", read(layer.out_proj.weight)),
        ):
            target(getattr(theirs, name).weight, ours)
        target(theirs.A_log, read(layer.A_log))
        target(theirs.dt_bias, read(layer.dt_bias))

    theirs.config = config
    return theirs, copy


@pytest.mark.parametrize("tokens", [1, 33, 130])
@pytest.mark.parametrize("heads", [(2, 2), (2, 6)], ids=["H2", "H2-HV6"])
def test_equals_qwen3_next(heads, tokens):
    layer = make(*heads)
    assert_equal_to_transformers(layer, *transformers_layer(layer), torch.randn(2, tokens, 24))


def test_equals_qwen3_next_after_200_steps_of_training():
    """Every layer of a model that has learned something, on the inputs that it meets there."""
    model = small_model("gated_deltanet", vocab_size=8, num_v_heads=4, expand_v=1.5, num_layers=4)
    loss, text = learn(model, 200)
    assert loss < 0.5
    inputs = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(text)
    for block, x in zip(model.blocks, list(inputs), strict=True):
        assert_equal_to_transformers(block.mixer, *transformers_layer(block.mixer), x)


def test_state_equals_qwen3_next():
    layer = make()
    assert_states_equal_to_transformers(layer, *transformers_layer(layer))


def test_a_layer_made_without_memory():
    """`to_empty`, `reset_parameters` and a state give the layer that the state is of."""
    layer, x = make(), torch.randn(1, 5, 24)
    with torch.device("meta"):
        other = make()
    other.to_empty(device="cpu").reset_parameters()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


def test_negative_eigenvalues_double_beta():
    """With beta = 2 a step reflects the state along k, which no beta below 1 can do."""
    plain, doubled = make(), make(allow_neg_eigval=True)
    x = torch.randn(1, 9, 24)
    assert not torch.allclose(plain(x)[0], doubled(x)[0])
    with torch.no_grad():
        for layer in (plain, doubled):
            layer.in_proj.weight[sum(layer.widths[:2]) :][: layer.num_v_heads] = 0
        _, state = plain(x, output_state=True)
        state = torch.zeros_like(state[0]), torch.randn_like(state[1])
        plain.A_log.fill_(-30)  # no decay: sigmoid(0) = 1/2 keeps half of what k reads, 1 erases it
        doubled.A_log.fill_(-30)
        token = torch.zeros(1, 1, 24)
        token[..., 0] = 1
        _, (_, after) = doubled(token, state, output_state=True)
        _, (_, half) = plain(token, state, output_state=True)
        torch.testing.assert_close(half - state[1], (after - state[1]) / 2, rtol=1e-4, atol=1e-6)
