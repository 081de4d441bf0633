"""The gated delta rule against a float64 loop, against transformers, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from models.delta_chunks import unit_lower_inverse
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from scan_checks import assert_close, make_delta, results

FUNCTIONS = {"chunked": chunk_gated_delta_rule, "recurrent": recurrent_gated_delta_rule}


def naive(q, k, v, g, beta, scale, state):
    """The recurrence as the paper prints it, S_t = a_t (I - beta_t k_t k_t^T) S + beta_t k_t v_t^T,
    one head and one token at a time."""
    batch, tokens, heads, dim_k = q.shape
    value_heads = v.shape[2]
    rows, finals = [], []
    for b in range(batch):
        for h in range(value_heads):
            key_head = h * heads // value_heads
            s = state[b, h]
            for t in range(tokens):
                key = k[b, t, key_head]
                erase = torch.eye(dim_k, dtype=k.dtype) - beta[b, t, h] * torch.outer(key, key)
                s = g[b, t, h].exp() * (erase @ s) + beta[b, t, h] * torch.outer(key, v[b, t, h])
                rows.append(scale * (q[b, t, key_head] @ s))
            finals.append(s)
    o = torch.stack(rows).view(batch, value_heads, tokens, -1).transpose(1, 2)
    return o, torch.stack(finals).view_as(state)


CASES = {  # batch, tokens, heads, value_heads, dim_k, dim_v
    "T37-H2": (2, 37, 2, 2, 8, 6),
    "T64-grouped": (1, 64, 2, 6, 4, 8),
    "T1": (2, 1, 1, 2, 4, 4),
    "T5-below_chunk": (1, 5, 1, 1, 5, 3),
}


@pytest.mark.parametrize("scale", [0.7, None], ids=["scale0.7", "scale_default"])
@pytest.mark.parametrize("chunk_size", [1, 12, 16, 32, None], ids=lambda c: f"chunk{c}")
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_loop(case, chunk_size, scale):
    """In chunks, and without a chunk size one step at a time."""
    inputs = make_delta(*CASES[case])
    function = recurrent_gated_delta_rule if chunk_size is None else chunk_gated_delta_rule

    def loop(*args, initial_state, output_final_state):
        return naive(*args, scale or args[0].shape[-1] ** -0.5, initial_state)

    actual = results(function, inputs, chunk_size=chunk_size, scale=scale)
    assert_close(actual, results(loop, inputs), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("heads", [(2, 2), (2, 4)], ids=["H2", "H2-HV4"])
def test_equals_transformers(name, heads):
    """Outputs, final states and gradients, from raw q and k through the L2 norm, in fp32."""
    inputs = make_delta(2, 150, *heads, 32, 16, dtype=torch.float32)

    def theirs(*args, **options):
        function = getattr(
            qwen3_next, f"torch_{'chunk' if name == 'chunked' else name}_gated_delta_rule"
        )
        return function(*args, use_qk_l2norm_in_kernel=True, **options)

    def ours(q, k, *args, **options):
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        return FUNCTIONS[name](q, k, *args, **options)

    assert_close(results(ours, inputs), results(theirs, inputs), 2e-6)


@pytest.mark.parametrize("beta", [0.999, 1.0, 1.9], ids=lambda b: f"beta{b}")
def test_near_identical_keys_stay_accurate(beta):
    """4096 tokens whose keys differ by 1e-3: the case in which powers of A overflow."""
    torch.manual_seed(0)
    tokens, dim = 4096, 16
    k = F.normalize(torch.ones(dim) + 1e-3 * torch.randn(1, tokens, 1, dim), dim=-1)
    q, v = torch.randn(1, tokens, 1, dim), torch.randn(1, tokens, 1, dim)
    g = torch.full((1, tokens, 1), -1e-4)
    beta = torch.full((1, tokens, 1), beta)
    inputs = [q, k, v, g, beta]
    expected, state = recurrent_gated_delta_rule(
        *(x.double() for x in inputs), output_final_state=True
    )
    actual = chunk_gated_delta_rule(*inputs, output_final_state=True)
    plain = recurrent_gated_delta_rule(*inputs, output_final_state=True)
    for ours, loop, truth in zip(actual, plain, (expected, state), strict=True):
        allowed = 2 * (loop - truth).abs().max() + 1e-5 * truth.abs().max()
        assert (ours - truth).abs().max() <= allowed


@pytest.mark.parametrize("size", [1, 2, 5, 8, 12, 32, 48, 64])
def test_unit_lower_inverse(size):
    torch.manual_seed(0)
    a = torch.randn(3, size, size).tril(-1)
    a[0] = torch.ones(size, size).tril(-1)  # identical keys, beta 1: the inverse is bidiagonal
    truth = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + a.double())
    error = (unit_lower_inverse(a) - truth).abs().amax((1, 2)) / truth.abs().amax((1, 2))
    assert error.max() < 1e-5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_shapes(name):
    q, k, v, g, beta, _ = (x.detach() for x in make_delta(2, 8, 2, 4, 4, 4))
    function = FUNCTIONS[name]
    with pytest.raises(ValueError, match="with the same B and T"):
        function(q[:, :7], k, v, g, beta)
    with pytest.raises(ValueError, match="multiple of the key heads, got 3 and 2"):
        function(q, k, v[:, :, :3], g[..., :3], beta[..., :3])
    with pytest.raises(ValueError, match=r"g and beta must be \[B, T, HV\]"):
        function(q, k, v, g[..., :2], beta)
    with pytest.raises(ValueError, match="float64 or none of them"):
        function(q.float(), k, v.double(), g, beta)
    with pytest.raises(ValueError, match="got batch size 2"):
        function(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 8]))
