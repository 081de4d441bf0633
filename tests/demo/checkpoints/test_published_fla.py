"""Checkpoints that flash-linear-attention's own code wrote, against its own forward.

Its kernels run on a GPU, or under Triton's interpreter, where its eval mode for short texts is one
that works. Without the package only these tests are skipped: test_published.py compares the
same layout with a restatement in plain torch.
"""

import pytest
import torch

from demo.checkpoints.checkpoint import load
from models.generation import generate
from published_models import FLA, fla_train, fla_weights

pytestmark = pytest.mark.slow  # under the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"head_dim": 16, "vocab_size": 256, "fuse_cross_entropy": False}
CASES = {
    "random": {},
    "one_value_head_per_key": {"num_v_heads": None},
    "no_gate": {"use_gate": False},
    "sigmoid": {"output_gate_activation": "sigmoid"},
    "tied": {"tie_word_embeddings": True},
    "trained200": {"allow_neg_eigval": False},
}


@pytest.fixture(params=CASES)
def theirs(request, tmp_path, monkeypatch):
    """FLA's model, which has written a checkpoint to `folder`."""
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    autotuner = pytest.importorskip("triton.runtime.autotuner", reason="needs triton")
    if DEVICE == "cpu":  # the interpreter cannot time configurations; the first of them will do
        monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda *_, **__: [1.0] * 3)
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    options = {**FLA, **SIZES, "fuse_norm": False, "fuse_swiglu": False, **CASES[request.param]}
    del options["model_type"]
    torch.manual_seed(0)
    model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**options))
    if request.param == "trained200":
        model.load_state_dict(fla_train(200, options))
    elif request.param == "random":
        model.load_state_dict(fla_weights(options))  # larger than those of a new model
    model.save_pretrained(tmp_path)
    return model.eval().to(DEVICE), tmp_path


def test_equals_flas_own_forward(theirs):
    """Logits of a text, and a greedy continuation."""
    model, folder = theirs
    ours = load(folder, "fla").model
    tokens = torch.randint(0, 64, (1, 12))
    with torch.no_grad():
        expected = model(input_ids=tokens.to(DEVICE), use_cache=False).logits.cpu()
        torch.testing.assert_close(ours(tokens)[0], expected, rtol=1e-3, atol=1e-3)
        text = tokens = tokens[:, :6]
        for _ in range(3):
            logits = model(input_ids=text.to(DEVICE), use_cache=False).logits
            text = torch.cat((text, logits[:, -1:].argmax(-1).cpu()), dim=1)
    continuation = torch.stack(list(generate(ours, tokens, 3, temperature=0)), dim=1)
    assert torch.equal(continuation, text[:, 6:])
