"""Every value that the config allows runs on every route and gives the same on each."""

import itertools
from dataclasses import fields

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from models.language_model import LanguageModel
from small_models import CONFIGS, MIXERS

# Values that fit each other often enough, for fields whose type and range say too little.
SIZES = {
    "hidden_size": [1, 8, 12],
    "head_dim": [1, 2, 4],
    "d_state": [1, 5, 8],
    "expand_v": [0.5, 1.0, 2.0],
    "num_v_heads": [None, 1, 2, 4],
    "norm_groups": [None, 1, 2],
    "mlp_ratio": [0.0, 0.5, 4.0],
    "mlp_size": [None, 1, 5],
    "norm_eps": [1e-12, 1e-5, 1.0],
    "dt_limit": [(0.0, float("inf")), (0.0, 0.1), (0.05, 0.5)],
}


def values(field) -> st.SearchStrategy:
    """Values of a field, from the least that its range allows."""
    if field.name in SIZES:
        return st.sampled_from(SIZES[field.name])
    if "choices" in field.metadata:
        return st.sampled_from(field.metadata["choices"])
    if field.type is bool:
        return st.booleans()
    assert field.type is int, f"{field.name} needs a line in SIZES"
    least = field.metadata["bounds"]["at least"]
    return st.integers(least, least + 4)


def forward(model, text, *, pieces=(), cu_seqlens=None):
    """Logits and states after text [B, T], read in pieces that end at these tokens."""
    state, parts = None, []
    for start, end in itertools.pairwise((0, *pieces, text.shape[1])):
        logits, state = model(text[:, start:end], state, True, cu_seqlens)
        parts.append(logits)
    return torch.cat(parts, 1), *(tensor for layer in state for tensor in layer)


def check_every_route(mixer: str, values: dict, lengths=(5, 1, 0, 3), pieces=((2,), range(1, 5))):
    """Packed sequences of these lengths, an empty one third, against one at a time; the first one
    in pieces that end at these tokens, of which single ones are recurrent steps."""
    torch.manual_seed(0)
    try:
        model = LanguageModel(CONFIGS[mixer](**values)).double()
    except ValueError:  # sizes that do not fit each other
        reject()
    parameters = list(model.parameters())
    texts = [torch.randint(0, values["vocab_size"], (1, n)) for n in lengths]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = forward(model, torch.cat(texts, 1), cu_seqlens=offsets)
    states = list(zip(packed[1::2], packed[2::2], strict=True))
    again, _ = model(torch.cat(texts, 1), states, cu_seqlens=offsets)
    full = [t for t in texts if t.shape[1]]
    alone = [forward(model, text) for text in full]
    expected = torch.cat([part[0] for part in alone], 1)
    torch.testing.assert_close(packed[0], expected)
    for tensor, *rows in zip(packed[1:], *(part[1:] for part in alone), strict=True):
        torch.testing.assert_close(tensor[[0, 1, 3]], torch.cat(rows))
    twice = [forward(model, torch.cat((t, t), 1))[0][:, t.shape[1] :] for t in full]
    torch.testing.assert_close(again, torch.cat(twice, 1))
    for ends in pieces:
        for ours, theirs in zip(forward(model, full[0], pieces=ends), alone[0], strict=True):
            torch.testing.assert_close(ours, theirs)
    losses = (logits.sin().sum() for logits in (packed[0], expected))
    for ours, theirs in zip(*(torch.autograd.grad(x, parameters) for x in losses), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=15)
@given(data=st.data())
def test_every_value_runs_on_every_route(mixer, data):
    drawn = {field.name: values(field) for field in fields(CONFIGS[mixer])}
    check_every_route(mixer, data.draw(st.fixed_dictionaries(drawn)))


LARGER = {
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5},
    "mamba2": {"d_state": 8, "head_dim": 8, "n_groups": 2, "dt_limit": (0.0, 0.08)},
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_sequences_of_several_chunks_on_every_route(mixer):
    sizes = {"vocab_size": 32, "hidden_size": 24, "num_layers": 2, "mlp_ratio": 1.0}
    pieces = ((70, *range(71, 80)), (1, 33), (3, 4, 5, 45))
    check_every_route(mixer, sizes | LARGER[mixer], (80, 1, 0, 70), pieces)


@pytest.mark.parametrize("name", ["num_layers", "norm_eps", "tie_embeddings", "dt_limit"])
def test_none_is_refused_where_the_type_has_none(name):
    sizes = {"hidden_size": 8, "num_layers": 1, "d_state": 4, "head_dim": 4}
    with pytest.raises(ValueError, match=f"{name} must have a value, got None"):
        CONFIGS["mamba2"](**{**sizes, name: None})
    assert CONFIGS["mamba2"](**sizes, norm_groups=None).norm_groups is None


@pytest.mark.parametrize("limits", [0.5, "ab", (0.5,), (0.0, 0.1, 0.2), (0.1, 0.1), (-0.1, 0.1)])
def test_limits_are_two_rising_numbers(limits):
    with pytest.raises(ValueError, match="dt_limit must be two numbers from 0"):
        CONFIGS["mamba2"](hidden_size=8, num_layers=1, d_state=4, head_dim=4, dt_limit=limits)


def test_limits_are_a_tuple_however_they_were_given():
    config = CONFIGS["mamba2"](
        hidden_size=8, num_layers=1, d_state=4, head_dim=4, dt_limit=[0.0, 0.1]
    )
    assert config.dt_limit == config.mixer_args()["dt_limit"] == (0.0, 0.1)
