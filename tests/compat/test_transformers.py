"""Every gated norm of the installed transformers, found by search, against its own code."""

import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

import gatednorm
from gatednorm import families, gated_norm_ref
from gatednorm.families import FAMILIES
from tiny_transformers import MODELS, tiny

transformers = pytest.importorskip("transformers")

OTHERS = {"AXK2GatedRMSNorm": "its gate is computed from the norm's own output"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WITHOUT_GATE = ("Mamba", "Bamba", "Zamba2", "NemotronH", "GraniteMoeHybrid", "FalconH1")
SETTINGS = {"group_size": (96, 32), "n_groups": (1, 3), "norm_before_gate": (True, False)}


def classes_in(file: Path) -> list[str]:
    """The classes of a file that look like a gated norm: by their name, or by a root and a gate."""
    found = []
    for source in re.split(r"(?m)^(?=class )", file.read_text(encoding="utf-8"))[1:]:
        name = re.match(r"class (\w+)", source)[1]
        named = "Norm" in name and "gate" in name.lower()
        if named or ("rsqrt(" in source and re.search(r"def forward\([^)]*\b(gate|z|g)\b", source)):
            found.append(name)
    return found


FOUND = {
    name: f"transformers.models.{file.parent.name}.{file.stem}"
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    for name in classes_in(file)
}
CLASSES = [name for name in FOUND if name not in OTHERS]
TINY = [module for module in MODELS if any(f".{module}." in path for path in FOUND.values())]


def test_every_class_is_classified():
    """A class that this test does not know is either a new family or belongs in OTHERS."""
    assert len(CLASSES) >= 8  # or the search is broken
    for name in CLASSES:
        assert (FOUND[name], name) in FAMILIES, f"{FOUND[name]} has a new class {name}"
        assert FOUND[name].split(".")[2] in MODELS, f"no tiny model has {name}"


def settings_of(cls: type) -> list[dict]:
    """Every combination of what the instances of a class can be made with."""
    names = set(inspect.signature(cls.__init__).parameters) - {"self", "hidden_size", "eps"}
    assert names <= {*SETTINGS, "activation", "kwargs"}, f"{cls.__name__} has a new setting"
    names = sorted(names & set(SETTINGS))
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(SETTINGS[name] for name in names))
    ]


def instances(name: str):
    """Instances of a class with all settings, and their options for :func:`gated_norm_ref`."""
    cls = getattr(importlib.import_module(FOUND[name]), name)
    after = FAMILIES[FOUND[name], name].norm_before_gate
    for settings in settings_of(cls):
        norm = cls(96, eps=1e-5, **settings)
        options = {"eps": 1e-5, "norm_before_gate": after, **settings}
        if "n_groups" in options:
            options["group_size"] = 96 // options.pop("n_groups")
        for activation in ("silu", "sigmoid") if hasattr(norm, "activation") else ("silu",):
            if hasattr(norm, "activation"):
                norm.activation = activation
            yield norm, {**options, "activation": activation}


def inputs(dtypes: tuple[str, str, str], shape=(3, 50, 96)) -> list[torch.Tensor]:
    """`x`, `weight`, `z` of these dtypes; z has some gates that are closed and some wide open."""
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(shape, generator=g), torch.randn(shape, generator=g).mul(3)
    w = torch.randn(shape[-1], generator=g)
    return [t.to(DTYPES[dtype]) for t, dtype in zip((x, w, z), dtypes, strict=True)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


MIXES = list(itertools.product(DTYPES, repeat=3))


@pytest.mark.parametrize("name", CLASSES)
def test_bits(name):
    """All 27 mixes of dtypes of x, weight and gate; three dimensions, two, one row; with autograd
    and without; without a gate where the class allows it."""
    for norm, options in instances(name):
        for dtypes, shape in itertools.product(MIXES, ((3, 50, 96), (7, 96), (1, 1, 96))):
            x, w, z = inputs(dtypes, shape)
            norm.weight.data = w
            for gate in (z, None) if name.startswith(WITHOUT_GATE) else (z,):
                theirs = norm(x, gate).view_as(x)  # Falcon-H1's drops one token's dimension in 5.17
                with gatednorm.patch(norm) as handle:
                    assert handle.count == 1
                    assert same_bits(norm(x, gate), theirs), (dtypes, shape, options)
                    with torch.no_grad():
                        assert same_bits(norm(x, gate), theirs), (dtypes, shape, options)


def gradients(function, x, w, z) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, w, z)]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(y, leaves, dy.bfloat16().to(y.dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name):
    """In all 27 mixes, each gradient's error against float64 is at most twice the original's."""
    for norm, options in instances(name):

        def module(x, w, z, norm=norm):
            return torch.func.functional_call(norm, {"weight": w}, (x, z))

        def exact(x, w, z, options=options):
            return gated_norm_ref(x, w, None, z, **options)

        for dtypes in MIXES:
            given = inputs(dtypes)
            truth = gradients(exact, *(t.double() for t in given))
            theirs = gradients(module, *given)
            with gatednorm.patch(norm):
                ours = gradients(module, *given)
            for which, want, their, our in zip("xwz", truth, theirs, ours, strict=True):
                assert our.dtype == their.dtype
                allowed = 2 * (their - want).norm()
                assert (our - want).norm() <= allowed, (which, dtypes, options)


@pytest.mark.parametrize("name", CLASSES)
def test_a_view_of_a_packed_projection(name):
    """x and gate as slices of wider rows; and as transposed ones, which the original sums in
    another order: there the bits are those of a contiguous copy."""
    norm, _ = next(instances(name))
    x, z = torch.randn(2, 5, 200).split([96, 104], dim=-1)
    columns = [torch.randn(96, 9).t() for _ in "xz"]
    theirs = norm(x, z[..., 4:100]), norm(*(t.contiguous() for t in columns))
    with gatednorm.patch(norm):
        assert same_bits(norm(x, z[..., 4:100]), theirs[0])
        assert same_bits(norm(*columns), theirs[1])


# ---- whole models ----


def losses(model, tokens: torch.Tensor) -> torch.Tensor:
    first = model(tokens, use_cache=False)[0].float()  # logits, or hidden states
    return first.square().mean()


def generated(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the model says of a prompt, and of three more tokens, one at a time. A single text:
    before transformers 5.23 Falcon-H1 mixes those of a batch in decoding."""
    tokens = tokens[:1]
    with torch.no_grad():
        out = model(tokens, use_cache=True)
        cache = "cache_params" if "cache_params" in out else "past_key_values"
        steps = [out[0]]
        for _ in range(3):
            out = model(tokens[:, :1], use_cache=True, **{cache: out[cache]})
            steps.append(out[0])
    return steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", TINY)
def test_a_tiny_model(model, dtype, monkeypatch):
    """Prefill and decoding in the same bits, a training step with the same loss and as good
    gradients, and all of it undone."""
    model, calls = tiny(model, DTYPES[dtype]), []
    monkeypatch.setattr(
        families, "gated_norm", lambda *a, f=families.gated_norm, **k: calls.append(1) or f(*a, **k)
    )
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    said = generated(model, tokens)
    loss = losses(model.train(), tokens)
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert not calls

    with gatednorm.patch(model) as handle:
        assert list(model.state_dict()) == keys
        assert all(map(same_bits, generated(model.eval(), tokens), said))
        assert handle.count >= 1
        assert len(calls) == 4 * handle.count
        ours = losses(model.train(), tokens)
        assert same_bits(ours, loss)
        ours.backward()
        worst = 5e-5 if dtype == "fp32" else 2e-2  # through the scan and everything below
        whole = torch.stack([g.double().norm() for g in theirs.values()]).norm()
        for name, parameter in model.named_parameters():
            if name in theirs:
                off = (parameter.grad - theirs[name]).double().norm()
                # the decays' gradients cancel to nothing, and are measured by the whole
                assert off <= worst * max(theirs[name].double().norm(), 1e-3 * whole), name
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
        assert losses(model, tokens) < loss
        trained = generated(model.eval(), tokens)
    assert [type(m) for m in model.modules()] == classes
    assert all(map(same_bits, generated(model, tokens), trained))
