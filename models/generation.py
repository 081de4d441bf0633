"""Generation: one call over the prompt, or a few over a long one, then a recurrent step per token.

Shape letters: B batch, T tokens, V vocabulary.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from models.language_model import LanguageModel, State
from models.log_probs import log_probs_of

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # lower ones count as this one
PREFILL_TOKENS = 1 << 14  # in one call; with 50,000 words their logits alone are 3 GB


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """One token per row: [B, V] to int64 [B].

    Args:
        logits: [B, V].
        temperature: divides the logits; 0 takes the most likely token, and so do values near it.
        top_k: keep the k most likely tokens, or None for all.
        top_p: keep the most likely tokens that together reach this probability, or None.
        generator: source of randomness, on the device of the logits; or one for each row.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    peak = logits.amax(dim=-1, keepdim=True)
    # The likeliest becomes 0, which a small temperature leaves as it is; inf - inf would be nan.
    # A GPU multiplies by the inverse of the temperature, which must be finite in fp32.
    logits = (logits - peak).masked_fill(logits == peak, 0.0) / max(temperature, LEAST_TEMPERATURE)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # a token goes if those before it already reach top_p: the most likely one always stays
        drop = probability.cumsum(dim=-1) - probability >= top_p
        logits = logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))
    probability = logits.softmax(dim=-1)
    if isinstance(generator, Sequence):
        rows = zip(probability.split(1), generator, strict=True)
        return torch.cat([_draw(row, own) for row, own in rows])
    return _draw(probability, generator)


def _draw(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    """One sample of each row, the one that ``torch.multinomial`` gives for the same generator, but
    without its checks: they wait for a GPU, which then waits for the next launch."""
    noise = torch.empty_like(probability).exponential_(generator=generator)
    return (probability / noise).argmax(dim=-1)


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Logits [B, V] in which the tokens of ``seen``, [B, V] bool, are less likely: CTRL's penalty
    (arXiv 1909.05858, section 4.1), and as in transformers a negative logit is multiplied."""
    lower = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return torch.where(seen, lower, logits)


def generate(
    model: LanguageModel,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    log_probs: bool = False,
    cuda_graph: bool = True,
) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:
    """Yields one new token for each sequence, [B] int64, ``max_new_tokens`` times.

    Args:
        model: in either mode; it is left in the mode that it came in.
        prompt: [T] or [B, T] int64; or a list of B prompts [T_i] of any lengths, which are packed
            without padding.
        max_new_tokens: how many to yield.
        temperature, top_k, top_p: see ``sample``.
        repetition_penalty: of the tokens that a sequence has had, its prompt included; 1 for none,
            above 1 for less repetition. See ``penalize``.
        seed: of a generator of its own; None for a random one, which several ranks that share a
            model must not have. A list of B seeds gives each sequence its own generator: it then
            draws what it would draw alone.
        log_probs: yield pairs instead, of the tokens and their natural log-probabilities, [B]
            fp32: those of the model itself, before penalty, temperature, top_k and top_p. With
            ``model.exact`` they are the bits of ``token_log_probs`` after one call of the model
            over the prompt and the tokens, in training too.
        cuda_graph: on a GPU, capture a step once and replay it; the tokens are the same without.
            Ranks that share a model then need NCCL between them.
    Raises:
        ValueError: at once for an empty prompt and for options out of range.
    """
    tokens, cu_seqlens = _pack(prompt)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; use None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}; use None for no limit")
    if not repetition_penalty > 0:
        raise ValueError(
            f"repetition_penalty must be above 0, got {repetition_penalty}; use 1 for none"
        )
    if seed is None and temperature and model.ranks > 1:
        raise ValueError(
            f"seed must be a number where several ranks share a model, got None for {model.ranks}: "
            "each would go on with other tokens; pass the same one on all of them"
        )
    sequences = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
    if isinstance(seed, Sequence):
        if len(seed) != sequences:
            raise ValueError(
                f"seed must be one number or one for each of {sequences} sequences, got {len(seed)}"
            )
        generator = [_generator(tokens.device, own) for own in seed]
    else:
        generator = _generator(tokens.device, seed)
    options = (temperature, top_k, top_p, generator)
    choose = _Chooser(tokens, cu_seqlens, repetition_penalty, log_probs, model.exact, options)
    return _tokens(model, tokens, cu_seqlens, max_new_tokens, choose, cuda_graph)


def _pack(prompt: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompts as [B, T] tokens and None, or packed as [1, total] and their offsets."""
    if isinstance(prompt, Tensor):
        tokens = prompt[None] if prompt.dim() == 1 else prompt
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(
                f"prompt must be [T] or [B, T] with at least one token, got {list(prompt.shape)}"
            )
        return tokens, None
    lengths = [len(part) for part in prompt]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every prompt must have at least one token, got lengths {lengths}")
    offsets = [0, *itertools.accumulate(lengths)]
    return torch.cat(list(prompt))[None], torch.tensor(offsets, dtype=torch.int32, device="cpu")


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class _Chooser:
    """Logits [B, V] to tokens [B], remembering which tokens each sequence has had."""

    def __init__(self, tokens, cu_seqlens, repetition_penalty, log_probs, exact, options):
        self.tokens, self.cu_seqlens, self.exact = tokens, cu_seqlens, exact
        self.repetition_penalty, self.options = repetition_penalty, options
        self.log_probs = log_probs
        self.seen = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens, and their log-probabilities where they are asked for."""
        scores = logits
        if self.repetition_penalty != 1:
            if self.seen is None:
                self.seen = self._seen_in_prompts(logits)
            scores = penalize(logits, self.seen, self.repetition_penalty)
        token = sample(scores, *self.options)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        if not self.log_probs:
            return token, None
        return token, log_probs_of(logits, token, self.exact)

    def _seen_in_prompts(self, logits: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if self.cu_seqlens is None:
            return seen.scatter_(1, self.tokens, True)
        rows = torch.arange(len(logits), device="cpu")
        rows = rows.repeat_interleave(self.cu_seqlens.diff().long())
        seen[rows.to(logits.device), self.tokens[0]] = True
        return seen


def _tokens(model, tokens, cu_seqlens, max_new_tokens, choose, cuda_graph) -> Iterator[Tensor]:
    decoder = _GraphDecoder if cuda_graph and tokens.is_cuda else _EagerDecoder
    step = token = None
    for _ in range(max_new_tokens):
        with _inference(model):
            if token is None:
                logits, state = _prefill(model, tokens, cu_seqlens)
            else:
                step = decoder(model, state) if step is None else step
                logits = step(token)
            token, log_prob = choose(logits)
        yield (token, log_prob) if choose.log_probs else token


def _prefill(model, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
    """Logits [B, V] of the last tokens, and the state after them; long prompts piece by piece, in
    memory that does not grow with their length."""
    if cu_seqlens is not None:
        logits, state = model(tokens, output_state=True, cu_seqlens=cu_seqlens)
        return logits[0, cu_seqlens[1:].long() - 1], state
    state = None
    for piece in tokens.split(max(1, PREFILL_TOKENS // len(tokens)), dim=1):
        logits, state = model(piece, state, output_state=True)
    return logits[:, -1], state


@contextlib.contextmanager
def _inference(model: LanguageModel) -> Iterator[None]:
    """Inference mode for one step: a generator must not hold a global mode while it is away."""
    with torch.inference_mode(), in_mode(model, training=False):
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; each module is left in the mode it came in."""
    if model.training is training:  # else a walk over all modules, which a decoding step would feel
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _EagerDecoder:
    """One recurrent step: tokens [B] to logits [B, V], keeping the state."""

    def __init__(self, model: LanguageModel, state: State):
        self.model, self.state = model, state

    def __call__(self, token: Tensor) -> Tensor:
        logits, self.state = self.model(token[:, None], self.state, output_state=True)
        return logits[:, 0]


class _GraphDecoder:
    """The same step as one CUDA graph: fixed buffers for token, state and logits, and a replay.

    Without it a step at small batches is bound by Python and launches, not by the GPU.
    """

    def __init__(self, model: LanguageModel, state: State):
        self.model = model
        self.state = [tuple(tensor.clone() for tensor in layer) for layer in state]
        rows, self.device = state[0][1].shape[0], state[0][1].device
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.graph = torch.cuda.CUDAGraph()
        # A weight that autocast cached would be freed with its context, while the graph reads it.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(self.device), autocast:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels and makes the libraries' workspaces
                    model(self.token, self.state, output_state=True)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = self._step()

    def _step(self) -> Tensor:
        logits, new = self.model(self.token, self.state, output_state=True)
        for old_layer, new_layer in zip(self.state, new, strict=True):
            for old, tensor in zip(old_layer, new_layer, strict=True):
                old.copy_(tensor)
        return logits[:, 0]

    def __call__(self, token: Tensor) -> Tensor:
        """Logits that the next call overwrites."""
        self.token.copy_(token[:, None])
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.logits
