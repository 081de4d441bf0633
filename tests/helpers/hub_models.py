"""Tiny models of transformers through the kernel hub; run where both packages are installed.

    python hub_models.py REPOSITORY [cuda]

On CPU tensors, unless told otherwise. `KernelConfig` refuses a CPU, so for it transformers is told
that the device is an XPU, for which `kernels` looks no hardware up.
"""

import logging
import sys
from pathlib import Path

import torch
import transformers.integrations.hub_kernels
import transformers.utils.kernel_config
from kernels import (
    LocalLayerRepository,
    Metadata,
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from transformers import (
    AutoModelForCausalLM,
    KernelConfig,
    KimiLinearConfig,
    Mamba2Config,
    Qwen3NextConfig,
)
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

REPOSITORY, DEVICE = Path(sys.argv[1]), sys.argv[2] if sys.argv[2:] else "cpu"
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_experts_per_tok": 2, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "qwen3_next": Qwen3NextConfig(
        **SIZES, num_key_value_heads=1, head_dim=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "fp32": KimiLinearConfig(
        **SIZES, num_key_value_heads=2, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, num_local_experts=4, linear_head_dim=16, linear_num_heads=4,
    ),
    "mamba2": Mamba2Config(
        num_heads=8, head_dim=16, vocab_size=64, hidden_size=64, state_size=16,
        num_hidden_layers=2, n_groups=2, chunk_size=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, use_cache=False,
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def norms(model):
    return [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]


def is_ours(model) -> bool:
    modules = {m.forward.__func__.__module__ for m in norms(model)}
    assert len(modules) == 1, modules
    return modules.pop().startswith(f"_gated_norm_{DEVICE}_")


def step(model):
    model.zero_grad()
    tokens = TOKENS.to(DEVICE)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return out.logits.detach(), grads


def close(ours, theirs) -> bool:
    """Within a few roundings of their dtype, each tensor as a whole."""
    return all(
        (a - b).norm() <= (1e-5 if b.dtype == torch.float32 else 3e-2) * b.norm() + 1e-7
        for a, b in zip(ours, theirs, strict=True)
    )


def by_mapping():
    """`kernels` alone, which takes a CPU, where the bits must be equal."""
    replace_kernel_forward_from_hub(MambaRMSNormGated, "RMSNormGated")
    layer = LocalLayerRepository(REPOSITORY, layer_name="RMSNormGated")
    for name, config in CONFIGS.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).to(DEVICE, dtype)
            for norm in norms(model):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            logits, grads = step(model)
            with use_kernel_mapping({"RMSNormGated": {DEVICE: layer}}, inherit_mapping=False):
                kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=DEVICE)
            assert is_ours(model), name
            our_logits, our_grads = step(model)
            same = torch.equal(our_logits, logits)
            assert same or (DEVICE != "cpu" and close([our_logits], [logits])), (name, dtype)
            assert close(our_grads, grads), (name, dtype)
            print(name, dtype, len(norms(model)), "norms:", "equal bits" if same else "close")
        norm = norms(model)[0]
        x, z = torch.randn(2, 2, 5, norm.weight.numel(), dtype=dtype, device=DEVICE)
        compiled = torch.compile(norm.forward, fullgraph=True)
        assert torch.equal(compiled(x, z), norm(x, z)), name
        with use_kernel_mapping({}, inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE, device=DEVICE)
        assert all(m.forward.__func__ is type(m).forward for m in norms(model)), "not taken back"


def by_config():
    """transformers' own way."""
    if DEVICE == "cpu":
        for module in (transformers.integrations.hub_kernels, transformers.utils.kernel_config):
            module.get_device_type = lambda device=None: "xpu"
    local = {"RMSNormGated": f"{REPOSITORY}:RMSNormGated"}
    for training in (True, False):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3_next"]).to(DEVICE).train(training)
        model.set_use_kernels(True, KernelConfig(dict(local), use_local_kernel=True))
        assert is_ours(model)
        model.train(not training)
        print("set up for training" if training else "set up for inference", "and then changed:",
              is_ours(model))  # fmt: skip
    if DEVICE != "cpu":  # a device_map would need accelerate
        return
    folder = REPOSITORY.parent / "model"
    model.save_pretrained(folder)
    by_name = ("owner/gated-norm:RMSNormGated", {"revision": "main", "trust_remote_code": True})
    config = KernelConfig({"RMSNormGated": by_name}, inherit_mapping=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        use_kernels=True,
        kernel_config=config,
        device_map=None if DEVICE == "cpu" else DEVICE,
    )
    print("from_pretrained:", is_ours(model))


if __name__ == "__main__":
    logging.getLogger("kernels").setLevel(logging.ERROR)
    for variant in sorted((REPOSITORY / "build").iterdir()):
        digest = Metadata.read_from_file(variant / "metadata.json").digest
        digest.validate(type(digest).hash_variant(digest.algorithm, variant))
    by_mapping()
    by_config()
