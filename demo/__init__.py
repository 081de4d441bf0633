"""What train.py and infer.py need around the models, and the way in from Python, documented with
examples in docs/inference.md::

    from demo import generate, load

    loaded = load("checkpoints/mamba2")  # or a run, a published checkpoint, a hub id
    print(generate(loaded, "import ", max_new_tokens=100, temperature=0).text)
"""

from importlib import import_module

_WHERE = {
    "ConfigError": "demo.config.errors",
    "load": "demo.checkpoints.checkpoint",
    "generate": "demo.inference.texts",
    "stream_text": "demo.inference.texts",
    "Options": "demo.inference.texts",
    "Result": "demo.inference.texts",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    # On first use: the scans and blocks alone need neither Hydra's configs nor safetensors.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
