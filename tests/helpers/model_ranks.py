"""Whole models over several processes, against one process in float64.

    python tests/helpers/model_ranks.py 2
    python tests/helpers/model_ranks.py gpus [CHECK]    # two, over NCCL

How the ranks are started: each_rank.py.
"""

import sys
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from each_rank import device, refused, run_on_ranks
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.generation import generate
from models.language_model import LanguageModel
from models.tensor_parallel import TensorParallel

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2}
DELTA = GatedDeltaNetConfig(**SIZES, num_heads=4, head_dim=8, num_v_heads=8)
MAMBA = Mamba2Config(**SIZES, d_state=8, head_dim=8)
CONFIGS: dict[str, ModelConfig] = {
    "delta": DELTA,
    "delta with an MLP and one key head": replace(
        DELTA, num_heads=1, num_v_heads=4, mlp_ratio=4.0, conv_bias=True, tie_embeddings=False
    ),
    "delta without a gate": replace(DELTA, use_gate=False, num_heads=2, num_v_heads=4),
    "mamba2 with one group": replace(MAMBA, mlp_ratio=4.0),
    "mamba2 with two groups": replace(MAMBA, n_groups=2),
    "mamba2 with four groups, two of the norm": replace(MAMBA, n_groups=4, norm_groups=2),
}

Tensors = dict[str, torch.Tensor]


def configs() -> dict[str, ModelConfig]:
    """On GPUs with heads as wide as models have them."""
    if device().type == "cpu":
        return CONFIGS
    wide = {"hidden_size": 256, "head_dim": 64}
    sizes = {GatedDeltaNetConfig: wide, Mamba2Config: {**wide, "d_state": 64}}
    return {name: replace(config, **sizes[type(config)]) for name, config in CONFIGS.items()}


def model_of(config: ModelConfig, dtype: torch.dtype, **options) -> LanguageModel:
    """The same on every rank, and in every dtype."""
    torch.manual_seed(0)
    model = LanguageModel(config, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norm weights of ones would hide which is which
        parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def tokens_of(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (2, 33), generator=generator)


def results(
    model: LanguageModel,
    tokens: torch.Tensor,
    plan: TensorParallel | None,
    copies: dist.ProcessGroup | None = None,
) -> Tensors:
    """Logits, loss, norm of the gradients, and the whole gradients, clipped."""
    logits, _ = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    if plan is None:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    else:
        plan.reduce_gradients(copies)
        norm = plan.clip_gradients(0.1)
    grads = {name: p.grad for name, p in model.named_parameters()}
    if plan is not None:
        grads = {name: plan.whole(name, grad) for name, grad in grads.items()}
    return {"logits": logits.detach(), "loss": loss.detach(), "norm": norm, **grads}


def models() -> None:
    """All that one process computes: in float64 to its last digits, in fp32, and on GPUs under bf16
    autocast, with at most twice the error that one process makes and four units in the last place
    (of bf16 one); and the same bits on every rank."""
    wrong = []
    for name, config in configs().items():
        truth = results(model_of(config, torch.float64), tokens_of(config), None)
        tokens = tokens_of(config).to(device())
        for dtype in (torch.float32, plain_dtype() if device().type == "cpu" else torch.bfloat16):
            mixed = dtype == torch.bfloat16
            made = partial(model_of, config, torch.float32 if mixed else dtype)
            with torch.autocast(device().type, torch.bfloat16, enabled=mixed):
                allowed = errors(results(made().to(device()), tokens, None), truth)
                for fused in (False, True):
                    model = made().to(device())
                    for block in model.blocks:
                        block.mixer.fuse_norm_linear = fused
                    ours = results(model, tokens, TensorParallel(model, dist.group.WORLD))
                    for key, tensor in ours.items():
                        if not same_on_all_ranks(tensor):
                            wrong.append((name, key, dtype, fused, "other bits on other ranks"))
                    for kind, error in errors(ours, truth).items():
                        limit = 2 * allowed[kind] + (1 if mixed else 4) * torch.finfo(dtype).eps
                        limit = 1e-12 if dtype == torch.float64 else limit
                        if error > limit:
                            wrong.append((name, kind, dtype, fused, error, limit))
    assert not wrong, wrong


def plain_dtype() -> torch.dtype:
    """In which several processes compute what one does; kernels have no float64."""
    return torch.float64 if device().type == "cpu" else torch.float32


def close(ours: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    atol = 1e-12 if ours.dtype == torch.float64 else 1e-3 * truth.abs().max().item()
    torch.testing.assert_close(ours, truth, rtol=0, atol=atol, msg=what or None)


def errors(found: Tensors, truth: Tensors) -> dict[str, float]:
    """Relative ones, a root mean square over all that is of a kind: over the layers."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for key, true in truth.items():
        kind = key.partition(".mixer.")[2] or key.partition(".mlp.")[2] or key.rpartition(".")[2]
        error = (found[key].to(true) - true) / true.abs().max()
        kinds.setdefault(kind, []).append(error.flatten())
    return {kind: torch.cat(parts).square().mean().sqrt().item() for kind, parts in kinds.items()}


def mean_over_copies() -> None:
    """Half of the ranks for each of two parts of a batch: the gradients of the whole batch."""
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("data", "tensor"))
    for config in two_configs():
        tokens = tokens_of(config).to(device())
        one, model = (model_of(config, plain_dtype()).to(device()) for _ in range(2))
        truth = results(one, tokens, None)
        plan = TensorParallel(model, mesh.get_group("tensor"))
        own = tokens[mesh.get_local_rank("data")][None]
        ours = results(model, own, plan, mesh.get_group("data"))
        for key in truth.keys() - {"logits", "loss"}:
            close(ours[key], truth[key])


def two_configs() -> list[ModelConfig]:
    return [configs()["delta"], configs()["mamba2 with one group"]]


def parts_and_wholes() -> None:
    """Every parameter comes back from the ranks as it was, to the bit."""
    for name, config in configs().items():
        one, model = (model_of(config, torch.float32).to(device()) for _ in range(2))
        before = dict(one.named_parameters())
        plan = TensorParallel(model, dist.group.WORLD)
        assert model.num_parameters() < sum(p.numel() for p in before.values())
        for key, parameter in model.named_parameters():
            assert torch.equal(plan.whole(key, parameter.data), before[key]), (name, key)
            assert torch.equal(plan.part(key, before[key]), parameter), (name, key)


def other_calls() -> None:
    """What gives the same as plain training steps: packed sequences, blocks computed again in the
    backward, compiled blocks, the inference path; and generation, of the same tokens."""
    offsets = torch.tensor([0, 7, 32], dtype=torch.int32)
    for config in two_configs():
        tokens = tokens_of(config).to(device())
        one, model = (model_of(config, plain_dtype()).to(device()) for _ in range(2))
        plan = TensorParallel(model, dist.group.WORLD)
        packed = [m(tokens[:1, :32], cu_seqlens=offsets)[0] for m in (one, model)]
        close(*packed)
        truth = results(one, tokens, None)
        for compiled, again in ((False, True), (True, False)):
            model.zero_grad()
            prepare_blocks(model, compiled, again)
            for key, tensor in results(model, tokens, plan).items():
                close(tensor, truth[key], key)
        for path in ("inference", "training"):
            one, model = (model_of(config, torch.float32).to(device()) for _ in range(2))
            TensorParallel(model, dist.group.WORLD)
            assert torch.equal(text_of(one, tokens, path), text_of(model, tokens, path)), path
        refused(ValueError, "seed must be a number where", partial(generate, model, tokens, 1))


def text_of(model: LanguageModel, tokens: torch.Tensor, path: str, **options) -> torch.Tensor:
    model.set_norm_path(path)
    made = generate(model, tokens[:, :9], 12, temperature=0.9, seed=3, **options)
    return torch.stack(list(made))


def decoding_in_a_graph() -> None:
    """The step of a shared model, its exchanges included, as one CUDA graph: the same tokens."""
    for config in two_configs():
        model = model_of(config, torch.float32).to(device())
        TensorParallel(model, dist.group.WORLD)
        tokens = tokens_of(config).to(device())
        eager, graph = (text_of(model, tokens, "inference", cuda_graph=on) for on in (False, True))
        assert torch.equal(eager, graph)


def prepare_blocks(model: LanguageModel, compiled: bool, again: bool) -> None:
    """As train.py has them."""
    for block in model.blocks:
        block.forward = type(block).forward.__get__(block)
        if again:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif compiled:
            block.forward = torch.compile(block.forward, backend="aot_eager")


def what_does_not_fit() -> None:
    ranks = dist.get_world_size()
    bad = {
        f"num_v_heads must be a multiple of the number of ranks, got 3 for {ranks}; use 1": (
            replace(DELTA, num_heads=3, num_v_heads=3), {}),
        "num_heads must be a multiple of the number of ranks, or divide it, got 3": (
            replace(DELTA, num_heads=3, num_v_heads=12), {},
        ),
        "num_heads must be a multiple": (replace(MAMBA, hidden_size=4, head_dim=8), {}),
        "n_groups must be a multiple of the number of ranks, or divide it": (
            replace(MAMBA, hidden_size=48, n_groups=3), {},
        ),
        "norm_groups must cover whole ranks, or lie within one": (
            replace(MAMBA, hidden_size=48, norm_groups=3), {},
        ),
        "the MLP's inner size must be a multiple": (replace(MAMBA, mlp_size=7), {}),
        "bias must be False": (replace(MAMBA, bias=True), {}),
        f"exact mode needs a single rank, got {ranks}": (MAMBA, {"exact": True}),
    }  # fmt: skip
    for says, (config, options) in bad.items():
        model = model_of(config, torch.float32, **options)
        refused(ValueError, says, lambda model=model: TensorParallel(model, dist.group.WORLD))
        model(torch.zeros(1, 64, dtype=torch.int64))  # is as it was
    model = model_of(MAMBA, torch.float32)
    TensorParallel(model, dist.group.WORLD)
    model.exact = True
    refused(ValueError, "exact mode needs a single rank", lambda: model(tokens_of(MAMBA)))


def same_on_all_ranks(tensor: torch.Tensor) -> bool:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


CHECKS = {
    "2": (2, [models, parts_and_wholes, what_does_not_fit, other_calls]),
    "4": (4, [models, parts_and_wholes, what_does_not_fit, mean_over_copies]),
    "gpus": (
        2,
        [parts_and_wholes, decoding_in_a_graph, mean_over_copies, other_calls, models],
        "nccl",
    ),
}

if __name__ == "__main__":
    size, checks, *backend = CHECKS[sys.argv[1]]
    asked = sys.argv[2:]
    run_on_ranks(size, [c for c in checks if not asked or c.__name__ in asked], *backend)
