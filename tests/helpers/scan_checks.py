"""What the tests of both scans, and of both mixers around them, share."""

import itertools

import torch

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


def check_steps(layer, x):
    """A mixer's recurrent steps from an empty state equal its chunk-parallel form, x [B, T, D]."""
    with torch.no_grad():
        expected, final = layer(x, output_state=True)
        state = [torch.zeros(shape) for shape in layer.state_shapes(x.shape[0])]
        steps = []
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state, output_state=True)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(state, final, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def check_packed(layer, x, offsets):
    """Sequences packed into x [1, T, D] equal each alone: outputs, states and the gradients of
    every parameter."""
    cotangent = torch.randn_like(x)
    y, state = layer(x, output_state=True, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    packed = torch.autograd.grad(y, list(layer.parameters()), cotangent)
    parts = [layer(x[:, a:b], output_state=True) for a, b in itertools.pairwise(offsets)]
    expected = torch.cat([part[0] for part in parts], dim=1)
    separate = torch.autograd.grad(expected, list(layer.parameters()), cotangent)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for index in range(2):
        states = torch.cat([part[1][index] for part in parts])
        torch.testing.assert_close(state[index], states, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(packed, separate, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
