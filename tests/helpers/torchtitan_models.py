"""torchtitan's Qwen3.5 with the override; run where torchtitan and what it imports are installed.

On CPU tensors. torchtitan's scan is flash-linear-attention's, which needs a GPU: that package's own
plain function stands in for it. The trainer and its command line need torchvision and are not run:
the tokens of `--override.imports` are read, and the overrides applied, by torchtitan's functions.
"""

import copy
import itertools
import tempfile

import torch
import torch.distributed as dist
import torchtitan.models.qwen3_5.model as theirs
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchtitan.config.override import OverrideConfig, apply_overrides, parse_cli_imports
from torchtitan.models.qwen3_5 import qwen3_5_configs

from gatednorm.compat.torchtitan import GatedNorm

TARGET = "gatednorm.compat.torchtitan.gated_norm"
DIM, EPS = 64, 1e-6


def scan(q, k, v, g, beta, **_):
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g)


def a_model_with_and_without():
    theirs._fla_chunk_gated_delta_rule = scan
    config = qwen3_5_configs["debugmodel"]("flex")
    stock = config.layers[0].delta_net.norm
    before = copy.deepcopy(config.layers[0].delta_net).build()
    log = apply_overrides(OverrideConfig(imports=parse_cli_imports([TARGET])), config)
    ours = config.layers[0].delta_net.norm
    assert type(ours) is GatedNorm.Config
    for field in ("dim", "eps", "param_init", "sharding_config"):
        assert getattr(ours, field) is getattr(stock, field), field
    after = config.layers[0].delta_net.build()
    for layer in (before, after):
        torch.manual_seed(0)
        layer.init_states(buffer_device=torch.device("cpu"))
    assert isinstance(after.norm, GatedNorm)
    assert before.state_dict().keys() == after.state_dict().keys()
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, 12, 256)
    results = []
    for layer in (before, after):
        y = layer(x)
        y.square().mean().backward()
        results.append((y.detach(), [p.grad for p in layer.parameters()]))
    (y, grads), (our_y, our_grads) = results
    assert torch.equal(y, our_y)
    for a, b in zip(our_grads, grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    print(f"{len(log)} norms replaced; a layer's bits are the same in fp32")


def norms(dtype, w_dtype) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    built = [cls.Config(dim=DIM, eps=EPS).build() for cls in (theirs.RMSNormGated, GatedNorm)]
    weight = torch.rand(DIM, generator=generator) + 0.5
    for norm in built:
        norm.weight.data = weight.to(w_dtype, copy=True)
    x, gate = (torch.randn(1, 24, 4, DIM, generator=generator).to(dtype) for _ in range(2))
    return *built, x, gate


def a_norm_in_every_mix_of_dtypes():
    for dtype, w_dtype in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), repeat=2
    ):
        stock, ours, x, gate = norms(dtype, w_dtype)
        y = stock(x, gate)
        assert ours(x, gate).dtype == y.dtype
        assert torch.equal(ours(x, gate), y), (dtype, w_dtype)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, gate), y)
    print("a norm's bits are the same in nine mixes of dtypes; compiled in one graph")


def two_ranks(rank: int, folder: str):
    """Heads sharded over two ranks, as tensor parallelism has them."""
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    stock, ours, *inputs = norms(torch.float32, torch.float32)
    whole = [t.clone().requires_grad_() for t in inputs]
    y = stock(*whole)
    y.square().sum().backward()
    ours.weight = torch.nn.Parameter(distribute_tensor(ours.weight.data, mesh, [Replicate()]))
    parts = [distribute_tensor(t, mesh, [Shard(2)]).requires_grad_() for t in inputs]
    our_y = ours(*parts)
    assert isinstance(our_y, DTensor)
    assert our_y.placements == (Shard(2),)
    assert torch.equal(our_y.full_tensor(), y)
    our_y.square().sum().backward()
    for mine, own in zip((*parts, ours.weight), (*whole, stock.weight), strict=True):
        assert (mine.grad.full_tensor() - own.grad).norm() <= 1e-5 * own.grad.norm()
    if rank == 0:
        print("two ranks: the result and the gradients of one", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    a_model_with_and_without()
    a_norm_in_every_mix_of_dtypes()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_ranks, (folder,), nprocs=2)
