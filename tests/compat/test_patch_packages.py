"""`gatednorm.patch("fla")` and so on, on stand-ins for packages that need a GPU or much else.

A stand-in has a package's own module path, function names and argument orders, and plain torch
inside: the truth that the patched call is compared with.
"""

import importlib
import importlib.machinery
import sys

import pytest
import torch

import gatednorm

GATED = """
import torch
from torch import nn

def _layer_norm_fwd(x, weight, bias, eps, z=None, out=None, group_size=None, norm_before_gate=True,
                    is_rms_norm=False):
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    return rmsnorm_fn(x, weight, bias, z, eps), None, rstd

def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y * z * z.sigmoid()

class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight, self.bias = nn.Parameter(torch.full([hidden_size], 3.0)), None

    def forward(self, x, z=None):
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps)

class RMSNormGated(RMSNorm):
    pass
"""
KEYWORDS = """
import torch

def rms_norm_gated(*, x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True,
                   is_rms_norm=False, activation="swish"):
    y = x - x.mean(-1, keepdim=True)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight * z * z.sigmoid()
"""
MIXER = GATED.replace("rmsnorm_fn", "rms_norm_gated")
FUSED = """
import torch
from torch import nn

def rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False,
                   residual_in_fp32=False, eps=1e-6):
    total = x + residual
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight
    return y * g.sigmoid(), total

class FusedRMSNormGated(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.eps, self.activation = 1e-6, "sigmoid"
        self.weight, self.bias = nn.Parameter(torch.full([hidden_size], 3.0)), None

    def forward(self, x, g, residual=None, prenorm=False):
        return rms_norm_gated(x, g, self.weight, self.bias, self.activation, residual, prenorm)
"""
T = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
W = torch.randn(16, generator=torch.Generator().manual_seed(3))
CALLS = {
    "rmsnorm_fn": lambda f: f(T[0], W, None, T[1]),
    "mixer": lambda f: f(T[0], W, None, T[1]),
    "_layer_norm_fwd": lambda f: f(T[0], W, None, 1e-5, T[1], is_rms_norm=True),
    "keywords": lambda f: f(x=T[0], weight=W, bias=None, z=T[1]),
    "fused": lambda f: f(T[0], T[1], W, None, "sigmoid", T[2], prenorm=True),
}
CASES = {  # where a function is in a release, its source there, and how it is called
    "fla.modules.norm.fused_norm_gate.rms_norm_gated": (FUSED, "fused"),
    "fla.modules.fused_norm_gate.rms_norm_gated": (FUSED, "fused"),  # 0.5
    "fla.modules.norm.layernorm_gated.rmsnorm_fn": (GATED, "rmsnorm_fn"),
    "mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn": (GATED, "rmsnorm_fn"),
    "mamba_ssm.ops.triton.layernorm_gated._layer_norm_fwd": (GATED, "_layer_norm_fwd"),
    "sglang.kernels.ops.attention.fla.layernorm_gated.rms_norm_gated": (KEYWORDS, "keywords"),
    "sglang.kernels.ops.attention.fla.fused_norm_gate.rms_norm_gated": (FUSED, "fused"),
    "sglang.srt.layers.attention.fla.kda.rms_norm_gated": (FUSED, "fused"),  # 0.5.5
    "sglang.srt.layers.attention.mamba.ops.layernorm_gated.rms_norm_gated": (MIXER, "mixer"),
    "vllm.third_party.flash_linear_attention.ops.layernorm_guard.rmsnorm_fn": (GATED, "rmsnorm_fn"),
    "vllm.model_executor.layers.fla.ops.layernorm_guard.rmsnorm_fn": (GATED, "rmsnorm_fn"),
    "vllm.third_party.flash_linear_attention.ops.fused_norm_gate.rms_norm_gated": (FUSED, "fused"),
    "vllm.model_executor.layers.mamba.ops.layernorm_gated.rms_norm_gated": (MIXER, "mixer"),
}
PACKAGES = {name.split(".")[0] for name in CASES}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes modules of these sources where imports find them, in place of an installed package."""

    def drop() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] in PACKAGES | {"mine"}]
        return {name: sys.modules.pop(name) for name in names}

    def write(**sources):
        for name, source in sources.items():
            file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
            for folder in file.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()

    installed = drop()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    drop()
    sys.modules.update(installed)


def load(name: str):
    return importlib.import_module(name)


def ours(function) -> bool:
    return function.__module__.startswith("gatednorm.compat.")


@pytest.mark.parametrize("when", ["imported", "imported_later"])
@pytest.mark.parametrize("path", CASES)
def test_every_function(install, path, when):
    """Of each package and release: found where it is bound, computed by us, and put back."""
    module, _, name = path.rpartition(".")
    package, (source, call) = path.split(".")[0], CASES[path]
    install(**{module: source, f"{package}.user": f"from {module} import {name} as norm"})
    if when == "imported":
        load(f"{package}.user")
    handle = gatednorm.patch(package)
    if when == "imported_later":
        assert handle.count == 0
        load(f"{package}.user")
    assert handle.count >= 1
    home, user = load(module), load(f"{package}.user")
    assert getattr(home, name) is user.norm
    assert ours(user.norm)
    assert type(home.__loader__) is type(home.__spec__.loader) is type(user.__loader__)
    got = CALLS[call](user.norm)
    handle.undo()
    assert getattr(home, name) is user.norm
    assert not ours(user.norm)
    torch.testing.assert_close(got, CALLS[call](user.norm))


FLA, MAMBA = "fla.modules.norm.layernorm_gated", "mamba_ssm.ops.triton.layernorm_gated"


def test_a_class_is_not_exchanged(install):
    """Its instances, old and new, call the function; so does a subclass of somebody's."""
    install(**{FLA: GATED})
    module = load(FLA)
    old, cls = module.RMSNorm(16), module.RMSNorm
    want = old(T[0], T[1])
    with gatednorm.patch("fla"):
        assert module.RMSNorm is cls
        for norm in (old, cls(16), type("Mine", (cls,), {})(16)):
            got = norm(T[0], T[1])
            torch.testing.assert_close(got, want)
            assert got.grad_fn.name() != want.grad_fn.name()


def test_twice(install):
    install(**{FLA: GATED})
    module, finders = load(FLA), list(sys.meta_path)
    first, second = gatednorm.patch("fla"), gatednorm.patch("fla")
    assert (first.count, second.count) == (1, 0)
    second.undo()
    assert ours(module.rmsnorm_fn)
    first.undo()
    first.undo()
    assert not ours(module.rmsnorm_fn)
    assert sys.meta_path == finders
    with gatednorm.patch("fla") as third:
        assert third.count == 1
        first.undo()
        assert ours(module.rmsnorm_fn)


def test_two_packages_do_not_share(install):
    """fla's and mamba_ssm's `rmsnorm_fn` are one function of ours: each goes back to its own."""
    install(**{FLA: GATED, MAMBA: GATED})
    modules = load(FLA), load(MAMBA)
    own = [m.rmsnorm_fn for m in modules]
    with gatednorm.patch("mamba_ssm"):
        with gatednorm.patch("fla"):
            assert all(ours(m.rmsnorm_fn) for m in modules)
        assert modules[0].rmsnorm_fn is own[0]
        assert ours(modules[1].rmsnorm_fn)
    assert [m.rmsnorm_fn for m in modules] == own


def test_names_in_other_peoples_modules(install):
    """Taken before or during the patch; what was imported from gatednorm itself stays."""
    install(**{FLA: GATED, "mine.before": f"from {FLA} import rmsnorm_fn"})
    install(**{"mine.during": f"from {FLA} import rmsnorm_fn"})
    install(**{"mine.direct": "from gatednorm.compat.fla import rmsnorm_fn"})
    before, direct = load("mine.before"), load("mine.direct")
    own = before.rmsnorm_fn
    with gatednorm.patch("fla") as handle:
        assert handle.count == 2
        during = load("mine.during")
        assert ours(before.rmsnorm_fn)
        assert ours(during.rmsnorm_fn)
    assert before.rmsnorm_fn is during.rmsnorm_fn is own
    assert ours(direct.rmsnorm_fn)


def test_an_old_name_of_a_module_that_moved(install):
    """As flash-linear-attention 0.6 keeps them: one module under two names is patched once."""
    alias = f"import sys, {FLA}; sys.modules['fla.modules.layernorm_gated'] = sys.modules['{FLA}']"
    install(**{FLA: GATED, "fla.aliases": alias})
    load("fla.aliases")
    with gatednorm.patch("fla") as handle:
        assert handle.count == 1
    assert not ours(load("fla.modules.layernorm_gated").rmsnorm_fn)


def test_a_reload(install):
    install(**{FLA: GATED})
    module = load(FLA)
    with gatednorm.patch("fla"):
        importlib.reload(module)
        assert ours(module.rmsnorm_fn)
    assert not ours(module.rmsnorm_fn)


def test_what_somebody_changed_since_stays(install):
    install(**{FLA: GATED})
    module = load(FLA)
    with gatednorm.patch("fla"):
        module.rmsnorm_fn = mine = lambda *_: None
    assert module.rmsnorm_fn is mine


def test_an_import_that_fails(install):
    install(**{FLA: "import no_such_module"})
    with gatednorm.patch("fla") as handle, pytest.raises(ModuleNotFoundError, match="no_such"):
        load(FLA)
    assert handle.count == 0


def test_not_installed(install, monkeypatch):
    monkeypatch.setattr(gatednorm.patching, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is not installed, so there is nothing to patch"):
        gatednorm.patch("vllm")


def test_a_release_without_any_of_the_files(install):
    install(**{"vllm.norms": ""})
    with pytest.raises(ValueError, match=r"vllm has none of the files whose functions patch repl"):
        gatednorm.patch("vllm")


@pytest.mark.parametrize(
    ("module", "source", "name", "shape"),
    [
        ("fla.modules.norm.fused_norm_gate", FUSED, "FusedRMSNormGated", "residual"),
        ("fla.modules.norm.layernorm_gated", GATED, "RMSNormGated", "plain"),
        ("mamba_ssm.ops.triton.layernorm_gated", GATED, "RMSNorm", "plain"),
    ],
    ids=["fla_fused", "fla_gated", "mamba_ssm"],
)
def test_a_model_of_their_layers(install, module, source, name, shape):
    """By class and module; their functions are left alone, and so is a subclass."""
    install(**{module: source})
    cls = getattr(load(module), name)
    model = torch.nn.Sequential(cls(16), type("Mine", (cls,), {})(16))
    inputs = (T[0], T[1], T[2], True) if shape == "residual" else (T[0], T[1])
    want = model[0](*inputs)
    with gatednorm.patch(model) as handle:
        assert handle.count == 1
        assert isinstance(model[0], cls)
        torch.testing.assert_close(model[0](*inputs), want)
        assert type(model[0]).forward.__module__.startswith("gatednorm.compat.")
        assert not any(ours(f) for f in vars(load(module)).values() if callable(f) and f is not cls)
    assert type(model[0]) is cls
