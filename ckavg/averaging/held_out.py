"""The held-out loss of a causal language model on a text. transformers is optional and imported only when needed."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.checkpoints.configs import ADAPTER_CONFIG
from ckavg.errors import EvaluationError, ReadError, SettingError, listed
from ckavg.output.side_files import CONFIG
from ckavg.storage.local import read_small

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_LENGTH = 1024
"""Tokens of a window, if the model takes that many: most small models were trained with it."""

_MOST_BYTES = 1 << 30
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
"""Every tokenizer has one of these files."""


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """How well a model predicts a text.

    Attributes:
        loss: mean negative log-likelihood in nats per token.
        stderr: its standard error, from the spread between windows; None for a single window.
        tokens: number of predicted tokens.
    """

    loss: float
    stderr: float | None
    tokens: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


def held_out_loss(directory: Path, text: Path, length: int | None = None) -> HeldOutLoss:
    """Mean negative log-likelihood of a text under a causal language model, in float32 on the CPU, without a network.

    The tokens are cut into windows of `length`. Each token is predicted from those before it in its window and the last
    one before the window. The text begins with the tokenizer's BOS token, or else its EOS token; without either, the
    first token is not predicted. With n_w tokens and the mean loss m_w in each of W windows, N = Σ n_w,

        loss = Σ n_w m_w / N,    stderr = √(W / (W − 1) · Σ (n_w (m_w − loss))²) / N.

    Args:
        directory: of the model or adapter, with its tokenizer.
        text: a file in UTF-8.
        length: tokens of a window; None: 1024, or the model's maximum if that is less.

    Raises:
        SettingError: transformers is not installed, or peft for an adapter, or `length` does not fit the model.
        EvaluationError: the directory holds no model or no tokenizer that loads, or the loss is not finite.
        ReadError: the text cannot be read, or is empty.
    """
    import torch

    words = _read_text(text)
    _check_directory(directory)
    with _quiet():
        tokenizer = _load_tokenizer(directory)
        model = _load_model(directory)
    length = _checked_length(length, model.config.get_text_config())
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    begin = next((each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None), None)
    ids = torch.tensor(ids if begin is None else [begin, *ids])
    if len(ids) < 2:
        raise ReadError(f"{text} holds no token to predict.", hint="Name a text that was not trained on.")
    model.eval()
    with torch.inference_mode():
        losses = [_window_loss(model, ids[place : place + length + 1]) for place in range(0, len(ids) - 1, length)]
    return _summary(losses, [min(length, len(ids) - 1 - place) for place in range(0, len(ids) - 1, length)], directory)


def _window_loss(model: Any, ids: Tensor) -> float:
    """The loss of all tokens but the first, summed in float64."""
    import torch

    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    each = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
    return float(each.double().sum())


def _summary(losses: Sequence[float], counts: Sequence[int], directory: Path) -> HeldOutLoss:
    windows, tokens = len(counts), sum(counts)
    loss = math.fsum(losses) / tokens
    if not math.isfinite(loss):
        raise EvaluationError(f"The loss of {directory} is {loss}.", hint="Check its weights: ckavg verify DIR")
    squares = math.fsum((each - count * loss) ** 2 for each, count in zip(losses, counts, strict=True))
    stderr = math.sqrt(windows / (windows - 1) * squares) / tokens if windows > 1 else None
    return HeldOutLoss(loss, stderr, tokens)


# --- loading ---


def _read_text(file: Path) -> str:
    try:
        return read_small(file, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ReadError(f"{file} is not UTF-8: byte {error.start}.", hint="Name a plain text file.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{file} cannot be read: {reason}.", hint="Name a plain text file with --text.") from error


def _check_directory(directory: Path) -> None:
    """Refuse a directory that cannot load, or that needs a missing library, before importing one."""
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (directory / CONFIG).is_file():
        raise EvaluationError(
            f"{directory} is not a complete model: it holds no {CONFIG}.",
            hint="Name a directory with weights, config and tokenizer: a result, or a checkpoint.",
        )
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise EvaluationError(
            f"{directory} holds no tokenizer.", hint="Copy the tokenizer of the base model into it: tokenizer.json."
        )
    for library in ("transformers", "peft") if is_adapter else ("transformers",):
        try:
            with _quiet():
                __import__(library)
        except ImportError as error:
            what = "The held-out loss of an adapter" if library == "peft" else "The held-out loss of a model"
            raise SettingError(
                f"{what} needs {library}, which is not installed.", hint=f"Install it: pip install {library}"
            ) from error


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library may raise anything for a file it cannot parse
        raise EvaluationError(
            f"The tokenizer in {directory} does not load: {_first_line(error)}.",
            hint="Copy the tokenizer of the base model into the directory.",
        ) from error


def _load_model(directory: Path) -> Any:
    """Load a model in float32; every weight must come from its files."""
    import torch

    more = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32, "use_safetensors": True}
    try:
        if (directory / ADAPTER_CONFIG).is_file():
            from peft import AutoPeftModelForCausalLM

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message=".*missing adapter keys.*")
                return AutoPeftModelForCausalLM.from_pretrained(directory, **more)
        from transformers import AutoModelForCausalLM

        model, loaded = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **more)
    except Exception as error:  # the library may raise anything for files it cannot parse
        raise EvaluationError(
            f"{directory} does not load as a causal language model: {_first_line(error)}.",
            hint="Everything it needs, also the base model of an adapter, must be on this machine.",
        ) from error
    wrong = sorted({*loaded["missing_keys"], *(str(each[0]) for each in loaded["mismatched_keys"])})
    if wrong:
        raise EvaluationError(
            f"{directory} lacks weights of the model that its config describes: {listed(wrong)}.",
            hint="transformers would fill them with random numbers. Check config.json and the weight files.",
        )
    return model


def _checked_length(length: int | None, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None)
    if length is None:
        return min(DEFAULT_LENGTH, most) if isinstance(most, int) else DEFAULT_LENGTH
    if length < 1 or (isinstance(most, int) and length > most):
        raise SettingError(
            f"length is {length}; it must be at least 1 and at most {most or 'what the model takes'}.",
            hint="A window cannot be longer than the model's maximum.",
        )
    return length


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs and progress bars of transformers."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as bars

        bars.disable_progress_bar()
    except ImportError:
        pass
    try:
        yield
    finally:
        logger.setLevel(level)
