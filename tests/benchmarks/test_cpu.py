"""The memory that benchmarks/cpu.py reports."""

import torch

from benchmarks.cpu import peak_memory

MEGABYTE = 250_000  # in fp32


def test_peak_memory_is_what_is_held_at_once_beyond_what_was_held_before():
    before = [torch.zeros(4 * MEGABYTE)]

    def run():
        before.clear()
        a = torch.zeros(MEGABYTE)
        b = a + 1
        del a
        return (b * 2).sum()

    assert 2e6 <= peak_memory(run) < 2.01e6
