"""A minute of training to try ckavg on: a small Llama learns Python's manual, byte by byte, and saves checkpoints.

This is the usual case for averaging: a pretrained model is trained further at a constant learning rate with small
batches, so that the last checkpoint is a noisy sample around a better model. It needs no network and no GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics as python_topics
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ckavg.engine.stream import one_core_per_kernel
from ckavg.errors import OutputExistsError

_RUN_NAME = "ckavg demo"
_FILES = {"model.safetensors", "config.json", "generation_config.json", "trainer_state.json"}
_RMS_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0
_BATCH = 4
_LOGGING_STEPS = 10


class Corpus(NamedTuple):
    """Text for pretraining, for the run, and held out, in UTF-8. Each byte is a token, so there is no tokenizer."""

    pretraining: bytes
    training: bytes
    held_out: bytes


def load_corpus(topics: Mapping[str, str] = python_topics) -> Corpus:
    r"""Split texts, by default Python's language reference, into three parts that share no paragraph.

    The topics, sorted by name, are cut in two at half of the bytes. The last eighth of the paragraphs of every topic in
    the second half is held out. Some sections of the reference are repeated in other topics ("if" in "compound"), so
    only the first occurrence of a paragraph is kept: otherwise most held-out text would also be trained on.

    Raises:
        ValueError: a part is empty, because there are fewer than two topics or they are too short.

    Examples:
        >>> load_corpus({"assert": "one\n\ntwo", "while": "two\n\nthree\n\nfour"})
        Corpus(pretraining=b'one\n\ntwo\n\n', training=b'three\n\n', held_out=b'four\n\n')
    """
    seen: set[str] = set()
    by_topic: list[list[bytes]] = []
    for name in sorted(topics):
        by_topic.append([])
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())  # indentation differs between the copies
            if words and words not in seen:
                seen.add(words)
                by_topic[-1].append(paragraph.strip("\n").encode() + b"\n\n")
    total = sum(len(b"".join(paragraphs)) for paragraphs in by_topic)
    pretraining, training, held_out, passed = b"", b"", b"", 0
    for paragraphs in by_topic:
        size = len(b"".join(paragraphs))
        if 2 * passed + size <= total:  # decided by its middle, so that one long topic cannot leave a part empty
            pretraining += b"".join(paragraphs)
        else:
            cut = len(paragraphs) - max(1, round(len(paragraphs) / 8))
            training += b"".join(paragraphs[:cut])
            held_out += b"".join(paragraphs[cut:])
        passed += size
    if not (pretraining and training and held_out):
        raise ValueError(f"{len(topics)} topics of {total} bytes are too little to train on one part and hold out one.")
    return Corpus(pretraining, training, held_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The sizes of a :class:`Llama`, named as in `config.json`.

    `hidden_size` is an even multiple of the number of heads; `max_position_embeddings` is the tokens of a window.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 128

    def to_config(self) -> dict[str, object]:
        """The content of `config.json`, from which `AutoModelForCausalLM` builds the same network."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "rms_norm_eps": _RMS_NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
            "tie_word_embeddings": True,
            # Bytes have no special tokens. Without these entries, Llama's defaults 1 and 2 would apply.
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }


class _Layer(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        width, inner, linear = shape.hidden_size, shape.intermediate_size, partial(nn.Linear, bias=False)
        self.heads = shape.num_attention_heads
        self.self_attn = nn.ModuleDict({f"{name}_proj": linear(width, width) for name in "qkvo"})
        sizes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        self.mlp = nn.ModuleDict({f"{name}_proj": linear(*size) for name, size in sizes.items()})
        self.input_layernorm = nn.RMSNorm(width, _RMS_NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(width, _RMS_NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{name}_proj"](normed).unflatten(-1, (self.heads, -1)) for name in "qkv")
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        q, k = (each * cos + torch.cat((-each.chunk(2, -1)[1], each.chunk(2, -1)[0]), -1) * sin for each in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        fed: Tensor = self.mlp["down_proj"](
            functional.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        )
        return x + fed


class Llama(nn.Module):
    """A causal language model; its `state_dict` is that of `LlamaForCausalLM`, without the tied `lm_head.weight`.

    RMSNorm before each block, rotary position embeddings (pairs half a head apart), SwiGLU, no biases; the output
    layer is the embedding. On torch's meta device it takes no memory and no random numbers.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(  # as in transformers, the prefix of every tensor's name
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(_Layer(shape) for _ in range(shape.num_hidden_layers)),
                "norm": nn.RMSNorm(shape.hidden_size, _RMS_NORM_EPS),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each position: (batch, length, vocab_size), float32, from int64 (batch, length)."""
        embedding = self.model.get_parameter("embed_tokens.weight")
        head_size = self.shape.hidden_size // self.shape.num_attention_heads
        frequencies = 1 / _ROPE_THETA ** (torch.arange(0, head_size, 2) / head_size)
        angles = torch.outer(torch.arange(tokens.shape[1]), frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        x = functional.embedding(tokens, embedding)
        for layer in self.model["layers"].children():
            x = layer(x, cos, sin)
        return functional.linear(self.model["norm"](x), embedding)

    def loss(self, windows: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy, in nats a token, of all tokens but the first of each window: int64, (batch, length + 1)."""
        logits = self(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def initialised_llama(shape: LlamaShape, *, generator: torch.Generator) -> Llama:
    """A network initialised as by transformers, from `generator`: matrices normal with deviation 0.02, norms 1."""
    with torch.device("meta"):
        network = Llama(shape)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.02, generator)
    return network


def write_checkpoint(run: Path, step: int, model: Llama, trainer_state: Mapping[str, object]) -> Path:
    """Write `run`/checkpoint-`step` as transformers' Trainer does, completely or not at all, and return its path.

    Raises:
        OSError: the checkpoint exists already, or cannot be written.
    """
    staging = run / f".tmp-checkpoint-{step}"
    staging.mkdir()
    try:
        save_file(model.state_dict(), staging / "model.safetensors", metadata={"format": "pt"})
        generation = {"_from_model_config": True, "use_cache": True}
        files = {"config": model.shape.to_config(), "generation_config": generation, "trainer_state": trainer_state}
        for name, value in files.items():
            (staging / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return staging.replace(run / f"checkpoint-{step}")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load_model(directory: Path) -> Llama:
    """Read the model in `directory`, a checkpoint or an average of checkpoints; weights become float32.

    Raises:
        OSError: `config.json` or `model.safetensors` is missing or cannot be read.
        KeyError, RuntimeError: they are not a model of the demo.
    """
    config = json.loads((directory / "config.json").read_bytes())
    shape = LlamaShape(**{field.name: config[field.name] for field in fields(LlamaShape)})
    with torch.device("meta"):
        model = Llama(shape)
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model


def random_windows(text: bytes, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of windows of `length` + 1 consecutive bytes, (batch_size, length + 1), int64."""
    windows = _tokens(text).unfold(0, length + 1, 1)
    while True:
        yield windows[torch.randint(len(windows), (batch_size,), generator=generator)]


@one_core_per_kernel()
def train(
    directory: Path,
    *,
    steps: int = 640,
    save_every: int = 40,
    pretraining_steps: int = 350,
    shape: LlamaShape | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> tuple[int, ...]:
    """Train a small Llama on Python's language reference and save the run as transformers' Trainer does.

    First come `pretraining_steps` on one half of the topics, without saving. The run follows on the other half, with a
    new AdamW at a constant learning rate after a short warm-up; a decay would remove the noise that averaging is to
    remove. The same arguments give the same weights on one machine with one Python and torch, since one thread
    computes. The random state of the process is neither read nor changed.

    Args:
        directory: where the checkpoints go; created if it does not exist.
        steps: optimizer steps of the run.
        save_every: optimizer steps between two checkpoints; the last step is saved as well.
        pretraining_steps: optimizer steps before the run.
        shape: the network; by default `LlamaShape()`.
        seed: of the initial weights and of the order of the text.
        on_progress: called after every optimizer step with the steps done, the total steps (pretraining and run) and
            the step's training loss in nats per byte.

    Returns:
        The steps that were saved.

    Raises:
        OutputExistsError: `directory` already has checkpoints.
        OSError: it is a file, or a checkpoint cannot be written.
    """
    if any(directory.glob("checkpoint-*")):
        hint = "Give another directory; --force replaces the checkpoints of an earlier demo."
        raise OutputExistsError(f"{directory} holds checkpoints already.", hint=hint)
    directory.mkdir(parents=True, exist_ok=True)
    corpus, generator = load_corpus(), torch.Generator().manual_seed(seed)
    model = initialised_llama(shape or LlamaShape(), generator=generator)
    report = on_progress or (lambda *_: None)
    for update in _updates(model, corpus.pretraining, pretraining_steps, 8, generator):
        report(update["step"], pretraining_steps + steps, update["loss"])

    state: dict[str, Any] = {
        "epoch": 0.0,
        "global_step": 0,
        "log_history": [],
        "logging_steps": _LOGGING_STEPS,
        "max_steps": steps,
        "save_steps": save_every,
        "train_batch_size": _BATCH,
        "trial_name": _RUN_NAME,
    }
    write_checkpoint(directory, 0, model, state)
    saved, losses = [0], list[float]()
    for update in _updates(model, corpus.training, steps, _BATCH, generator):
        step = update["step"]
        losses.append(update["loss"])
        if step % _LOGGING_STEPS == 0:
            state["log_history"].append(update | {"loss": fmean(losses[-_LOGGING_STEPS:])})
        if step % save_every == 0 or step == steps:
            write_checkpoint(directory, step, model, state | {"epoch": update["epoch"], "global_step": step})
            saved.append(step)
        report(pretraining_steps + step, pretraining_steps + steps, update["loss"])
    return tuple(saved)


def remove_earlier(directory: Path) -> None:
    """Remove the checkpoints that an earlier :func:`train` wrote to `directory`, and nothing else.

    Raises:
        OutputExistsError: the demo did not make one of them, or it has other files.
    """
    found = [path for name in ("checkpoint-*", ".tmp-checkpoint-*") for path in sorted(directory.glob(name))]
    for path in found:
        if not _is_of_demo(path):
            message = f"{path} was not made by the demo, so it is not removed."
            raise OutputExistsError(message, hint="Name another directory.")
    for path in found:
        shutil.rmtree(path)


@one_core_per_kernel()
def held_out_loss(directory: Path) -> float:
    """Mean cross-entropy of the model in `directory` over the whole held-out text, in nats per byte.

    The text is cut into consecutive windows of the model's length. Every byte except the first is predicted once, from
    the bytes before it in its window. A uniform guess has ln 256 = 5.55.

    Raises:
        OSError, KeyError, RuntimeError: see :func:`load_model`.
    """
    model, tokens = load_model(directory), _tokens(load_corpus().held_out)
    length = model.shape.max_position_embeddings
    whole = (len(tokens) - 1) // length * length
    with torch.inference_mode():
        batches = torch.split(tokens[: whole + 1].unfold(0, length + 1, length), 32)
        total = sum(model.loss(windows, reduction="sum").item() for windows in (*batches, tokens[None, whole:]))
    return total / (len(tokens) - 1)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _updates(
    model: Llama, text: bytes, steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Train `model` in place with a new AdamW; yield after each update what the Trainer would log."""
    length = model.shape.max_position_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 20))
    windows = random_windows(text, length, batch_size, generator)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model.loss(next(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        (rate,) = schedule.get_last_lr()
        optimizer.step()
        schedule.step()
        epoch = step * batch_size * length / len(text)
        yield {"epoch": epoch, "grad_norm": norm.item(), "learning_rate": rate, "loss": loss.item(), "step": step}


def _is_of_demo(path: Path) -> bool:
    """Whether `path` is a directory, not a link, with only the demo's files, and marked as the demo's if finished."""
    is_real = path.is_dir() and not path.is_symlink()
    if not is_real or not all(each.name in _FILES and each.is_file() for each in path.iterdir()):
        return False
    if path.name.startswith("."):
        return True
    try:
        return bool(json.loads((path / "trainer_state.json").read_bytes())["trial_name"] == _RUN_NAME)
    except (OSError, ValueError, LookupError, TypeError):
        return False
