"""Stage *replay*: from the accumulation dtype to the output dtype, rounded once."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from ckavg.errors import NonFiniteError
from ckavg.schemes import Coefficients

_MORE_ROOM = {
    "F16": "Choose an output dtype with more room: --dtype bfloat16 or --dtype float32.",
    "BF16": "Choose an output dtype with more room: --dtype float64.",
    "F32": "Choose an output dtype with more room: --dtype float64.",
    "F64": "No dtype has more room. Schemes without a correction stay within the checkpoints: pema, ema, mean.",
}
"""What to do where an average does not fit its dtype."""

_LARGEST = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def too_large(name: str, dtype: str) -> NonFiniteError:
    """The error where a value of an average does not fit its dtype, a safetensors code."""
    return NonFiniteError(
        f"tensor {name!r}: a value of the average does not fit {dtype} (largest "
        f"{torch.finfo(_LARGEST[dtype]).max:.4g}).",
        hint=_MORE_ROOM[dtype],
    )


def round_into(values: Tensor, out: Tensor) -> Tensor:
    """Round to nearest, ties to even, into the dtype of `out`.

    Args:
        values: (n,) float32 or float64.
        out: (n,) of any floating dtype; it is filled and returned.

    A conversion from float64 to a 16-bit dtype goes through float32 inside torch and would round twice. Rounding to
    odd on the way makes the second rounding right (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    if values.dtype == torch.float64 and out.element_size() == 2:
        values = _to_float32_odd(values)
    return out.copy_(values)


def _to_float32_odd(values: Tensor) -> Tensor:
    nearest = values.float()
    bits = nearest.view(torch.int32)
    back = nearest.double()
    truncated = torch.where(back.abs() > values.abs(), bits - 1, bits)  # the float32 next to it, towards zero
    inexact = (back != values) & torch.isfinite(nearest)
    return torch.where(inexact, truncated | 1, bits).view(torch.float32)


class NegativeZeros:
    """Elements of a tile that are −0 in all checkpoints: a difference added to −0 is 0, and they would not stay so."""

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._is_begun = False

    def take(self, theta: Tensor) -> None:
        """Take in the next checkpoint."""
        if self._is_begun and self._found is None:
            return
        bits = theta.view(torch.int64 if theta.dtype == torch.float64 else torch.int32)
        least = torch.iinfo(bits.dtype).min
        if self._found is not None:
            self._found &= bits == least
        elif theta.device.type != "cpu" or int(bits.amin()) == least:  # a look at a GPU would wait for it
            self._found = bits == least
        self._is_begun = True

    def kept_in(self, result: Tensor) -> Tensor:
        """A tile of an average of those checkpoints, with those elements put right."""
        return result if self._found is None else result.masked_fill_(self._found, -0.0)


class State(abc.ABC):
    """What a rule carries from checkpoint to checkpoint, for `size` elements.

    Args:
        coefficients: β and α of every checkpoint.
        scratch: (size,) memory to compute in, of the accumulation dtype, float32 or float64, and the device of the
            arithmetic. States that are used in turn may share it: it carries nothing from call to call, and an output
            is good only until the next.
    """

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        self.coefficients = coefficients
        self._betas = coefficients.betas
        self._uncorrected = frozenset(coefficients.uncorrected)
        self._corrects = True
        self._scratch = scratch

    def set_tensor(self, name: str) -> None:
        """Say of which tensor the next tiles are: some schemes have a β for each, and some tensors no correction."""
        self._betas = self.coefficients.tensor_betas.get(name, self.coefficients.betas)
        self._corrects = name not in self._uncorrected

    def take(self, index: int, theta: Tensor) -> None:
        """Take in checkpoint `index`; they come in order. `theta` is (n,) and stays as it is."""
        if index == self.coefficients.start:
            self._begin(theta)
        elif index > self.coefficients.start:
            self._update(index, theta)

    @abc.abstractmethod
    def output(self, index: int, theta: Tensor) -> Tensor:
        """(n,) the average after checkpoint `index`, whose weights `theta` were the last to be taken in."""

    @abc.abstractmethod
    def _begin(self, theta: Tensor) -> None: ...

    @abc.abstractmethod
    def _update(self, index: int, theta: Tensor) -> None: ...

    def _buffer(self) -> Tensor:
        return torch.empty_like(self._scratch)

    def _beta(self, index: int) -> float:
        beta = self._betas[index]
        return 1.0 if beta is None else beta

    def _alpha(self, index: int) -> float:
        alphas = self.coefficients.alphas
        alpha = alphas[index] if alphas is not None else None
        return 0.0 if alpha is None else alpha


class EmaState(State):
    """E ← (1 − β_k) E + β_k θ_k; output E (Pathwise EMA, Eq. 1 and Algorithm 1 phase 2)."""

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        super().__init__(coefficients, scratch)
        self._average = self._buffer()

    def output(self, index: int, theta: Tensor) -> Tensor:
        """(n,) E."""
        return self._average[: theta.numel()]

    def _begin(self, theta: Tensor) -> None:
        self._average[: theta.numel()].copy_(theta)

    def _update(self, index: int, theta: Tensor) -> None:
        _step(self._average[: theta.numel()], theta, self._beta(index))


class BemaState(EmaState):
    """E ← (1 − β_k) E + β_k θ_k, then output E + α_k (θ_k − θ_0) (EMA Without the Lag, Algorithm 1)."""

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        super().__init__(coefficients, scratch)
        self._anchor = self._buffer()

    def output(self, index: int, theta: Tensor) -> Tensor:
        """(n,) E + α_k (θ_k − θ_0)."""
        if not self._corrects:
            return super().output(index, theta)
        size = theta.numel()
        correction = torch.sub(theta, self._anchor[:size], out=self._scratch[:size]).mul_(self._alpha(index))
        return correction.add_(self._average[:size])

    def _begin(self, theta: Tensor) -> None:
        super()._begin(theta)
        self._anchor[: theta.numel()].copy_(theta)


class OuemaState(EmaState):
    """θ̃_k = (θ_k − α_k θ_0) / (1 − α_k), then E ← (1 − β_k) E + β_k θ̃_k; output E (EMA Without the Lag, Eq. 13).

    θ̃_k is formed as θ_0 + (θ_k − θ_0) / (1 − α_k): the same, and exact where nothing moved.
    """

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        super().__init__(coefficients, scratch)
        self._anchor = self._buffer()
        self._corrected = self._buffer()

    def _begin(self, theta: Tensor) -> None:
        super()._begin(theta)
        self._anchor[: theta.numel()].copy_(theta)

    def _update(self, index: int, theta: Tensor) -> None:
        if not self._corrects:
            return super()._update(index, theta)
        size = theta.numel()
        anchor = self._anchor[:size]
        corrected = (
            torch.sub(theta, anchor, out=self._corrected[:size]).div_(self.coefficients.complement(index)).add_(anchor)
        )
        return super()._update(index, corrected)


class DemaState(EmaState):
    """e_1 ← (1 − β_k) e_1 + β_k θ_k, e_2 likewise from the new e_1; output 2 e_1 − e_2 (the same, Eq. 14–16).

    The output is formed as e_1 + (e_1 − e_2): the same, and exact where nothing moved.
    """

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        super().__init__(coefficients, scratch)
        self._second = self._buffer()

    def output(self, index: int, theta: Tensor) -> Tensor:
        """(n,) 2 e_1 − e_2."""
        if not self._corrects:
            return super().output(index, theta)
        size = theta.numel()
        first = self._average[:size]
        return torch.sub(first, self._second[:size], out=self._scratch[:size]).add_(first)

    def _begin(self, theta: Tensor) -> None:
        super()._begin(theta)
        self._second[: theta.numel()].copy_(theta)

    def _update(self, index: int, theta: Tensor) -> None:
        size = theta.numel()
        super()._update(index, theta)
        _step(self._second[:size], self._average[:size], self._beta(index))


class SumState(EmaState):
    """E ← E + w_k (θ_k − θ_0); output E. Any weights that sum to 1 in all; exact where nothing moved."""

    def __init__(self, coefficients: Coefficients, scratch: Tensor) -> None:
        super().__init__(coefficients, scratch)
        self._anchor = self._buffer()

    def _begin(self, theta: Tensor) -> None:
        super()._begin(theta)
        self._anchor[: theta.numel()].copy_(theta)

    def _update(self, index: int, theta: Tensor) -> None:
        size = theta.numel()
        difference = torch.sub(theta, self._anchor[:size], out=self._scratch[:size])
        self._average[:size].add_(difference.mul_(self._beta(index)))


RULES: dict[str, type[State]] = {
    "ema": EmaState,
    "bema": BemaState,
    "ouema": OuemaState,
    "dema": DemaState,
    "sum": SumState,
}
"""The update rules by the name under which schemes ask for them."""


def _step(average: Tensor, theta: Tensor, beta: float) -> None:
    """E ← E + β (θ − E), in place. β = 1 replaces E by θ to the bit."""
    if beta == 1.0:
        average.copy_(theta)
    else:
        average.lerp_(theta, beta)


def effective_weights(coefficients: Coefficients, index: int | None = None) -> tuple[float, ...]:
    """Weight of each checkpoint in the average, in float64; they sum to 1 and may be negative.

    Args:
        coefficients: β and α of every checkpoint.
        index: of the average as it stands after this checkpoint; None: after the last.

    >>> from ckavg.schemes import EMA, Timeline
    >>> effective_weights(EMA(gamma=1.0).coefficients(Timeline((0, 1, 2, 3))))
    (0.25, 0.25, 0.25, 0.25)
    """
    visited = len(coefficients.betas)
    one_hot = torch.zeros(visited, dtype=torch.float64)
    state = RULES[coefficients.rule](coefficients, torch.empty_like(one_hot))
    end = visited - 1 if index is None else index
    for place in range(end + 1):
        one_hot.zero_()[place] = 1.0
        state.take(place, one_hot)
    return tuple(state.output(end, one_hot).tolist())
