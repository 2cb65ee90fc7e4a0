"""Averages without a result on disk: the effective weights of the checkpoints, and the averaged tensors in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckavg.averaging.pipeline import in_memory, path_length
from ckavg.averaging.plan import Options, plan_in_memory
from ckavg.averaging.prepare import coefficients_with
from ckavg.averaging.sources import opened
from ckavg.checkpoints.run import Run
from ckavg.engine.context import Context, OnProgress, listening
from ckavg.errors import SettingError
from ckavg.schemes import Scheme
from ckavg.storage.base import AnyPath

if TYPE_CHECKING:
    from torch import Tensor


def effective_weights(
    run: Run | AnyPath | str, scheme: Scheme, *, progress: bool | OnProgress = False, **options: Any
) -> dict[int, float]:
    """The weight of every checkpoint in an average, by optimizer step; they sum to 1 and may be negative.

    Nothing is averaged or written, except that a scheme may need the path length, which is measured and cached.

    Args:
        run, scheme, progress: see `average`.
        options: `path_exclude`, `zero_sigma`, `sample`, `allow_nonfinite` and `device`; see `path_length`.

    Raises:
        CkavgError: see `path_length`.
    """
    from ckavg.averaging.rules import effective_weights as weights_of

    run = opened(run)
    plan = plan_in_memory(run, scheme, Options(allow_anchor=True))
    path = path_length(run, progress=progress, **options) if scheme.needs_path else None
    return dict(zip(run.steps, weights_of(coefficients_with(plan, path)), strict=True))


def average_tensors(
    run: Run | AnyPath | str,
    scheme: Scheme,
    *,
    device: str = "auto",
    progress: bool | OnProgress = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Average the checkpoints of a run in memory: the tensors that `average` would write, to the byte.

    Takes the memory of one model. Nothing is written, except the path length to its cache.

    Args:
        run, scheme, device, progress: see `average`.
        options: `dtype`, `accumulate`, `path_exclude`, `zero_sigma`, `sample`, `allow_nonfinite` and `allow_anchor`;
            see `average`.

    Returns:
        A state dict: tensors in CPU memory by their names in the checkpoints; those of a pipeline component begin with
        its name, such as `unet/`.

    Raises:
        SettingError: an option does not apply to averages in memory.
        CkavgError: see `average`.
    """
    for name in ("snapshot_every", "card", "plot", "force", "lora", "rank"):
        if options.get(name):
            raise SettingError(f"{name} applies only to averages on disk.", hint="Leave it out, or call average.")
    plan = plan_in_memory(opened(run), scheme, Options(**options))
    tensors = _Tensors.empty(
        {name: (each.dtype, each.shape) for name, each in plan.run.tensors.items()}, plan.weights.dtypes
    )
    with listening(progress, 1 + bool(plan.path_bytes)) as on_progress:
        in_memory(plan, tensors, Context(device=device, on_progress=on_progress))
    return dict(tensors.values)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """A `TensorWriter` that fills tensors in memory.

    Attributes:
        values: the tensors by name.
        stored: (n,) uint8, their bytes.
    """

    values: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]

    @classmethod
    def empty(cls, declared: Mapping[str, tuple[str, tuple[int, ...]]], dtypes: Mapping[str, str]) -> _Tensors:
        """Uninitialized tensors of the declared dtypes and shapes; `dtypes` replaces those of floating tensors."""
        import torch

        from ckavg.engine.tiles import torch_dtype

        stored, values = {}, {}
        for name, (code, shape) in declared.items():
            dtype = torch_dtype(dtypes.get(name, code))
            stored[name] = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
            values[name] = stored[name].view(dtype).view(shape)
        return cls(values, stored)

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Take the bytes of a tensor from byte `offset` on."""
        self.stored[name][offset : offset + values.numel()].copy_(values)
