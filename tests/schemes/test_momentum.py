"""The scaling rule of How to Scale Your EMA, against its table of scaled momenta."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ckavg.errors import SettingError
from ckavg.schemes import MomentumEMA, Timeline, scaled_momentum

REFERENCES = ((256, 0.9999), (256, 0.999), (256, 0.99), (4096, 0.996), (4096, 0.992), (4096, 0.99), (4096, 0.97))
"""Batch size B and momentum ρ of each column."""

TABLE = {
    32: (0.99999, 0.99987, 0.99874, 0.99997, 0.99994, 0.99992, 0.99976),
    64: (0.99997, 0.99975, 0.99749, 0.99994, 0.99987, 0.99984, 0.99952),
    128: (0.99995, 0.9995, 0.99499, 0.99987, 0.99975, 0.99969, 0.99905),
    256: (0.9999, 0.999, 0.99, 0.99975, 0.9995, 0.99937, 0.9981),
    512: (0.9998, 0.998, 0.9801, 0.9995, 0.999, 0.99874, 0.9962),
    1024: (0.9996, 0.99601, 0.9606, 0.999, 0.99799, 0.99749, 0.99241),
    2048: (0.9992, 0.99203, 0.92274, 0.998, 0.99599, 0.99499, 0.98489),
    4096: (0.9984, 0.98412, 0.85146, 0.996, 0.992, 0.99, 0.97),
    8192: (0.9968, 0.96849, 0.72498, 0.99202, 0.98406, 0.9801, 0.9409),
    16384: (0.99362, 0.93798, 0.5256, 0.9841, 0.96838, 0.9606, 0.88529),
    32768: (0.98728, 0.8798, 0.27625, 0.96844, 0.93776, 0.92274, 0.78374),
    65536: (0.97472, 0.77405, 0.07632, 0.93788, 0.8794, 0.85146, 0.61425),
}
"""Momentum ρ̂ of every column by batch size B̂, as the paper prints it."""

CELLS = [
    (batch, *reference, printed)
    for batch, row in TABLE.items()
    for reference, printed in zip(REFERENCES, row, strict=True)
]


def test_the_table_is_whole() -> None:
    assert len(CELLS) == 84


@pytest.mark.parametrize(("batch", "reference_batch", "momentum", "printed"), CELLS)
def test_scaled_momentum_as_printed(batch: int, reference_batch: int, momentum: float, printed: float) -> None:
    """In float32, in which the table was made; three of its cells round differently in float64."""
    scaled = scaled_momentum(np.float32(momentum), np.float32(batch / reference_batch))  # type: ignore[arg-type]
    assert f"{scaled:.5f}" == f"{printed:.5f}"


def progressive(steps: tuple[int, ...], momentum: float, scale_after: dict[int, float]) -> list[float]:
    """β by the product over every optimizer step between two checkpoints (Algorithm 1 of the paper)."""
    betas = []
    for before, after in itertools.pairwise(steps):
        scales = [
            scale_after[max(each for each in scale_after if each < step)] for step in range(before + 1, after + 1)
        ]
        betas.append(1 - math.prod(momentum**scale for scale in scales))
    return betas


@pytest.mark.parametrize(
    ("text", "scale_after"),
    [
        ("1,1000:4", {-1: 1, 1000: 4}),
        ("2,30:1,31:0.5,700:3", {-1: 2, 30: 1, 31: 0.5, 700: 3}),
        ("1,5000:2", {-1: 1, 5000: 2}),
        ("1,20:8", {-1: 1, 20: 8}),
    ],
)
def test_a_batch_that_grows_along_the_run(text: str, scale_after: dict[int, float]) -> None:
    steps = (25, 50, 100, 700, 990, 1010, 2000)
    got = MomentumEMA(momentum=0.999, batch_scale=text).coefficients(Timeline(steps)).betas
    assert got[1:] == pytest.approx(progressive(steps, 0.999, scale_after), rel=0, abs=1e-12)
    per_update = MomentumEMA(momentum=0.9, momentum_per="update", batch_scale=text).coefficients(Timeline(steps)).betas
    scales = [scale_after[max(each for each in scale_after if each < step)] for step in steps[1:]]
    assert per_update[1:] == pytest.approx([1 - 0.9**scale for scale in scales])


def test_one_batch_scale_is_a_number() -> None:
    assert MomentumEMA(batch_scale="4") == MomentumEMA(batch_scale=4.0)
    assert MomentumEMA(momentum=0.9, batch_scale="1,1000:4").label == "ema-momentum0.9-batch-scale1-1000x4"


@pytest.mark.parametrize(
    "text", ["", "x", "1000:4", "1,4", "1,1000:", "1,1000:0", "1,20:2,10:3", "1,0:2", "1,5:inf", "1,5:nan"]
)
def test_batch_scales_that_are_none(text: str) -> None:
    with pytest.raises(SettingError, match="batch-scale"):
        MomentumEMA(batch_scale=text)
