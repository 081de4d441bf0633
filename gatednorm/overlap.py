"""Overlap: an output may be the same view as an input, or share no element with it."""

from torch import Tensor


def check_no_overlap_within(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raises ValueError for an output in which two indices name one element."""
    if _overlaps_itself(steps_of(shape, strides)):
        raise ValueError(
            f"{name} must not overlap itself, got strides {tuple(strides)} for shape "
            f"{tuple(shape)}; pass a tensor that was not expanded, or None for a new one"
        )


def check_overlap(
    name: str, out: Tensor | None, other_name: str, other: Tensor | None, same: str = ""
) -> None:
    """Raises ValueError for an output that may share an element with an input. The same view of it
    is allowed unless `same` says why not."""
    if out is None or other is None or not out.numel():
        return
    steps, begin, end = _place(out)
    other_steps, other_begin, other_end = _place(other)
    if end <= other_begin or other_end <= begin:
        return
    size, distance = out.element_size(), abs(begin - other_begin)
    alike = steps == other_steps and size == other.element_size() and distance % size == 0
    if alike and distance == 0:
        if same:
            raise ValueError(f"{name} must not be {other_name}, {same}; pass None for a new tensor")
        return
    # Columns of one buffer: both together are a tensor with one more dimension of size 2.
    if not alike or _overlaps_itself([*steps, (distance // size, 2)]):
        raise ValueError(
            f"{name} overlaps {other_name} without being the same view of it, and would corrupt "
            f"it; pass a slice that shares no element with {other_name}, or None for a new tensor"
        )


def steps_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Strides and sizes; a dimension of size 1 may have any stride."""
    return [(s, n) for n, s in zip(shape, strides, strict=True) if n > 1]


def _overlaps_itself(steps: list[tuple[int, int]]) -> bool:
    """Whether two indices may name one element. They cannot where each stride is longer than all
    that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(steps):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _place(t: Tensor) -> tuple[list[tuple[int, int]], int, int]:
    """Strides and sizes, and the first and one-past-last byte that a tensor touches."""
    steps, start = steps_of(t.shape, t.stride()), t.data_ptr()
    reach = sum((size - 1) * stride for stride, size in steps)
    return steps, start, start + (reach + 1) * t.element_size()
