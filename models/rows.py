"""Gradients of the parts of a row, written where the gradient of the whole row will be.

Shape letters: B batch, T tokens, D channels of a part.
"""

import itertools

import torch
from torch import Tensor

ROW = 64  # channels, 128 bytes in 16 bits: Hopper's fast matrix kernels want rows to begin at those
PRODUCT = 8  # 16 bytes: cuBLAS has its kernels for Hopper where rows and columns are a multiple


def gradient_like(x: Tensor) -> Tensor:
    """An empty tensor like x [B, T, D]. Where x is a part of wider rows it lies in such rows too,
    padded to a multiple of ROW, with room for the gradients of what is beside x."""
    width = x.stride(1)
    start = x.storage_offset() % max(1, width)
    apart = len(x) > 1 and x.stride(0) != x.shape[1] * width  # by tokens first, for example
    if apart or x.stride(2) != 1 or start + x.shape[2] > width or width == x.shape[2]:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    room = x.new_empty(*x.shape[:2], width + -width % ROW)
    room.has_room = True  # nobody else knows of it
    return room[..., start : start + x.shape[2]]


def side_by_side(parts: tuple[Tensor, ...]) -> Tensor:
    """The parts [B, T, D] of a row as one tensor, in padded rows: those of `gradient_like` where it
    has made one of the parts, which then need not move."""
    shape, ends = parts[0].shape[:-1], [*itertools.accumulate(part.shape[-1] for part in parts)]
    # Zeros: oneDNN's products of bf16 read them, and what lies there may be NaN.
    rest = parts[0].new_zeros(*shape, -ends[-1] % ROW)
    for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
        room, start = part._base, end - part.shape[-1]
        if (
            getattr(room, "has_room", False)
            and room.shape == (*shape, ends[-1] + rest.shape[-1])
            and (part.storage_offset(), part.stride()) == (start, room.stride())
        ):
            room.has_room = False
            beside = (parts[:i], room[..., :start]), ((*parts[i + 1 :], rest), room[..., end:])
            for others, place in beside:
                if place.shape[-1]:
                    torch.cat(others, -1, out=place)
            break
    else:
        room = torch.cat((*parts, rest), -1)
    room.zeros_from = ends[-1]
    return room[..., : ends[-1]]


def with_zeros(x: Tensor) -> Tensor:
    """x [R, D] with zeros up to the next multiple of PRODUCT, where it is what `side_by_side` made;
    else x itself."""
    room, width = x._base, x.shape[1]
    if getattr(room, "zeros_from", None) != width or x.storage_offset():
        return x
    if x.stride() != (room.shape[-1], 1):
        return x
    return room.flatten(0, -2)[: len(x), : width + -width % PRODUCT]
