"""PEMA: exponential moving average whose clock is the path length of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.errors import SettingError
from ckavg.schemes.base import Coefficients, Scheme, Timeline, require, require_finite


@dataclass(frozen=True, slots=True)
class PEMA(Scheme):
    """Pathwise EMA: forget by how far the weights moved, not by how many steps were taken.

    The one to try first: its power needs no tuning.

        β_k = (1 + T · ℓ_K · ℓ_k)^(−γ)        E ← (1 − β_k) E + β_k θ_k

    with T the span of the run in optimizer steps and ℓ the normalized path length. β at checkpoint k uses the path up
    to and including k, and adds θ_k. With `pairing="next"`, the literal text of the paper, θ_k goes with ℓ_{k−1}; then
    β_1 = 1 and θ_0 drops out. With `scope="tensor"` (Appendix C.6), each tensor has a β from its own path ℓ_p,
    β_{p,k} = (1 + T · ℓ_K² · ℓ_{p,k} / ℓ_{p,K})^(−γ), and the global one if it has no path.

    Attributes:
        gamma: power γ ≥ 0; 0 gives the last checkpoint, larger values average over more checkpoints.
        scope: `global` for one β, `tensor` for a β from each tensor's own path.
        pairing: `same` for the path ℓ up to the checkpoint that is added, `next` for ℓ up to the one before it.
        clock: T in optimizer `steps`, or in `updates`.

    References:
        Pathwise EMA, Eq. 3 and Algorithm 1.

    Examples:
        >>> PEMA(gamma=0.5).coefficients(Timeline((0, 3), (0.0, 1.0))).betas
        (None, 0.5)
    """

    name: ClassVar[str] = "pema"
    title: ClassVar[str] = "Pathwise EMA (PEMA)"
    reference: ClassVar[str] = "Pathwise EMA, Eq. 3 and Algorithm 1"
    needs_path: ClassVar[bool] = True
    label_fields: ClassVar[tuple[str, ...]] = ("gamma",)

    gamma: float = 0.15
    scope: Literal["global", "tensor"] = "global"
    pairing: Literal["same", "next"] = "same"
    clock: Literal["steps", "updates"] = "steps"

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.scope in ("global", "tensor"), f"pema: scope is {self.scope!r}; it must be global or tensor.")
        require(self.pairing in ("same", "next"), f"pema: pairing is {self.pairing!r}; it must be same or next.")
        require(self.clock in ("steps", "updates"), f"pema: clock is {self.clock!r}; it must be steps or updates.")
        require(self.gamma >= 0, f"pema: gamma is {self.gamma:g}; it must be 0 or more.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by path length."""
        path = timeline.path_length
        if path is None:
            raise SettingError("pema: the path length was not measured.")
        span = timeline.span if self.clock == "steps" else len(timeline.steps) - 1
        require(
            math.isfinite(span * path[-1] * path[-1]),
            f"pema: the path length is {path[-1]:g}; T · ℓ² is beyond float64.",
            hint="A tensor with almost no spread at the anchor makes most of it: leave it out with --path-exclude.",
        )
        own = timeline.tensor_path_length if self.scope == "tensor" else {}
        return Coefficients(
            "ema",
            0,
            self._betas(span * path[-1], path),
            tensor_betas={
                name: self._betas(span * path[-1] ** 2 / lengths[-1], lengths)
                for name, lengths in own.items()
                if lengths[-1] > 0
            },
        )

    def _betas(self, clock: float, path: tuple[float, ...]) -> tuple[float | None, ...]:
        paired = path[1:] if self.pairing == "same" else path[:-1]
        return (None, *((1.0 + clock * length) ** -self.gamma for length in paired))
