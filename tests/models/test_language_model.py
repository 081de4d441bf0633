"""The language model: state, packing, norm paths, sizes."""

import pytest
import torch
import torch.nn.functional as F

from gatednorm import modules as norm_modules
from models.language_model import LanguageModel, state_to
from small_models import CONFIGS, MIXERS, learn, small_model

SMALL = {
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
    "mamba2": {"d_state": 8, "head_dim": 8, "n_groups": 2, "dt_limit": (0.0, 0.08)},
}


def make(mixer, **options):
    return small_model(mixer, **{"mlp_ratio": 1.0, **SMALL[mixer], **options})


def tokens(batch, length):
    return torch.randint(0, 32, (batch, length), generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_state_size_does_not_grow(mixer):
    model = make(mixer)
    sizes = set()
    for length in (1, 2, 50, 300):
        _, state = model(tokens(2, length), output_state=True)
        sizes.add(tuple(t.untyped_storage().nbytes() for layer in state for t in layer))
    assert len(sizes) == 1, sizes


@pytest.mark.parametrize("mixer", MIXERS)
def test_state_saved_restored_and_moved(mixer, tmp_path):
    model = make(mixer)
    text = tokens(2, 30)
    _, state = model(text[:, :20], output_state=True)
    torch.save(state, tmp_path / "state.pt")
    restored = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = model(text[:, 20:], state)[0]
    assert torch.equal(model(text[:, 20:], restored)[0], expected)
    assert {t.device.type for layer in state_to(state, "meta") for t in layer} == {"meta"}
    assert torch.equal(model(text[:, 20:], state_to(state, "cpu", copy=True))[0], expected)
    rows = [tuple(t[1:] for t in layer) for layer in state]
    close(model(text[1:, 20:], rows)[0], expected[1:])


@pytest.fixture
def norm_calls(monkeypatch):
    """How often each of gatednorm's two paths ran, for a norm module."""
    calls = dict.fromkeys(("layernorm_fn", "rms_norm_gated"), 0)
    for name in calls:
        original = getattr(norm_modules, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(norm_modules, name, counted)

    def refused(*args, **kwargs):
        raise AssertionError("a norm that is not gatednorm's ran")

    monkeypatch.setattr(F, "rms_norm", refused)
    monkeypatch.setattr(F, "layer_norm", refused)
    return calls


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_norm_is_gatednorms_on_every_route(mixer, norm_calls):
    """In training, prefill and decode: two norms and the mixer's own in each of two blocks, and
    the last one."""
    model = make(mixer)
    model(tokens(2, 9))[0].sum().backward()
    assert norm_calls == {"layernorm_fn": 7, "rms_norm_gated": 0}
    model.set_norm_path("inference")
    assert model.norm_path == "inference"
    with torch.no_grad():
        _, state = model(tokens(2, 9), output_state=True)
        assert norm_calls == {"layernorm_fn": 7, "rms_norm_gated": 7}
        model(tokens(2, 1), state)
    assert norm_calls == {"layernorm_fn": 7, "rms_norm_gated": 14}


@pytest.mark.parametrize("mixer", MIXERS)
def test_norm_paths_give_the_same_bits(mixer):
    model = make(mixer)
    with torch.no_grad():
        expected = model(tokens(2, 40))[0]
        model.set_norm_path("inference")
        assert torch.equal(model(tokens(2, 40))[0], expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_inference_path_refuses_to_train(mixer):
    with pytest.raises(RuntimeError, match="use rmsnorm_fn"):
        make(mixer, norm_path="inference")(tokens(1, 5))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_new_model_guesses(mixer):
    """The loss of a new model is that of guessing: 8 bits per byte."""
    model = small_model(mixer, vocab_size=256, hidden_size=128)
    text = torch.randint(0, 256, (2, 100))
    loss = F.cross_entropy(model(text)[0].flatten(0, 1), torch.randint(0, 256, (200,)))
    assert abs(float(loss.detach()) / 0.6931 - 8) < 0.15


@pytest.mark.parametrize("mixer", MIXERS)
def test_learns(mixer):
    model = make(mixer, mlp_ratio=0.0, hidden_size=32)
    assert learn(model, 60)[0] < 1.0


def test_num_parameters():
    """A tied head counts once; sizes of the published configurations."""
    tied = make("mamba2", vocab_size=300)
    assert make("mamba2", vocab_size=300, tie_embeddings=False).num_parameters() == (
        tied.num_parameters() + 300 * 24
    )
    with torch.device("meta"):
        large = LanguageModel(
            CONFIGS["gated_deltanet"](
                vocab_size=32000,
                hidden_size=1024,
                num_layers=8,
                mlp_ratio=4,
                tie_embeddings=False,
                num_heads=6,
                head_dim=128,
            )
        )
    assert round(large.num_parameters() / 1e6) == 185


BAD = {
    "vocab": ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    "layers": ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    "hidden": ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    "mlp": ({"mlp_ratio": -1}, "mlp_ratio must be at least 0"),
    "limits": ({"dt_limit": (1.0, 0.5)}, "dt_limit must be two numbers from 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        small_model("mamba2", **options)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bad_inputs(mixer):
    model = make(mixer)
    _, state = model(tokens(2, 3), output_state=True)
    for arguments, message in (
        ((tokens(2, 3)[0],), r"tokens must be \[B, T\]"),
        ((tokens(2, 0),), "at least one token"),
        ((tokens(0, 3),), r"at least one token, got \[0, 3\]"),
        ((tokens(2, 3), state[:1]), "one entry per layer, got 1 for 2"),
        ((tokens(3, 3), state), "the convolution's state must have shape"),
        ((tokens(2, 6), None, False, torch.tensor([0, 6])), "got batch size 2"),
        ((tokens(1, 6), None, False, torch.tensor([0, 5])), "got 5 and 6 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
