"""torchtitan's override: its own Qwen3.5 with and without it."""

import pytest

from installed import install, run

# What torchtitan.models.qwen3_5 imports, and no more of what torchtitan asks for.
PACKAGES = (
    "torchtitan==0.3.0", "spmd_types==0.2.3", "tyro==1.0.17", "docstring_parser==0.18.0",
    "typeguard==4.6.1", "fla-core==0.6.0", "flash-linear-attention==0.6.0",
)  # fmt: skip


@pytest.mark.slow
def test_a_model_with_and_without_the_override(tmp_path):
    """torchtitan_models.py says what stands in for what a CPU lacks."""
    out = run(install(tmp_path, *PACKAGES), "torchtitan_models.py")
    assert out.splitlines() == [
        "6 norms replaced; a layer's bits are the same in fp32",
        "nearer to float64 in bf16; compiled in one graph",
        "two ranks: the result and the gradients of one",
    ]
