"""The registered operators `gatednorm_models::...`: what torch.compile and torch.export see of the
scans and of the convolution, each as one call with its backward as another. Offsets of packed
sequences, loops over chunks and Triton kernels are inside, so that one graph serves all lengths.
Eager code calls the same functions without an operator around them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "gatednorm_models"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str,
    tensors: str,
    options: str,
    kept: int,
    like: int,
    run: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    run_backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator of a function with a state, and its derivative.

    ``operator(*tensors, cu_seqlens, *options)`` returns outputs, final states and `kept` tensors
    for the backward, the last two flat: a size of 1, for example of a single sequence or chunk,
    would have the compiler begin again. What torch.compile has kept on a disk calls it after an
    upgrade too: a new option comes last and has a default, and any other change takes another name.

    Args:
        tensors, options: the arguments as a schema has them; all the tensors have a gradient.
        like: which of the tensors has the shape and dtype of the outputs.
        run: what the operator calls, on every device.
        fake: the same as it comes out of the operator, without values.
        run_backward: of the gradients of what came out, outputs and final states (None where
            these were not used), the tensors, cu_seqlens, what was kept and the options; returns
            the gradients of the tensors.
    """
    count = tensors.count("Tensor")
    inputs, keep = f"{tensors}, Tensor? cu_seqlens", "".join(f", Tensor k{i}" for i in range(kept))

    def forward(*arguments):
        y, *others = run(*arguments)
        return y.contiguous(), *(t.flatten() for t in others)

    def backward(dy, dfinal, *others):
        grads = zip(run_backward(dy, dfinal, *others), others[:count], strict=True)
        # an operator returns tensors only: an absent one becomes a tensor of no elements
        return tuple(dy.new_empty(0) if t is None else g.to(t.dtype).contiguous() for g, t in grads)

    def backward_fake(dy, dfinal, *others):
        return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in others[:count])

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # a gradient of zeros costs as much as any
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[: count + 1], *output[2:])
        ctx.options = inputs[count + 1 :]

    def differentiate(ctx, dy, dfinal, *_):
        saved = ctx.saved_tensors  # once: activation checkpointing gives them away
        dy = torch.zeros_like(saved[like]) if dy is None else dy
        grads = operator_backward(dy, dfinal, *saved, *ctx.options)
        grads = zip(grads, saved[:count], strict=True)
        return *(None if t is None else g for g, t in grads), None, *(None for _ in ctx.options)

    operator = _define(f"{name}({inputs}, {options})", 2 + kept, forward, fake)
    schema = f"{name}_backward(Tensor dy, Tensor? dfinal, {inputs}{keep}, {options})"
    operator_backward = _define(schema, count, backward, backward_fake)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=_library)
    return operator


def _define(arguments: str, results: int, run: Callable, fake: Callable) -> Callable:
    name = arguments.partition("(")[0]
    _library.define(f"{arguments} -> ({', '.join(['Tensor'] * results)})")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name)
