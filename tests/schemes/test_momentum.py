"""The scaling rule of How to Scale Your EMA, against its table of scaled momenta."""

from __future__ import annotations

import numpy as np
import pytest

from ckavg.schemes import scaled_momentum

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
