"""Pass 1 with a compiled kernel: a difference of two tiles, widened and summed in one walk over the memory.

Optional (extra `fast`). The plain path takes four walks, each of which gives up and takes back the interpreter's lock;
this one takes a walk, so that more threads can be at it. Differences are formed in float32, 16 of them are summed in
float32 where they come from bfloat16, and everything else in float64; only the order of the 16 may differ from the
plain path.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ckavg.engine.blocks import CHUNK

DTYPES = frozenset({torch.bfloat16, torch.float32})
"""What the kernel reads, as it is stored."""

_LANES = 1024
_ROWS = CHUNK // _LANES

Distances = Callable[[Tensor, Tensor, Tensor], None]


@cache
def load_kernel() -> Distances | None:
    """The kernel; None where numba is not installed, or does not work here.

    It takes two tiles (n,) of one of `DTYPES`, n a whole number of chunks, and fills (n / CHUNK,) float64 with the sum
    of |after − before| of each chunk. It holds no lock while it runs.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        add_bfloat16, add_float32 = _compiled()
    except Exception:  # an optional speed-up must never be in the way, whatever is wrong with it
        return None

    def distances(before: Tensor, after: Tensor, out: Tensor) -> None:
        if before.dtype == torch.bfloat16:  # which numpy does not know
            add_bfloat16(before.view(torch.uint16).numpy(), after.view(torch.uint16).numpy(), out.numpy())
        else:
            add_float32(before.numpy(), after.numpy(), out.numpy())

    return distances


def _compiled() -> tuple[Any, Any]:
    import numba
    import numpy as np

    def add_bfloat16(before, after, out):  # type: ignore[no-untyped-def]
        lanes = np.empty(_LANES, np.float32)
        old_bits, new_bits = np.empty(_LANES, np.uint32), np.empty(_LANES, np.uint32)
        old, new = old_bits.view(np.float32), new_bits.view(np.float32)
        for chunk in range(out.shape[0]):
            lanes[:] = 0
            for row in range(_ROWS):
                start = chunk * CHUNK + row * _LANES
                stored_old, stored_new = before[start : start + _LANES], after[start : start + _LANES]
                for lane in range(_LANES):
                    old_bits[lane] = np.uint32(stored_old[lane]) << np.uint32(16)
                for lane in range(_LANES):
                    new_bits[lane] = np.uint32(stored_new[lane]) << np.uint32(16)
                for lane in range(_LANES):
                    lanes[lane] += abs(new[lane] - old[lane])
            total = 0.0
            for lane in range(_LANES):
                total += lanes[lane]
            out[chunk] = total

    def add_float32(before, after, out):  # type: ignore[no-untyped-def]
        lanes = np.empty(_LANES, np.float64)
        for chunk in range(out.shape[0]):
            lanes[:] = 0
            for row in range(_ROWS):
                start = chunk * CHUNK + row * _LANES
                old, new = before[start : start + _LANES], after[start : start + _LANES]
                for lane in range(_LANES):
                    lanes[lane] += abs(new[lane] - old[lane])
            total = 0.0
            for lane in range(_LANES):
                total += lanes[lane]
            out[chunk] = total

    def compiled(function: Any, signature: str) -> Any:
        try:
            return numba.njit(signature, cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError:  # no place to keep what was compiled
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return (
        compiled(add_bfloat16, "void(uint16[::1], uint16[::1], float64[::1])"),
        compiled(add_float32, "void(float32[::1], float32[::1], float64[::1])"),
    )
