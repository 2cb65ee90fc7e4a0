"""The checks of `tests.gpu.checks`: on a GPU where there is one, and always on the CPU, to know that they are sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.exhaustive import all_but
from tests.gpu.checks import CHECKS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path, "cuda")


ALIKE = [f"{check}-{dtype}" for check in ("averages", "path", "tiles") for dtype in ("float16", "float32")] + [
    "tiles-float64"
]


@pytest.mark.parametrize("name", all_but(CHECKS.keys() - ALIKE, CHECKS))
def test_on_the_cpu(name: str, tmp_path: Path) -> None:
    CHECKS[name](tmp_path, "cpu")
