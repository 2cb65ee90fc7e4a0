"""Stage ``demo``, the network: a small Llama in plain torch, tensor for tensor transformers' `LlamaForCausalLM`.

It must not import transformers, which the demo does without, nor read or write files.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from ckavg.demo.corpus import VOCABULARY_SIZE

__all__ = ["Llama", "LlamaShape", "empty_llama", "initialised_llama"]

_INITIALIZER_RANGE = 0.02
_RMS_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a :class:`Llama`, under the names that `config.json` gives them.

    `max_position_embeddings` is the length, in tokens, that the network is trained and judged on.

    Raises:
        ValueError: the heads do not divide the width, or a head is of odd size and cannot be rotated by halves.
    """

    vocab_size: int = VOCABULARY_SIZE
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 128

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not give {self.num_attention_heads} heads of one even size: "
                f"use a multiple of {2 * self.num_attention_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_config(self) -> dict[str, object]:
        """What `config.json` says of this network, for `AutoModelForCausalLM` to build the same one."""
        return asdict(self) | self._fixed() | {"initializer_range": _INITIALIZER_RANGE, "dtype": "float32"}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "LlamaShape":
        """The inverse of :meth:`to_config`; what does not change the logits (dtype, versions) is not looked at.

        Raises:
            ValueError: the configuration is of another kind of network than :class:`Llama`; all differences are named.
        """
        sizes = {field.name: config.get(field.name) for field in fields(cls)}
        wrong = [
            f"{name} is {size!r}, expected a whole number" for name, size in sizes.items() if type(size) is not int
        ]
        if not wrong:
            shape = cls(**sizes)  # type: ignore[arg-type]
            wrong = [
                f"{name} is {config.get(name)!r}, expected {expected!r}"
                for name, expected in shape._fixed().items()
                if config.get(name) != expected
            ]
        if wrong:
            raise ValueError(f"This is not a model of the demo: {'; '.join(wrong)}.")
        return shape

    def _fixed(self) -> dict[str, object]:
        """What follows from the sizes, or is the same for every :class:`Llama`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": _RMS_NORM_EPS,
            # Read by transformers 5; earlier ones take the same 10000 by default.
            "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            # Bytes have no special tokens; left out, these would be read as Llama's 1 and 2.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, _RMS_NORM_EPS)


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.num_attention_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, self.head_dim)
        q = _rotated(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = _rotated(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected


class _MLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


class _Layer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _MLP(shape)
        self.input_layernorm = _RMSNorm(shape.hidden_size)
        self.post_attention_layernorm = _RMSNorm(shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        after: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return after


class _Decoder(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = _RMSNorm(shape.hidden_size)


class Llama(nn.Module):
    """A causal language model; its `state_dict` is that of `LlamaForCausalLM`, without the tied `lm_head.weight`.

    RMSNorm before each block, rotary position embeddings (pairs half a head apart), SwiGLU, no biases; the output
    layer is the embedding. Weights are float32.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        # The name is the prefix of every tensor in the file.
        self.model = _Decoder(shape)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: (batch, length), int64, below `vocab_size`; length at most `max_position_embeddings`.

        Returns:
            (batch, length, vocab_size), float32.
        """
        cos, sin = _rotation(tokens.shape[1], self.shape.head_dim)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def loss(self, windows: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy, in nats a token, of every token in each window but its first.

        Args:
            windows: (batch, length + 1), int64.
            reduction: "mean" or "sum" over all predicted tokens.

        Returns:
            A scalar, float32.
        """
        logits = self(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def empty_llama(shape: LlamaShape) -> Llama:
    """A network without storage (on torch's meta device), to be given weights."""
    # Modules draw their initial weights from the process's random state; on this device they draw nothing.
    with torch.device("meta"):
        return Llama(shape)


def initialised_llama(shape: LlamaShape, *, generator: torch.Generator) -> Llama:
    """A network as transformers initialises it: matrices normal with deviation 0.02, norms one.

    All randomness is taken from `generator`; the process's own random state is neither read nor changed.
    """
    network = empty_llama(shape).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _INITIALIZER_RANGE, generator=generator)
    return network


def _rotation(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (length, head_dim)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / _ROPE_THETA**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (…, length, head_dim) turned by its position; channel i pairs with channel i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
