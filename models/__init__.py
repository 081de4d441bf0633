"""Gated DeltaNet and Mamba-2 around gatednorm: two scans, two blocks, a small language model.

The way in, documented with examples in docs/inference.md::

    from models import generate, load

    loaded = load("checkpoints/mamba2")  # or a run, a published checkpoint, a hub id
    print(generate(loaded, "import ", max_new_tokens=100, temperature=0).text)

`load` is that of `models.checkpoints.checkpoint`; `generate` and `stream_text`, for text, are those
of `models.inference.texts`. For tensors of tokens there is `models.generation.generate`.

The files beside this one are the proof: scans, blocks, the language model, generation. The folders
are what the two commands need around it, imported left by right: `checkpoints -> data -> training`,
`checkpoints -> inference`.
"""

from importlib import import_module

_WHERE = {
    "load": "models.checkpoints.checkpoint",
    "generate": "models.inference.texts",
    "stream_text": "models.inference.texts",
    "Options": "models.inference.texts",
    "Result": "models.inference.texts",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    # On first use: the scans and blocks alone need neither Hydra's configs nor safetensors.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
