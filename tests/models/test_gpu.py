"""What only a GPU shows of the models: 16-bit products, whole blocks, graphs, moved states."""

import copy

import pytest
import torch
import torch.nn.functional as F

from exact_checks import count_differences, exact_model, random_tokens, same_bits
from models import generation, token_log_probs
from models.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from models.generation import generate
from models.language_model import state_to
from models.ssd import chunk_ssd, recurrent_ssd
from scan_checks import make_delta, make_ssd
from small_models import small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MIXERS = {
    "gated_deltanet": {"num_heads": 2, "head_dim": 32, "num_v_heads": 4},
    "mamba2": {"d_state": 32, "head_dim": 32, "n_groups": 2},
}


def delta_inputs(batch, tokens, heads, dim_k, dim_v):
    q, k, v, g, beta, _ = make_delta(batch, tokens, heads, heads, dim_k, dim_v, torch.float32)
    return [t.cuda() for t in (q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.1 * g, beta)]


def ssd_inputs(batch, tokens, heads, dim, state):
    x, dt, a, b, c, *_ = make_ssd(batch, tokens, heads, 1, dim, state, torch.float32)
    steps = 0.1 * torch.rand_like(dt)
    return [t.cuda() for t in (x.bfloat16(), steps, a / 4, b.bfloat16(), c.bfloat16())]


DELTA = (chunk_gated_delta_rule, recurrent_gated_delta_rule, delta_inputs)
SCANS = {
    "delta-H6-K128-V256": (*DELTA, (2, 700, 6, 128, 256)),
    "delta-H2-K64-V64": (*DELTA, (2, 700, 2, 64, 64)),
    "ssd-H32-P64-S128": (chunk_ssd, recurrent_ssd, ssd_inputs, (2, 700, 32, 64, 128)),
}


def outputs_and_gradients(function, inputs, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y, state = function(*inputs, output_final_state=True)
    cotangent = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    loss = (y * cotangent.to(y.dtype)).sum() + state.sum()
    return [y, state, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("case", SCANS)
def test_scan_in_bf16_at_the_sizes_of_a_model(case):
    """Every output and gradient within bf16's rounding of the recurrence in float64."""
    chunked, recurrent, make, shape = SCANS[case]
    inputs = make(*shape)
    truth = outputs_and_gradients(recurrent, inputs, torch.float64)
    for index, (actual, expected) in enumerate(
        zip(outputs_and_gradients(chunked, inputs), truth, strict=True)
    ):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 2e-2, (index, error.item())


def loss_and_gradients(model, tokens, offsets):
    logits, _ = model(tokens[:, :-1], cu_seqlens=offsets)
    loss = F.cross_entropy(logits[0].float(), tokens[0, 1:])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.flatten().float().cpu() for g in grads])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_equals_the_cpu(mixer, dtype):
    """Loss and gradients, for a batch and for packed sequences, against fp32 on the CPU; in bf16
    with at most twice the error that the CPU makes in bf16, where the scans compute in fp32."""
    model = small_model(mixer, vocab_size=64, hidden_size=64, num_layers=4, **MIXERS[mixer])
    model = model.to(torch.bfloat16).float()  # weights that both can hold
    tokens = torch.randint(0, 64, (1, 301))
    for offsets in (None, torch.tensor([0, 3, 3, 150, 300], dtype=torch.int32)):
        loss, expected = loss_and_gradients(model, tokens, offsets)

        def error(grads, expected=expected):
            return float((grads - expected).norm() / expected.norm())

        granted = 5e-4
        if dtype != torch.float32:
            granted = error(loss_and_gradients(copy.deepcopy(model).to(dtype), tokens, offsets)[1])
        moved = copy.deepcopy(model).to("cuda", dtype)
        gpu_loss, grads = loss_and_gradients(moved, tokens.cuda(), offsets)
        assert abs(loss - gpu_loss) < (1e-3 if dtype == torch.float32 else 1e-2)
        assert error(grads) <= 2 * granted


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_state_moves_between_devices(mixer):
    model = small_model(mixer, vocab_size=64, hidden_size=64, num_layers=4, **MIXERS[mixer])
    tokens = torch.randint(0, 64, (2, 50))
    with torch.inference_mode():
        expected, _ = model(tokens)
        _, state = model(tokens[:, :30], output_state=True)
        with pytest.raises(ValueError, match="must be on the device of the input"):
            model.cuda()(tokens[:, 30:].cuda(), state)
        logits, state = model(tokens[:, 30:40].cuda(), state_to(state, "cuda"), True)
        torch.testing.assert_close(logits.cpu(), expected[:, 30:40], rtol=1e-3, atol=1e-3)
        logits, _ = model.cpu()(tokens[:, 40:], state_to(state, "cpu"))
    torch.testing.assert_close(logits, expected[:, 40:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_graph_equals_eager_steps(mixer, autocast, options):
    """The captured step gives the tokens of eager steps, in both of the 16-bit modes, and twice."""
    model = small_model(mixer, vocab_size=64, hidden_size=64, num_layers=4, **MIXERS[mixer]).cuda()
    model = model if autocast else model.bfloat16()
    prompts = [torch.randint(0, 64, (n,), device="cuda") for n in (3, 40, 9)]

    def tokens(**how):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return torch.stack(list(generate(model, prompts, 30, **options, **how)))

    first = tokens()
    assert torch.equal(tokens(), first)
    assert torch.equal(tokens(cuda_graph=False), first)


def test_sampling_does_not_wait_for_the_gpu():
    """A step that waited would cost the GPU its queue."""
    logits = torch.randn(4, 100, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generation.sample(logits, 0.7, top_k=5, top_p=0.9, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_exact_mode(mixer, how, record_property):
    """The bits of the training forward in every call, and those that generation reports, with and
    without the graph."""
    model = exact_model(mixer, hidden_size=64, **MIXERS[mixer])
    model = model.to("cuda", torch.bfloat16 if how == "bf16" else torch.float32)
    with torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
        different, compared = count_differences(model, device="cuda")
        record_property(
            "exact mode", f"{mixer}, {how}: {compared:,} logits compared, {different} different"
        )
        assert (different, compared > 100_000) == (0, True)
        prompts = [random_tokens(n, seed=n).cuda() for n in (1, 40, 64, 99)]
        for cuda_graph in (True, False):
            options = {"seed": [1, 2, 3, 4], "log_probs": True, "cuda_graph": cuda_graph}
            steps = list(generate(model, prompts, 70, **options))
            tokens, reported = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
            for prompt, new, log_probs in zip(prompts, tokens, reported, strict=True):
                logits, _ = model(torch.cat((prompt, new))[None, :-1])
                expected = token_log_probs(logits[0, len(prompt) - 1 :], new)
                assert same_bits(log_probs, expected) == (0, 70)
