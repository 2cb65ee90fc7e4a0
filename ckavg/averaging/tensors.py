"""What can be had of an average without a result on the disk: the weights of its checkpoints, and its own tensors."""

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

    Nothing is averaged or written, but for the path length, which is measured where the scheme needs it, and kept.

    Args:
        run, scheme, progress: as of `average`.
        options: `path_exclude`, `zero_sigma`, `sample`, `allow_nonfinite` and `device`, as of `path_length`.

    Raises:
        CkavgError: as of `path_length`.
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

    Takes the memory of one model. Nothing is written, but for the path length, which is kept.

    Args:
        run, scheme, device, progress: as of `average`.
        options: `dtype`, `accumulate`, `path_exclude`, `zero_sigma`, `sample`, `allow_nonfinite` and `allow_anchor`, as
            of `average`.

    Returns:
        A state dict: tensors in CPU memory by the names in the checkpoints; those of a component of a pipeline begin
        with its name, as in `unet/`.

    Raises:
        SettingError: an option that is not for averages in memory.
        CkavgError: as of `average`.
    """
    for name in ("snapshot_every", "card", "force", "lora", "rank"):
        if options.get(name):
            raise SettingError(f"{name} is for averages that are written.", hint="Leave it out, or call average.")
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
        stored: (n,) uint8, the bytes of each.
    """

    values: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]

    @classmethod
    def empty(cls, declared: Mapping[str, tuple[str, tuple[int, ...]]], dtypes: Mapping[str, str]) -> _Tensors:
        """Those of some dtypes and shapes, by name; floating ones of `dtypes`."""
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
