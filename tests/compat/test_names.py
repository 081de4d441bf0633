"""The peers' names: signatures, defaults, parameters and attributes, as read in their sources."""

import importlib
import inspect

import pytest
import torch

FUSED = "x, g, weight, bias, activation='swish', residual=None, prenorm=False, residual_in_fp32=False, eps=1e-06"  # noqa: E501
LINEAR = "x, g, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-06"  # noqa: E501
RMS = "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
LAYER = f"{RMS}, is_rms_norm=False"
MODULE = "hidden_size, eps=1e-05, group_size=None, norm_before_gate={}, device=None, dtype=None{}"
AFFINE = "hidden_size, elementwise_affine=True"
FORWARD = "x, weight, bias, eps, z=None, out=None, group_size=None, norm_before_gate=True, is_rms_norm=False"  # noqa: E501
BACKWARD = "dy, x, weight, bias, eps, mean, rstd, z=None, group_size=None, norm_before_gate=True, is_rms_norm=False, recompute_output=False, dz=None, out=None"  # noqa: E501

# What a caller of each project may pass. An `activation` at the end, which some copies lack, and
# the options of `rms_norm_ref` are ours.
SIGNATURES = {
    "fla": {
        "rms_norm_gated": FUSED,
        "layer_norm_gated": FUSED,
        "rms_norm_swish_gate_linear": LINEAR,
        "layer_norm_swish_gate_linear": LINEAR,
        "FusedRMSNormGated": f"{AFFINE}, eps=1e-05, activation='swish', device=None, dtype=None",
        "FusedLayerNormGated": f"{AFFINE}, bias=False, activation='swish', eps=1e-05, device=None, dtype=None",  # noqa: E501
        "FusedRMSNormSwishGate": f"{AFFINE}, eps=1e-05, device=None, dtype=None",
        "FusedLayerNormSwishGate": f"{AFFINE}, bias=False, eps=1e-05, device=None, dtype=None",
        "FusedRMSNormGatedLinear": f"{AFFINE}, eps=1e-05, device=None, dtype=None",
        "FusedLayerNormGatedLinear": f"{AFFINE}, eps=1e-05, device=None, dtype=None",
        "FusedRMSNormSwishGateLinear": f"{AFFINE}, eps=1e-05, device=None, dtype=None",
        "FusedLayerNormSwishGateLinear": f"{AFFINE}, eps=1e-05, device=None, dtype=None",
        "RMSNormGated": MODULE.format(False, ""),
        "LayerNormGated": MODULE.format(True, ""),
        "layernorm_fn": LAYER,
        "rmsnorm_fn": RMS,
        "rms_norm_ref": f"{RMS}, upcast=True",
        "layer_norm_fwd": FORWARD,
        "layer_norm_bwd": BACKWARD,
    },
    "mamba": {
        "RMSNorm": MODULE.format(True, ""),
        "LayerNorm": MODULE.format(True, ""),
        "layernorm_fn": LAYER,
        "rmsnorm_fn": RMS,
        "rms_norm_ref": f"{RMS}, upcast=True",
        "_layer_norm_fwd": FORWARD,
        "_layer_norm_bwd": BACKWARD,
    },
    "sglang": {
        "RMSNorm": MODULE.format(True, ", activation='swish'"),
        "LayerNorm": MODULE.format(True, ""),
        "layernorm_fn": f"{LAYER}, activation='swish'",
        "rms_norm_gated": f"*, {LAYER}, activation='swish'",
        "rms_norm_ref": f"{RMS}, upcast=True",
    },
    "vllm": {
        "RMSNormGated": MODULE.format(False, ", activation='swish'"),
        "LayerNormGated": MODULE.format(True, ""),
        "layernorm_fn": f"{LAYER}, activation='swish'",
        "rmsnorm_fn": f"{RMS}, activation='swish'",
        "rms_norm_gated": RMS.replace("bias,", "bias=None,"),
        "rms_norm_ref": f"{RMS}, upcast=True",
        "layer_norm_fwd": f"{FORWARD}, activation='swish'",
    },
}
NAMES = [
    pytest.param(peer, name, id=f"{peer}-{name}")
    for peer, names in SIGNATURES.items()
    for name in names
]
MODULES = [
    (peer, name)
    for peer, names in SIGNATURES.items()
    for name in names
    if name[0].isupper() and name != "LayerNormFn"
]


def door(peer: str):
    return importlib.import_module(f"gatednorm.compat.{peer}")


def without_types(signature: inspect.Signature) -> str:
    """A signature's names, defaults and kinds."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))[1:-1]


@pytest.mark.parametrize(("peer", "name"), NAMES)
def test_signature(peer, name):
    got, want = without_types(inspect.signature(getattr(door(peer), name))), SIGNATURES[peer][name]
    assert got in (want, f"{want}, activation='swish'", f"{want}, **options")


@pytest.mark.parametrize("peer", SIGNATURES)
def test_every_exported_name_is_compared(peer):
    assert set(door(peer).__all__) - {"LayerNormFn"} == set(SIGNATURES[peer])


@pytest.mark.parametrize(("peer", "name"), MODULES, ids="-".join)
def test_a_module_has_the_keys_and_the_attributes_of_the_peer(peer, name):
    module = getattr(door(peer), name)(8, device="cpu", dtype=torch.float64)
    layer_norm = "LayerNorm" in name
    fused = name.startswith("Fused")
    assert list(module.state_dict()) == ["weight"] + ["bias"] * (layer_norm and not fused)
    assert (module.weight == 1).all()
    assert module.weight.dtype == torch.float64
    assert module.eps == 1e-5
    if fused:
        assert module.hidden_size == 8
        assert module.elementwise_affine is True
        without = type(module)(8, elementwise_affine=False)
        assert not without.state_dict()
        assert without.weight is None is without.bias
    else:
        assert module.group_size is None
        assert module.norm_before_gate is ("norm_before_gate=True" in SIGNATURES[peer][name])
    if "Linear" not in name:
        assert module.activation == "swish"
    if "bias=False" in SIGNATURES[peer][name]:
        assert list(type(module)(8, bias=True).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("peer", "name"), MODULES, ids="-".join)
def test_a_module_refuses_what_no_kernel_has(peer, name):
    make = getattr(door(peer), name)
    with pytest.raises(ValueError, match="eps must be a finite number"):
        make(8, eps=-1.0)
    if "activation" in inspect.signature(make).parameters:
        with pytest.raises(ValueError, match="activation must be one of silu, swish, sigmoid"):
            make(8, activation="gelu")


def test_a_subclass_that_adds_an_attribute_to_the_weight_works():
    """As SGLang's and vLLM's Bailing models do."""

    class Sharded(door("sglang").RMSNorm):
        def __init__(self, size):
            super().__init__(size, eps=1e-6, group_size=4, activation="sigmoid")
            self.weight.weight_loader = print

    x, z = torch.randn(2, 3, 8)
    assert Sharded(8)(x, z).shape == x.shape


# ---- beside flash-linear-attention's own code, where it is installed: `.ci/run` does so ----

LAUNCHERS = {"layer_norm_gated_fwd", "layer_norm_gated_bwd"}  # not covered, as docs/adopt.md says


@pytest.fixture(scope="module")
def theirs():
    fused = pytest.importorskip("fla.modules.fused_norm_gate")
    gated = pytest.importorskip("fla.modules.layernorm_gated")
    return {name: getattr(m, name) for m in (fused, gated) for name in m.__all__}


@pytest.mark.slow
def test_every_name_of_flash_linear_attention_is_here_or_named_as_missing(theirs):
    assert set(theirs) - LAUNCHERS == set(SIGNATURES["fla"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNATURES["fla"])
def test_flash_linear_attention_agrees_with_the_table_and_with_forward(theirs, name):
    mine, other = getattr(door("fla"), name), theirs[name]
    assert without_types(inspect.signature(other)) == SIGNATURES["fla"][name]
    if inspect.isclass(other):
        got, want = (without_types(inspect.signature(c.forward)) for c in (mine, other))
        assert got == want


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for peer, n in MODULES if peer == "fla"])
def test_the_state_and_the_attributes_of_flash_linear_attention(theirs, name):
    mine, other = getattr(door("fla"), name)(8), theirs[name](8)
    assert list(mine.state_dict()) == list(other.state_dict())
    mine.load_state_dict(other.state_dict())
    attributes = {k: v for k, v in vars(other).items() if not k.startswith("_")}
    assert attributes.items() <= {k: getattr(mine, k) for k in attributes}.items()
