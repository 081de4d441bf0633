"""What the tests of the exact mode share: models, pieces, and the count of other bits."""

import itertools
import random

import torch

from models.exact import CHUNK
from models.language_model import LanguageModel
from small_models import small_model

# Three threads share the elements of these at places that are no multiple of a vector.
SIZES = {
    "gated_deltanet": {"num_v_heads": 4, "expand_v": 1.0, "mlp_size": 40},
    "mamba2": {"n_groups": 5, "d_state": 7, "bias": True},
}
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def exact_model(name, **options) -> LanguageModel:
    model = small_model(name, **{"vocab_size": 67, "hidden_size": 20, **SIZES[name], **options})
    with torch.no_grad():
        model.embedding.weight.mul_(15)  # else the logits are close to zero
    model.exact = True
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(seed))


def same_bits(one, other):
    """How many elements have other bits, and how many there are."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return int((one.detach().view(bits) != other.detach().view(bits)).sum()), one.numel()


def in_pieces(model, tokens, sizes, state=None):
    """The logits of tokens [B, T], as many at a time as `sizes` say, and the state."""
    parts, start = [], 0
    with torch.inference_mode():
        while start < tokens.shape[1]:
            end = start + next(sizes)
            logits, state = model(tokens[:, start:end], state, output_state=True)
            parts.append(logits)
            start = end
    return torch.cat(parts, dim=1), state


def random_sizes(seed):
    draw = random.Random(seed)
    while True:
        yield draw.choice((1, 1, 1, 1, 2, CHUNK - 1, CHUNK, CHUNK + 3, 2 * CHUNK))


def count_differences(model, lengths=LENGTHS, device="cpu") -> tuple[int, int]:
    """Of the logits of one training forward, against prefills of random splits with decoding, in
    batches of one and of four, and against the same sequences packed."""
    different = compared = 0

    def compare(one, other):
        nonlocal different, compared
        found, count = same_bits(one, other)
        different, compared = different + found, compared + count

    texts = []
    for seed, length in enumerate(lengths):
        tokens = random_tokens(4, length, seed=seed).to(device)
        expected, _ = model(tokens)
        texts += zip(tokens, expected, strict=True)
        compare(in_pieces(model, tokens, random_sizes(seed))[0], expected)
        compare(in_pieces(model, tokens[1:2], random_sizes(seed + 99))[0], expected[1:2])
        compare(model(tokens[:1])[0], expected[:1])
    random.Random(0).shuffle(texts)
    packed = torch.cat([tokens for tokens, _ in texts])[None]
    offsets = torch.tensor([0, *itertools.accumulate(len(tokens) for tokens, _ in texts)])
    expected = torch.cat([logits for _, logits in texts])[None]
    compare(model(packed, cu_seqlens=offsets)[0], expected)
    with torch.inference_mode():
        compare(model(packed, cu_seqlens=offsets, output_state=True)[0], expected)
    return different, compared
