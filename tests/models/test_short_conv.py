"""The short convolution against torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.short_conv import short_conv


def make(taps, bias=True, tokens=11, batch=2, width=5):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(width, dtype=torch.float64, requires_grad=True) if bias else None
    state = torch.randn(batch, taps - 1, width, dtype=torch.float64, requires_grad=True)
    return x, weight, bias, state


def reference(x, weight, bias, state):
    padded = torch.cat((state, x), dim=1)
    if not x.shape[1]:
        return x, padded
    y = F.conv1d(padded.mT, weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y.mT), padded[:, x.shape[1] :]


@pytest.mark.parametrize("tokens", [1, 2, 11])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_equals_conv1d(taps, bias, tokens):
    """Outputs, states and gradients, with a state."""
    inputs = make(taps, bias, tokens)
    leaves = [t for t in inputs if t is not None and t.numel()]
    both = []
    for function in (short_conv, reference):
        y, state = function(*inputs)
        both.append((y, state, *torch.autograd.grad(y.sin().sum() + state.cos().sum(), leaves)))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("taps", [1, 4])
def test_packed_equals_separate(taps):
    x, weight, bias, _ = make(taps, batch=1)
    offsets = [0, 1, 1, 3, 11]
    state = torch.randn(4, taps - 1, 5, dtype=torch.float64)
    y, final = short_conv(x, weight, bias, state, torch.tensor(offsets))
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        part, last = reference(x[:, start:end], weight, bias, state[i : i + 1])
        torch.testing.assert_close(y[:, start:end], part)
        torch.testing.assert_close(final[i : i + 1], last)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ((4, 3), None, r"weight must be \[5, 3\] for x \[1, 6, 5\], got \[4, 3\]"),
        ((1, 3), None, r"weight must be \[5, 3\]"),
        ((5, 3), (1,), r"bias must be \[5\]"),
    ],
    ids=["fewer_channels", "one_channel", "bias"],
)
def test_parameters_that_do_not_fit(weight, bias, message):
    bias = None if bias is None else torch.ones(bias)
    with pytest.raises(ValueError, match=message):
        short_conv(torch.ones(1, 6, 5), torch.ones(weight), bias)


def test_state_of_short_prompts_is_padded_with_zeros():
    x, weight, bias, _ = make(4, tokens=2)
    _, state = short_conv(x, weight, bias)
    assert torch.equal(state[:, :1], torch.zeros_like(state[:, :1]))
    assert torch.equal(state[:, 1:], x)
