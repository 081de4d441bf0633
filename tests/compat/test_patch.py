"""`gatednorm.patch(model)`: what goes on working, what is refused, and what is left alone."""

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn

import gatednorm
from gatednorm import families
from tiny_transformers import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.qwen3_next")

TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


LAYERS = ["linear_attention", "linear_attention", "full_attention"]


@pytest.fixture
def model():
    return tiny("qwen3_next", num_hidden_layers=3, layer_types=LAYERS)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False)[0]


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Qwen3NextRMSNormGated"]


def patched(model: nn.Module) -> int:
    """How many of its norms are ours."""
    return sum(type(m).__module__ == "gatednorm.patching" for m in norms(model))


def test_a_handle_counts_and_undoes(model):
    handle = gatednorm.patch(model)
    assert (handle.count, patched(model)) == (2, 2)
    handle.undo()
    assert (handle.count, patched(model)) == (2, 0)
    with gatednorm.patch(model):
        handle.undo()  # a second time: nothing, not even of a later handle
        assert patched(model) == 2
    assert patched(model) == 0


def test_it_is_undone_after_an_error(model):
    with pytest.raises(KeyError), gatednorm.patch(model):
        raise KeyError
    assert patched(model) == 0


@pytest.mark.parametrize("first", [0, 1], ids=["in_order", "in_reverse"])
def test_patching_twice_and_undoing_in_any_order(model, first):
    part, whole = gatednorm.patch(model.model.layers[0]), gatednorm.patch(model)
    again = gatednorm.patch(model)
    assert (part.count, whole.count, again.count) == (1, 1, 0)
    again.undo()
    assert patched(model) == 2
    (part, whole)[first].undo()
    assert patched(model) == 1
    (whole, part)[first].undo()
    assert patched(model) == 0


def test_beside_a_patch_of_the_package(model):
    """Each holds until its own handle takes it back."""
    before = logits(model)
    with gatednorm.patch("transformers") as package:
        handle = gatednorm.patch(model)
        assert handle.count == 2
        package.undo()
        assert torch.equal(logits(model), before)
        assert patched(model) == 2
    handle.undo()
    assert patched(model) == 0


def test_class_and_state_are_as_they_were(model):
    norm, keys = norms(model)[0], list(model.state_dict())
    original, printed = type(norm), repr(model)
    with gatednorm.patch(model):
        assert isinstance(norm, original)
        assert repr(model) == printed
        assert list(model.state_dict()) == keys
        model.bfloat16()
        assert logits(model).dtype == torch.bfloat16
        x = torch.randn(3, 16, device="meta")
        assert norm.to("meta")(x, x).device.type == "meta"


def test_hooks_are_called(model):
    seen = []
    for norm in norms(model):
        norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    with gatednorm.patch(model):
        norms(model)[0].register_forward_hook(lambda *_: seen.append("after"))
        logits(model)
    assert seen == ["before", "after", "before"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_too(model, way):
    before = logits(model)
    with gatednorm.patch(model):
        if way == "deepcopy":
            again = copy.deepcopy(model)
        elif way == "pickle":
            again = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            again = torch.load(file, weights_only=False)
    assert patched(again) == 2
    assert patched(model) == 0
    assert torch.equal(logits(again), before)
    assert gatednorm.patch(again).count == 0
    assert norms(again)[0].weight is not norms(model)[0].weight


def test_save_pretrained(model, tmp_path):
    before = logits(model)
    model.save_pretrained(tmp_path / "plain")
    with gatednorm.patch(model):
        model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes(), file.name
    again = type(model).from_pretrained(tmp_path / "patched")
    assert patched(again) == 0
    assert torch.equal(logits(again), before)


def test_autocast(model):
    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model)

    before = run()
    with gatednorm.patch(model):
        assert torch.equal(run(), before)


def test_gradient_checkpointing(model):
    def gradients():
        model.zero_grad()
        model.train()(TOKENS, use_cache=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    with gatednorm.patch(model):
        plain = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert all(map(torch.equal, gradients(), plain))


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_compile(family):
    """One graph with our operator in it, patched before or after the module was compiled; a module
    that goes back to its class is compiled again."""
    pytest.importorskip(f"transformers.models.{family}")
    norm = next(m for m in tiny(family).modules() if type(m).__name__.endswith("RMSNormGated"))
    x, z = torch.randn(2, 5, norm.weight.numel()), torch.randn(2, 5, norm.weight.numel())
    ran = []

    def backend(graph, _):
        ours = any("gatednorm" in str(node.target) for node in graph.graph.nodes)
        return lambda *inputs: (ran.append(ours), graph(*inputs))[1]

    torch.compiler.reset()
    want, compiled = norm(x, z), torch.compile(norm, fullgraph=True, backend=backend)
    compiled(x, z)
    for target in (norm, "transformers"):
        with gatednorm.patch(target):
            assert torch.equal(compiled(x, z), want)
        compiled(x, z)
    assert ran == [False, True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_compile_a_model(family):
    model = tiny(family)
    before = logits(model)
    with gatednorm.patch(model):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(logits(compiled), before)


# ---- what is refused, and what is left alone ----


def test_without_a_known_norm():
    with pytest.raises(ValueError, match=r"Sequential has no gated norm that patch knows.*docs/"):
        gatednorm.patch(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert gatednorm.patch(gatednorm.RMSNorm(8)).count == 0  # ours is not a mistake


def test_a_class_of_a_known_name_from_elsewhere(model):
    """Remote code, and a subclass that somebody wrote: their names alone are known."""
    original = type(norms(model)[0])
    remote = type(
        original.__name__, (original,), {"__module__": "transformers_modules.somebody.modeling"}
    )
    norms(model)[1].__class__ = remote
    assert gatednorm.patch(model).count == 1
    assert type(norms(model)[1]) is remote
    with pytest.raises(ValueError, match="no gated norm that patch knows"):
        gatednorm.patch(norms(model)[1])


def test_a_forward_on_the_instance(model, monkeypatch):
    """As `kernelize` and accelerate's hooks leave it: refused before anything is changed. Where the
    package is patched before the hook comes, the hook calls ours."""
    last = norms(model)[-1]
    inner = last.forward
    last.forward = types.MethodType(lambda self, *a, **k: inner(*a, **k), last)
    with pytest.raises(ValueError, match=r"layers.1.linear_attn.norm .* has a forward of its own"):
        gatednorm.patch(model)
    assert patched(model) == 0

    before, calls = logits(model), []
    spy = families.gated_norm
    monkeypatch.setattr(families, "gated_norm", lambda *a, **k: calls.append(1) or spy(*a, **k))
    with gatednorm.patch("transformers"):
        inner = types.MethodType(type(last).forward, last)
        assert torch.equal(logits(model), before)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (nn.Linear, TypeError, "patch takes a model or a package's name, got type"),
        ("flash-linear-attention", ValueError, "patch knows the packages fla, mamba_ssm, sglang"),
    ],
    ids=["class", "unknown"],
)
def test_a_target_that_is_none(target, error, message):
    with pytest.raises(error, match=message):
        gatednorm.patch(target)
