"""A language model around either mixer: embedding, pre-norm residual blocks, head.

Shape letters: B batch, T tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn

from gatednorm import LayerNorm, RMSNorm
from models import exact as exact_mode
from models import kernels
from models.config import GatedDeltaNetConfig, Mamba2Config, ModelConfig
from models.exact import by_chunks
from models.gated_deltanet import GatedDeltaNet
from models.mamba2 import Mamba2
from models.mixer import Mixer
from models.products import Linear
from models.swiglu import swiglu

MIXERS = {GatedDeltaNetConfig: GatedDeltaNet, Mamba2Config: Mamba2}

State = list[tuple[Tensor, Tensor]]  # one pair a layer, and in exact mode one more


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, [..., D] to [..., D]; arXiv 2002.05202."""

    exact = False

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.in_proj = Linear(hidden_size, 2 * inner_size, bias=False)
        self.out_proj = Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(swiglu(self.in_proj(x), self.exact))


class Block(nn.Module):
    """``x + mixer(norm(x))``, and then, if there is an MLP, ``x + mlp(norm(x))``."""

    exact = False
    # Around what each of several ranks does a share of: see `models.tensor_parallel`.
    enter = leave = staticmethod(lambda x: x)

    def __init__(self, mixer: nn.Module, hidden_size: int, mlp_size: int, eps: float, path: str):
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, eps, norm_before_gate=True, path=path)
        self.mixer = mixer
        self.mlp_norm = self.mlp = None
        if mlp_size:
            self.mlp_norm = RMSNorm(hidden_size, eps, norm_before_gate=True, path=path)
            self.mlp = MLP(hidden_size, mlp_size)

    def forward(self, x, state, output_state, cu_seqlens):
        normed = by_chunks(self.exact, self.mixer_norm, x)
        update, state = self.mixer(self.enter(normed), state, output_state, cu_seqlens)
        x = x + self.leave(update)
        if self.mlp is not None:
            normed = by_chunks(self.exact, self.mlp_norm, x)
            x = x + self.leave(self.mlp(self.enter(normed)))
        return x, state


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head.

    Args:
        config: what the model is, kept as the attribute ``config``.
        norm_path: "training" (autograd) or "inference", of every norm.
        exact: whether a token's logits are the same bits in every call that computes them, in
            training, prefill and decoding; see `models.exact` and docs/exactness.md.
    Attributes:
        exact: the same, which may be set at any time; it is no part of the weights.
        ranks: of tensor parallelism, over which the heads are spread.
    Raises:
        ValueError: for sizes that do not fit each other.
    """

    ranks = 1

    def __init__(self, config: ModelConfig, *, norm_path: str = "training", exact: bool = False):
        super().__init__()
        self.config = config
        hidden_size, mlp_size, eps = config.hidden_size, config.mlp_size, config.norm_eps
        if mlp_size is None:
            mlp_size = -(-int(hidden_size * config.mlp_ratio * 2 / 3) // 256) * 256
        self.embedding = nn.Embedding(config.vocab_size, hidden_size)
        self.blocks = nn.ModuleList()
        for _ in range(config.num_layers):
            mixer = MIXERS[type(config)](
                hidden_size, norm_eps=eps, norm_path=norm_path, **config.mixer_args()
            )
            self.blocks.append(Block(mixer, hidden_size, mlp_size, eps, norm_path))
        self.norm = RMSNorm(hidden_size, eps, norm_before_gate=True, path=norm_path)
        self.head = Linear(hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.exact = exact
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small embeddings, so that a new model's loss is that of guessing; residual updates are
        scaled by the root of their number, so that depth does not raise the stream's size."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head.weight is not self.embedding.weight:
            nn.init.normal_(self.head.weight, std=0.02)
        updates = sum(1 if block.mlp is None else 2 for block in self.blocks)
        for block in self.blocks:
            for part in (block.mixer, block.mlp):
                if part is not None:
                    part.out_proj.reset_parameters()
                    with torch.no_grad():
                        part.out_proj.weight.div_(updates**0.5)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] int64, below the vocabulary size.
            state: what an earlier call returned for the tokens before these.
            output_state: whether to return the state after the last token: one pair of tensors
                per layer (the convolution's last inputs, the scan's state), and in exact mode one
                pair more (the tokens since the last chunk ended, their number), of a size that
                does not depend on the number of tokens.
            cu_seqlens: int32 [sequences + 1], token offsets of sequences packed into one row
                (B = 1); the state then has one row per sequence.
        Returns:
            logits [B, T, V], and the state or None.
        Raises:
            ValueError: for tokens that are not [B, T] of at least one token, for a state or
                offsets that do not fit, or a state of the other mode, and in exact mode for a
                linear layer that is not a plain `models.products.Linear`.
        """
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(
                f"tokens must be [B, T] with at least one token, got {list(tokens.shape)}; "
                "tokens[None] makes a single row a batch, and a batch of no rows needs no call"
            )
        if state is not None and len(state) != len(self.blocks) + self.exact:
            if len(state) == len(self.blocks) + (not self.exact):
                raise ValueError(
                    f"state must be one of exact={self.exact}, got one of exact={not self.exact}; "
                    "begin again with the prompt, or set the mode back"
                )
            raise ValueError(
                f"state must have one entry per layer, got {len(state)} for {len(self.blocks)} "
                "layers; pass what this model returned"
            )
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()  # read by every layer: waits for a GPU once
        if self.exact:
            if state is None or tokens.shape[1] > 1:  # not in each step of decoding
                self._check_exact()
            return exact_mode.forward(self._run, tokens, state, output_state, cu_seqlens)
        return self._run(tokens, state, output_state, cu_seqlens)

    def _run(self, tokens, state, output_state, cu_seqlens):
        x = self.embedding(tokens)
        states = []
        for index, block in enumerate(self.blocks):
            x, new = block(x, None if state is None else state[index], output_state, cu_seqlens)
            states.append(new)
        normed = by_chunks(self.exact, self.norm, x)
        return self.head(normed), states if output_state else None

    @property
    def exact(self) -> bool:
        return self._exact

    @exact.setter
    def exact(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"exact must be True or False, got {value!r}")
        self._exact = value
        for module in self.modules():
            if isinstance(module, (Block, Linear, MLP, Mixer)):
                module.exact = value

    @property
    def norm_path(self) -> str:
        """The path that every norm in the model takes."""
        return self.norm.path

    def set_norm_path(self, path: str) -> None:
        """Set the path of every norm: "training" or "inference"."""
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.path = path

    def _check_exact(self) -> None:
        """Raises ValueError for what exact mode cannot promise: a linear layer that is not ours or
        does more, by an adapter or a hook, a GPU whose products it cannot compute, several ranks.
        """
        if self.ranks > 1:
            raise ValueError(
                f"exact mode needs a single rank, got {self.ranks}: sums over ranks round "
                "otherwise than one product; leave the mode, or the other ranks"
            )
        weight = self.embedding.weight
        if weight.is_cuda and not kernels.usable(weight):
            raise ValueError(
                f"exact mode on a GPU needs triton, and fp32, bf16 or fp16, got {weight.dtype}; "
                "use the CPU, or another dtype"
            )
        for name, module in self.named_modules():
            named = name.rpartition(".")[2] in ("in_proj", "out_proj", "head")
            ours = isinstance(module, Linear) and module.exact and module.is_plain()
            if (named or isinstance(module, nn.Linear)) and not ours:
                hooked = " with a hook" if getattr(module, "hooked", False) else ""
                raise ValueError(
                    "exact mode needs every linear layer to be a models.products.Linear in exact "
                    f"mode without hooks, got {type(module).__name__}{hooked} for {name}; merge "
                    "the adapter into the weights, and set model.exact again"
                )

    def num_parameters(self) -> int:
        """Parameters of this rank, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def state_to(state: State, *args, **kwargs) -> State:
    """A copy of a model's state on another device, as ``Tensor.to`` makes it."""
    return [tuple(tensor.to(*args, **kwargs) for tensor in layer) for layer in state]
