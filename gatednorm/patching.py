"""`gatednorm.patch`: the norms of a model, or of an installed package, computed by this library.

A model's norms change their class to a subclass that differs in `forward` alone, so parameters,
hooks, names and `isinstance` stay as they were. In a package no class is exchanged either:
transformers' classes get another `forward`, and of the other packages the functions that their
classes and layers call are replaced, wherever a module has a name for them.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from .families import FAMILIES

_FUSED = (
    "layer_norm_gated", "layer_norm_swish_gate_linear", "rms_norm_gated",
    "rms_norm_swish_gate_linear",
)  # fmt: skip
_GATED = ("layernorm_fn", "rmsnorm_fn", "layer_norm_fwd", "layer_norm_bwd")

# Which functions of a package's modules are replaced, and by those of which module of `compat`. A
# module may be absent in a release, and a name in a module: files moved, and some have two homes.
_FUNCTIONS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "fla": {
        "fla.modules.norm.fused_norm_gate": ("fla", _FUSED),
        "fla.modules.norm.layernorm_gated": ("fla", _GATED),
        "fla.modules.fused_norm_gate": ("fla", _FUSED),  # before 0.6
        "fla.modules.layernorm_gated": ("fla", _GATED),
    },
    "mamba_ssm": {
        "mamba_ssm.ops.triton.layernorm_gated": (
            "mamba", ("layernorm_fn", "rmsnorm_fn", "_layer_norm_fwd", "_layer_norm_bwd"),
        ),
    },
    "sglang": {
        f"{folder}.{file}": functions
        for folder in ("sglang.kernels.ops.attention.fla", "sglang.srt.layers.attention.fla")
        for file, functions in {
            "layernorm_gated": ("sglang", ("layernorm_fn", "rms_norm_gated")),
            "fused_norm_gate": ("fla", _FUSED),
            "kda": ("fla", _FUSED),  # where 0.5.5 has them
        }.items()
    } | {"sglang.srt.layers.attention.mamba.ops.layernorm_gated": ("vllm", ("rms_norm_gated",))},
    "vllm": {
        f"{folder}.{file}": functions
        for folder in (
            "vllm.third_party.flash_linear_attention.ops", "vllm.model_executor.layers.fla.ops",
        )
        for file, functions in {
            "layernorm_guard": ("vllm", _GATED),
            "fused_norm_gate": ("fla", _FUSED),
            "kda": ("fla", _FUSED),
        }.items()
    } | {"vllm.model_executor.layers.mamba.ops.layernorm_gated": ("vllm", ("rms_norm_gated",))},
    "transformers": {module: ("", ()) for module, _ in FAMILIES},  # it has classes instead
}  # fmt: skip
_LAYERS = _FUNCTIONS["fla"] | _FUNCTIONS["mamba_ssm"]  # their norms are known in a model, too

_in_force: dict[str, "_PackagePatch"] = {}


def patch(target: nn.Module | str) -> "Patch":
    """Compute the gated norms of `target` with this library, until the handle's `undo`.

        handle = gatednorm.patch(model)      # or a package: gatednorm.patch("fla")
        handle.undo()                        # or: with gatednorm.patch(model): ...

    Args:
        target: a model with norms of transformers, flash-linear-attention or mamba_ssm, which is
            changed in place; or `"transformers"`, `"fla"`, `"mamba_ssm"`, `"sglang"` or `"vllm"`,
            installed: its models, those that exist already included, and its modules that are
            imported later.

    Returns:
        A :class:`Patch`. What is patched already is left alone, and counts for the first handle.

    Raises:
        TypeError: another kind of target.
        ValueError: an unknown package, one that is not installed, or one with none of the known
            files; a model without a known norm, or with one whose `forward` was replaced on the
            instance, as accelerate's hooks and `kernelize` do.

    Each family keeps its own rounding; docs/adopt-transformers.md says what changes. In training,
    mamba_ssm's fused functions read a norm's weight and never call the module: for these patch the
    package and not the model. A package is patched in this process alone.
    """
    if isinstance(target, nn.Module):
        return _patch_model(target)
    if not isinstance(target, str):
        raise TypeError(
            f"patch takes a model or a package's name, got {type(target).__name__}; pass an "
            "nn.Module, or for example 'fla'"
        )
    if target not in _FUNCTIONS:
        raise ValueError(
            f"patch knows the packages {', '.join(sorted(_FUNCTIONS))}, got {target!r}; pass one "
            "of these, or a model"
        )
    if target in _in_force:
        return Patch()
    _check_installed(target)
    return _PackagePatch(target)


class Patch:
    """What one call of :func:`patch` did.

    Attributes:
        count: the modules changed in a model, or the names replaced in a package so far, which
            grows as more of it is imported.
    """

    def __init__(self) -> None:
        self.count = 0
        self._done: list[tuple[object, str, object, object]] = []

    def _set(self, owner: object, name: str, old: object, new: object) -> None:
        setattr(owner, name, new)
        self._done.append((owner, name, old, new))
        self.count += 1

    def undo(self) -> None:
        """Restore what this handle changed and nobody has changed since; a second time, nothing."""
        while self._done:
            owner, name, old, new = self._done.pop()
            if getattr(owner, name, None) is new:
                setattr(owner, name, old)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


# ---- a model ----


class _Patched:
    """A patched module's class is made at run time: what is pickled is the original's name."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore, (type(self)._original,), self.__getstate__()


def _restore(original: type[nn.Module]) -> nn.Module:
    cls = _ours(original)  # type: ignore[arg-type]  # mypy takes a class for an instance of it
    assert cls is not None  # it was made once already
    return cls.__new__(cls)


@functools.cache
def _ours(original: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of a known class whose `forward` is ours; None for an unknown one."""
    name, module = original.__qualname__, original.__module__
    own: dict[str, Any] = {}
    bases: tuple[type, ...] = (_Patched, original)
    if (module, name) in FAMILIES:
        own["forward"] = FAMILIES[module, name].forward
    elif module in _LAYERS and hasattr(door := _compat(_LAYERS[module][0]), name):
        bases = (_Patched, getattr(door, name), original)
    else:
        return None
    own |= {"__module__": __name__, "__qualname__": name, "_original": original}
    return type(name, bases, own)


def _patch_model(model: nn.Module) -> Patch:
    swaps, known = [], False
    for path, module in model.named_modules():
        cls = type(module)
        known = known or cls.__module__.startswith("gatednorm.")
        ours = None if issubclass(cls, _Patched) else _ours(cls)  # type: ignore[arg-type]  # same
        if ours is None:
            continue
        if "forward" in vars(module):
            raise ValueError(
                f"{path or 'the model'} ({cls.__name__}) has a forward of its own, as kernelize "
                "and accelerate's hooks leave, which would go on being called; patch the model "
                "before them, or the package before the model is loaded"
            )
        swaps.append((module, cls, ours))
    if not swaps and not known:
        raise ValueError(
            f"{type(model).__name__} has no gated norm that patch knows, by class and module; see "
            "docs/adopt-transformers.md for the list"
        )
    handle = Patch()
    for module, cls, ours in swaps:
        handle._set(module, "__class__", cls, ours)
    return handle


# ---- a package ----


def _compat(name: str) -> ModuleType:
    return importlib.import_module(f".compat.{name}", __package__)


def _check_installed(package: str) -> None:
    modules = _FUNCTIONS[package]
    if any(module in sys.modules for module in modules):
        return
    spec = find_spec(package)
    if spec is None:
        raise ValueError(f"{package} is not installed, so there is nothing to patch; install it")
    files = [Path(*module.split(".")[1:]).with_suffix(".py") for module in modules]
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / file).is_file() for folder in folders for file in files):
        raise ValueError(
            f"{package} has none of the files whose functions patch replaces ({files[0]}, ...); "
            "use a release that has one, or change the imports to gatednorm.compat"
        )


def _bound_to(value: object) -> list[tuple[ModuleType, str]]:
    """Every imported module, and name in it, that is bound to this object."""
    modules = {id(m): m for m in list(sys.modules.values()) if isinstance(m, ModuleType)}
    return [
        (module, name)
        for module in modules.values()
        for name, bound in list(vars(module).items())
        if bound is value
    ]


class _PackagePatch(Patch, MetaPathFinder):
    """Patches the modules that are imported, and as an import hook those that will be.

    Each function is a copy, which only this patch's names are bound to: `undo` finds also the names
    that were imported from a patched module.
    """

    def __init__(self, package: str):
        super().__init__()
        self._package = package
        self._copies: list[tuple[FunctionType, object]] = []
        for name in _FUNCTIONS[package]:
            if name in sys.modules:
                self._patch_module(name)
        sys.meta_path.insert(0, self)
        _in_force[package] = self

    def _patch_module(self, path: str) -> None:
        module = sys.modules[path]
        for name in [name for where, name in FAMILIES if where == path]:
            cls = getattr(module, name, None)  # older releases share one class among families
            if cls is not None and "forward" in vars(cls):
                self._set(cls, "forward", cls.forward, FAMILIES[path, name].forward)
        door, names = _FUNCTIONS[self._package][path]
        for name in names:
            old = getattr(module, name, None)
            if old is None or any(old is copy for copy, _ in self._copies):
                continue  # not in this release; or a module that has an old name as well
            new = _copy(getattr(_compat(door), name))
            self._copies.append((new, old))
            for owner, bound in _bound_to(old):
                self._set(owner, bound, old, new)

    def undo(self) -> None:
        if _in_force.get(self._package) is self:
            del _in_force[self._package]
            sys.meta_path.remove(self)
        while self._copies:
            new, old = self._copies.pop()
            for owner, name in _bound_to(new):
                setattr(owner, name, old)
        super().undo()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _FUNCTIONS[self._package]:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                if spec.loader is not None:
                    spec.loader = _ThenPatch(spec.loader, self._patch_module)
                return spec
        return None


class _ThenPatch(Loader):
    """A module's own loader, and a call when it has run."""

    def __init__(self, loader: Loader, patch_module: Callable[[str], None]):
        self._loader, self._patch_module = loader, patch_module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # as if we had not been here
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._patch_module(module.__name__)


def _copy(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy
