"""The kernel hub's layer, bound to a module as `kernels` does it, and the repository around it."""

import ast
import importlib
import importlib.util
import inspect
import json
import sys
from types import MethodType

import pytest
import torch
from torch import nn

import gatednorm
from gatednorm.compat import hub
from installed import install, run

LAYER = hub.RMSNormGated
CLASSES = {  # one of each family: module of transformers, class, arguments
    "mamba2": ("nemotron_h", "NemotronHRMSNormGated", {"hidden_size": 96, "group_size": 32}),
    "qwen3_next": ("qwen3_next", "Qwen3NextRMSNormGated", {"hidden_size": 96}),
    "qwen3_next-sigmoid": (
        "qwen4_exp", "Qwen4ExpTextRMSNormGated", {"hidden_size": 96, "activation": "sigmoid"},
    ),
    "fp32-sigmoid": ("kimi_linear", "KimiLinearRMSNormGated", {"hidden_size": 96}),
    "fp32-groups": ("falcon_h1", "FalconH1RMSNormGated", {"hidden_size": 96, "n_groups": 3}),
}  # fmt: skip


def module_of(model, name, arguments) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, name)(**arguments)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return norm


@pytest.fixture(params=CLASSES.values(), ids=CLASSES)
def norm(request) -> nn.Module:
    return module_of(*request.param)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 37, 96, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    ]


def result_and_grads(forward, norm, dtype):
    x, z = inputs(dtype)
    y = forward(x, z)
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, 96)).sum(), (x, z, norm.weight))
    return y.detach(), grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_module_keeps_its_bits_and_gets_its_gradients(norm, dtype):
    norm = norm.to(dtype)
    theirs, their_grads = result_and_grads(norm.forward, norm, dtype)
    ours, our_grads = result_and_grads(MethodType(LAYER.forward, norm), norm, dtype)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    exact, few = result_and_grads(norm.double().forward, norm, torch.float64)[1], 4 * 2**-24
    for mine, own, true in zip(our_grads, their_grads, exact, strict=True):
        error, theirs = (mine.double() - true).norm(), (own.double() - true).norm()
        assert error <= 2 * theirs + few * true.norm()


def test_compiled_in_one_graph(norm):
    norm.forward = MethodType(LAYER.forward, norm)
    x, z = inputs()
    compiled = torch.compile(norm.forward, fullgraph=True, backend="aot_eager")
    y = compiled(x, z)
    assert torch.equal(y, type(norm).forward(norm, x, z))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_subclass_has_the_family_of_its_base():
    """One of somebody's own, and the one that a patched module has."""
    norm = module_of(*CLASSES["fp32-sigmoid"])
    mine = type("Mine", (type(norm),), {})(96)
    mine.load_state_dict(norm.state_dict())
    x, z = inputs()
    want = norm(x, z)
    assert torch.equal(MethodType(LAYER.forward, mine)(x, z), want)
    with gatednorm.patch(norm):
        assert torch.equal(MethodType(LAYER.forward, norm)(x, z), want)


def test_an_unknown_class_is_named():
    class RMSNormGated(nn.Module):
        """A name alone makes no family."""

    with pytest.raises(ValueError, match=r"test_hub.*RMSNormGated; keep its own forward"):
        MethodType(LAYER.forward, RMSNormGated())(*inputs())


def test_the_layer_keeps_the_rules_of_the_hub(norm):
    """What `kernels` checks: no constructor, no members but two, the parameters of the original."""
    assert LAYER.__init__ is nn.Module.__init__
    added = dict(inspect.getmembers(LAYER)).keys() - dict(inspect.getmembers(nn.Module)).keys()
    assert added == {"has_backward", "can_torch_compile"}
    assert (LAYER.has_backward, LAYER.can_torch_compile) == (True, True)
    ours, theirs = (
        [p.kind for p in inspect.signature(cls.forward).parameters.values()]
        for cls in (LAYER, type(norm))
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return hub.write(tmp_path_factory.mktemp("hub") / "gated-norm")


def test_the_files_are_complete(repository):
    """Each variant is a package of its own, which imports nothing but itself, torch, Triton and
    what it says that it needs."""
    assert {p.name for p in repository.iterdir()} == {"README.md", "build"}
    assert (repository / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    for backend in ("cuda", "cpu"):
        variant = repository / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"].isidentifier()
        files = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()}
        assert set(metadata["digest"]["files"]) == files - {"metadata.json"}
        allowed = sys.stdlib_module_names | {"torch", "triton"} | set(metadata["python-depends"])
        for file in variant.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [] if node.level else [node.module]
                else:
                    continue
                assert {name.split(".")[0] for name in names} <= allowed, file


def test_a_copy_runs_beside_the_package(repository, norm):
    """Imported as `kernels` imports it, with operators of its own; compiled, as those are used."""
    variant = repository / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    called = []

    def record(graph, _inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    forward = MethodType(sys.modules[name].layers.RMSNormGated.forward, norm)
    x, z = inputs()
    assert torch.equal(torch.compile(forward, fullgraph=True, backend=record)(x, z), norm(x, z))
    assert f"{name}.forward" in called


def test_nothing_is_overwritten(repository):
    before = {p: p.stat().st_mtime_ns for p in repository.rglob("*")}
    with pytest.raises(ValueError, match=r"a new one, and .*gated-norm exists; name another"):
        hub.write(repository)
    assert {p: p.stat().st_mtime_ns for p in repository.rglob("*")} == before


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    files = hub.repository() | {"build/torch-cpu": b"a folder is here"}
    monkeypatch.setattr(hub, "repository", lambda: files)
    with pytest.raises(OSError, match="torch-cpu"):
        hub.write(tmp_path / "gated-norm")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    hub.main([str(tmp_path / "gated-norm")])
    assert capsys.readouterr().out == f"{tmp_path}/gated-norm: a repository for the kernel hub\n"
    for folder, rule in (("gated-norm", "must be a new one"), ("a/b", "parent must exist")):
        with pytest.raises(SystemExit, match="2"):
            hub.main([str(tmp_path / folder)])
        assert rule in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_models_of_transformers(repository, tmp_path):
    """The package `kernels` itself, and a release of transformers that takes it (5.20 to 5.22)."""
    folder = install(tmp_path / "packages", "kernels==0.17.2", "transformers==5.22.2")
    out = run(folder, "hub_models.py", repository, LOCAL_KERNELS=f"owner/gated-norm={repository}")
    assert out.splitlines() == [
        *(
            f"{family} torch.{dtype} {count} norms: equal bits"
            for family, count in (("qwen3_next", 3), ("fp32", 4), ("mamba2", 2))
            for dtype in ("float32", "bfloat16")
        ),
        "set up for training and then changed: True",
        "set up for inference and then changed: False",
        "from_pretrained: True",
    ]
