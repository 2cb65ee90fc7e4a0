"""Stage *discover*: which tensors are running statistics rather than weights. Told by their names alone. Pure.

A variance that a correction takes below zero makes every output NaN. So running statistics take the average without it,
and count in no path length. What is taken for one by mistake is averaged all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ckavg.checkpoints.run import TensorInfo

_ALONE = re.compile(
    r"_*(running|moving|ema)_\w+|_*(cluster_size|num_batches_tracked)|(?!.*log)(\w*_)?(var|variance|std|stddev|sq)"
)
"""Components of names that say it by themselves: a kind of average, or what cannot be negative but by its logarithm."""

_BESIDE = re.compile(r"(\w*_)?(mean|avg|sum|count|min|max|embed|embedding|codebook)")
"""Those that do where the same module holds one of the others: a mean beside its variance, a codebook and its sizes."""


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """The running statistics among the tensors of a model: of normalization layers, normalizers, codebooks.

    >>> sorted(running_statistics(["bn.weight", "bn.running_mean", "obs.mean", "obs.var", "vae.mean", "pi.log_std"]))
    ['bn.running_mean', 'obs.mean', 'obs.var']
    """
    cuts = {name: max(name.rfind("."), name.rfind("/")) + 1 for name in names}
    words = {name[cut:] for name, cut in cuts.items()}  # few, however many tensors there are
    alone, beside = ({word for word in words if kind.fullmatch(word)} for kind in (_ALONE, _BESIDE))
    modules = {name[:cut] for name, cut in cuts.items() if name[cut:] in alone}
    return frozenset(
        name for name, cut in cuts.items() if name[cut:] in alone or (name[cut:] in beside and name[:cut] in modules)
    )


def averaged_statistics(entries: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Those among the tensors of a checkpoint that are averaged rather than copied."""
    return frozenset(name for name in running_statistics(entries) if entries[name].is_floating)
