"""What the tests of both scans share."""

import torch


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
