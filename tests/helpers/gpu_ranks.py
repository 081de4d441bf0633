"""The norm over two GPUs and NCCL: what many_ranks.py and dtensor_ranks.py check over gloo, and
CUDA graphs and current devices. One start of the processes serves all.

    python tests/helpers/gpu_ranks.py
    python tests/helpers/gpu_ranks.py dtensors captured    # some of them
"""

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

import dtensor_ranks
import gatednorm
import many_ranks
from each_rank import device, refused, run_on_ranks
from many_ranks import columns_of, options_of, parts_of
from norm_cases import Case, inputs_of, same_bits


def captured(mode: str = "thread_local") -> None:
    """CUDA graphs of a forward, and of forward and backward: the bits of eager calls, of the values
    that were there and of others."""
    size = dist.get_world_size()
    before = Case((64,), 512 * size, 1, True, False, dtype=torch.bfloat16)
    layer = replace(before, is_rms_norm=False, norm_before_gate=True, bias=True)
    wide = replace(layer, outer=(3, 5), group_size=20_000 * size, norm_before_gate=False)
    own_groups = replace(before, group_size=64, groups=2 * size)
    for case in (before, layer, wide, own_groups):
        i, own = inputs_of(case, device()), columns_of(case)
        leaves = [None if t is None else t.detach().requires_grad_() for t in parts_of(case, i)]
        present, dy = [t for t in leaves if t is not None], i.dy[..., own]

        def forward(leaves=leaves, case=case):
            with torch.no_grad():
                return [gatednorm.layernorm_fn(*leaves, **options_of(case))]

        def both(leaves=leaves, case=case, present=present, dy=dy):
            y = gatednorm.layernorm_fn(*leaves, **options_of(case))
            return [y.detach(), *torch.autograd.grad(y, present, dy)]

        for run in (forward, both):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                results = run()
            for seed in (0, 1):
                other = inputs_of(replace(case, seed=seed), device())
                with torch.no_grad():
                    for t, new in zip((i.x, i.weight, i.bias, i.z, i.dy),
                                      (other.x, other.weight, other.bias, other.z, other.dy),
                                      strict=True):  # fmt: skip
                        if t is not None:
                            t.copy_(new)
                graph.replay()
                for got, want in zip(results, run(), strict=True):
                    assert same_bits(got, want), (case.id(), run.__name__, seed)
            torch.cuda.synchronize()
            del graph, results


def captured_in_the_default_mode() -> None:
    captured("global")


def captured_too_early() -> None:
    """A group's first call says what is wrong, and goes well afterwards."""
    group = dist.new_group(list(range(dist.get_world_size())))
    x = torch.randn(3, 8, device=device())

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            gatednorm.rmsnorm_fn(x, process_group=group)

    refused(RuntimeError, "must not be captured in a CUDA graph", capture)
    gatednorm.rmsnorm_fn(x, process_group=group)
    capture()


def another_current_device() -> None:
    """Every rank's tensors lie on its GPU, and the first GPU is the current one on all ranks."""
    group = dist.new_group(list(range(dist.get_world_size())))
    x = torch.randn(3, 8, device=device()).requires_grad_()
    wanted = gatednorm.rmsnorm_fn(x, process_group=dist.group.WORLD)
    with torch.cuda.device(0):
        y = gatednorm.rmsnorm_fn(x, process_group=group)
        y.sum().backward()
    assert same_bits(y.detach(), wanted.detach())


CHECKS = [
    many_ranks.some_options,
    captured,
    many_ranks.groups_that_do_not_fit,
    many_ranks.a_rank_that_differs,
    many_ranks.bits_of_other_splits,
    another_current_device,
    captured_too_early,
    captured_in_the_default_mode,
    many_ranks.modules_and_projection,
    dtensor_ranks.dtensors,
    dtensor_ranks.unequal_rows,
    dtensor_ranks.what_dtensors_refuse,
    dtensor_ranks.a_parallel_plan,
    many_ranks.compiled,
    many_ranks.kernels_of_every_kind,
    many_ranks.every_option,
]

if __name__ == "__main__":
    asked = sys.argv[1:]
    run_on_ranks(2, [c for c in CHECKS if not asked or c.__name__ in asked], "nccl")
