"""One tiny model of every family of transformers that has a gated norm."""

import importlib
import importlib.util

import torch

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_KDA = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 2, "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip

# module: class of the model, class of its config, sizes beside _SIZES
MODELS = {
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {
        "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8,
    }),
    "bamba": ("BambaForCausalLM", "BambaConfig", {**_MAMBA, "attn_layer_indices": [1]}),
    "zamba2": ("Zamba2ForCausalLM", "Zamba2Config", {
        "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 8,
        "num_key_value_heads": 2, "layers_block_type": ["mamba", "hybrid"],
    }),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8,
        "chunk_size": 8, "head_dim": 16,
        "layers_block_type": ["linear_attention", "full_attention"],
    }),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        **_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "shared_intermediate_size": 16,
    }),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        **_LINEAR, **_EXPERTS, "head_dim": 16,
    }),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_LINEAR, "head_dim": 16}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {
        **_LINEAR, **_EXPERTS, "head_dim": 16,
    }),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", _LINEAR),
    "qwen4_exp": ("Qwen4ExpForCausalLM", "Qwen4ExpTextConfig", {
        **_LINEAR, **_EXPERTS, "head_dim": 16, "output_gate_type": "sigmoid", "hc_count": 2,
        "hc_lowrank": 8, "indexer_n_heads": 1, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 16, "indexer_compress_ratio": 4,
    }),
    "kimi_linear": ("KimiLinearForCausalLM", "KimiLinearConfig", {
        **_KDA, "linear_head_dim": 16, "linear_num_heads": 2, "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "bailing_hybrid": ("BailingHybridForCausalLM", "BailingHybridConfig", {
        **_KDA, "head_dim": 16, "num_local_experts": 8, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_mtp_layers": 0,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "glm5_next": ("Glm5NextTextModel", "Glm5NextTextConfig", {
        **_KDA, "qk_rope_head_dim": 0, "q_lora_rank": 16, "n_routed_experts": 2,
        "linear_head_dim": 16, "linear_num_heads": 2, "hc_mult": 2, "index_topk": 16,
        "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "lara_mini": ("LaraMiniForCausalLM", "LaraMiniConfig", {
        **_LINEAR, **_EXPERTS, "head_dim": 16,
    }),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", {
        **_MAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
    }),
}  # fmt: skip


def installed(model: str) -> bool:
    """Whether the installed transformers has this model; imports no model."""
    return importlib.util.find_spec(f"transformers.models.{model}") is not None


def tiny(model: str, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    """A new model in eval mode, from seed 0."""
    name, config, sizes = MODELS[model]
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    if not hasattr(torch.nn.functional, "grouped_mm"):  # before torch 2.10
        sizes = {"experts_implementation": "eager", **sizes}  # one after the other
    sizes = {**_SIZES, **sizes, **options}
    return getattr(modeling, name)(getattr(configuration, config)(**sizes)).to(dtype).eval()
