"""What train.py and infer.py need around the models, and the way in from Python, with examples in
docs/inference.md::

    from demo import generate, load

    loaded = load("checkpoints/mamba2")  # or a run, a published checkpoint, a hub id
    print(generate(loaded, "import ", max_new_tokens=100, temperature=0).text)
"""

from importlib import import_module

_MODULES = {
    "load": "demo.checkpoints.checkpoint",
    "generate": "demo.inference.text_generation",
    "stream_text": "demo.inference.text_generation",
    "Options": "demo.inference.text_generation",
    "Result": "demo.inference.text_generation",
    "score": "demo.inference.scoring",
    "Score": "demo.inference.scoring",
    "ConfigError": "demo.config.errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # Imported on first use: `--help` and a misspelt key are answered before torch is loaded.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
