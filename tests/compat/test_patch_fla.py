"""`gatednorm.patch` on flash-linear-attention's own code, where that is installed."""

import pytest
import torch
from torch import nn

import gatednorm
from published_models import FLA

pytestmark = pytest.mark.slow  # under the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = {
    "FusedRMSNormGated": {"activation": "sigmoid"},
    "FusedLayerNormGated": {"bias": True},
    "RMSNormGated": {"group_size": 8},
    "LayerNormGated": {"norm_before_gate": False},
}


@pytest.fixture
def fla(monkeypatch):
    """The package, whose kernels run on a GPU or under Triton's interpreter."""
    fla = pytest.importorskip("fla", reason="needs flash-linear-attention")
    autotuner = pytest.importorskip("triton.runtime.autotuner", reason="needs triton")
    if DEVICE == "cpu":  # the interpreter cannot time configurations; the first of them will do
        monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda *_, **__: [1.0] * 3)
    return fla


def agree(run, *targets) -> None:
    """`run()` returns tensors; with each target patched, the same within a few fp32 roundings."""
    want = run()
    for target in targets:
        with gatednorm.patch(target) as handle:
            assert handle.count
            for a, b in zip(run(), want, strict=True):
                assert (a - b).norm() <= 5e-5 * b.norm()


@pytest.mark.parametrize("name", NORMS)
def test_a_norm(fla, name):
    """Outputs and all gradients, with the package patched and with the module."""
    from fla.modules import norm as norms

    torch.manual_seed(0)
    norm = getattr(norms, name)(16, **NORMS[name]).to(DEVICE)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, z = (torch.randn(2, 5, 16, device=DEVICE, requires_grad=True) for _ in range(2))

    def run():
        y = norm(x, z)
        return [y, *torch.autograd.grad(y.sin().sum(), [x, z, *norm.parameters()])]

    agree(run, "fla", norm)


def test_a_model(fla):
    """A Gated DeltaNet that exists, and a name that a layer has imported."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    options = {**FLA, "head_dim": 16, "fuse_norm": False, "fuse_swiglu": False}
    del options["model_type"]
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(**options, fuse_cross_entropy=False)
    model = GatedDeltaNetForCausalLM(config).eval().to(DEVICE)
    tokens = torch.randint(0, 50, (1, 12), device=DEVICE)

    @torch.no_grad()
    def run():
        return [model(input_ids=tokens, use_cache=False).logits]

    agree(run, "fla", model)
    with gatednorm.patch("fla"):
        from fla.layers import lightnet
        from fla.modules.fused_norm_gate import rms_norm_swish_gate_linear

        assert lightnet.rms_norm_swish_gate_linear is rms_norm_swish_gate_linear
        assert rms_norm_swish_gate_linear.__module__ == "gatednorm.compat.fla"
    assert lightnet.rms_norm_swish_gate_linear.__module__.startswith("fla.")
