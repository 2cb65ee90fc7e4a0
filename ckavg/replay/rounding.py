"""Stage *replay*: from the accumulation dtype to the output dtype, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


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
