"""What the tests of both scans, and of both mixers around them, share."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from models.gated_deltanet import GatedDeltaNet
from models.mamba2 import Mamba2


def make_mixer(name, **options):
    """A mixer of 32 channels, the same weights at each call."""
    torch.manual_seed(0)
    if name == "mamba2":
        return Mamba2(32, **{"d_state": 16, "head_dim": 16, **options})
    return GatedDeltaNet(32, **{"num_heads": 2, "head_dim": 16, **options})


def results(function, inputs, **options):
    """Output, final state and all gradients; the last of the inputs is the initial state."""
    *rest, state = inputs
    o, final = function(*rest, initial_state=state, output_final_state=True, **options)
    torch.manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in (o, final)]
    return (o, final, *torch.autograd.grad((o, final), inputs, cotangents))


def assert_close(actual, expected, tolerance):
    """Largest error over the largest value, tensor by tensor: output, state, then gradients."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= tolerance, f"tensor {index}: relative error {error:.1e}"


def make_delta(
    batch, tokens, heads, value_heads, dim_k, dim_v, dtype=torch.float64, sequences=None
):
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads, dim_k, dtype=dtype)
    k = F.normalize(torch.randn(batch, tokens, heads, dim_k, dtype=dtype), dim=-1)
    v = torch.randn(batch, tokens, value_heads, dim_v, dtype=dtype)
    g = -torch.rand(batch, tokens, value_heads, dtype=dtype)
    beta = torch.rand(batch, tokens, value_heads, dtype=dtype)
    state = torch.randn(sequences or batch, value_heads, dim_k, dim_v, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


def make_ssd(batch, tokens, heads, groups, dim, size, dtype=torch.float64, sequences=None):
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, tokens, heads, dim, dtype=dtype),
        torch.randn(batch, tokens, heads, dtype=dtype),
        -torch.rand(heads, dtype=dtype) * 4,
        torch.randn(batch, tokens, groups, size, dtype=dtype),
        torch.randn(batch, tokens, groups, size, dtype=dtype),
        torch.randn(heads, dtype=dtype),
        torch.randn(heads, dtype=dtype),
        torch.randn(sequences or batch, heads, dim, size, dtype=dtype),
    ]
    return [x.requires_grad_() for x in inputs]


def with_all(function, **fixed):
    """A scan as a function of (x, dt, A, B, C, D, dt_bias), with softplus."""

    def scan(x, dt, A, B, C, D, dt_bias, **options):
        return function(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, **fixed, **options)

    return scan


def assert_equal_to_transformers(layer, theirs, copy, x):
    """Outputs and the gradients of the input and of every parameter, with the same weights.

    `copy(target, read)` calls `target(their, read(our))` for each parameter of theirs, with ours in
    the same order of channels.
    """
    with torch.no_grad():
        copy(lambda their, our: their.copy_(our), lambda parameter: parameter)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    cotangent = torch.randn_like(x)
    outputs = layer(x)[0], theirs(x)
    dx, dx_expected = (torch.autograd.grad(y, x, cotangent, retain_graph=True) for y in outputs)
    for y in outputs:
        y.backward(cotangent)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dx_expected, rtol=1e-4, atol=1e-5)

    def compare(their, our):
        scale = max(1.0, float(their.grad.abs().max()))
        torch.testing.assert_close(our, their.grad, rtol=1e-4, atol=1e-5 * scale)

    copy(compare, lambda parameter: parameter.grad)


@torch.no_grad()
def assert_states_equal_to_transformers(layer, theirs, copy):
    """The state after a prompt and three steps, and the outputs of the steps."""
    copy(lambda their, our: their.copy_(our), lambda parameter: parameter)
    cache = DynamicCache(config=theirs.config)
    x = torch.randn(2, 40, layer.hidden_size)
    state, start = None, 0
    for end in (37, 38, 39, 40):
        expected = theirs(x[:, start:end], cache_params=cache)
        y, state = layer(x[:, start:end], state, output_state=True)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        start = end
    recurrent = cache.get_recurrent_state(0, state_idx=0)
    torch.testing.assert_close(state[1], recurrent, rtol=1e-5, atol=1e-5)
    conv = cache.get_conv_state(0, state_idx=0)
    torch.testing.assert_close(state[0].mT, conv[..., -3:], rtol=1e-5, atol=1e-5)
