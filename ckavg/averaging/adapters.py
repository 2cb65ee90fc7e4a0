"""Planning averages of low-rank adapters by their products: pairs, ranks, and the files that state them.

Σ_k w_k s·B_k A_k is again one product: all B_k side by side, times all A_k stacked. Its rank K·r, or the rank it is
truncated to, goes into shapes, configs and headers. Reads no weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ckavg.checkpoints.adapters import (
    Pair,
    Ranks,
    changes_base,
    config_file,
    configs_of,
    find_pairs,
    hold_factors,
    names_of_pairs,
    no_adapter,
    with_config,
    with_ranks,
)
from ckavg.checkpoints.configs import read_facts
from ckavg.checkpoints.run import Run
from ckavg.errors import MismatchError, SettingError
from ckavg.output.side_files import name_of_weights, read_config
from ckavg.output.weight_files import WeightPlan, plan_weights


@dataclass(frozen=True, slots=True)
class Products:
    """The products that are averaged.

    Attributes:
        pairs: their factors.
        rank: R, the rank to truncate every average to; None: do not truncate.
    """

    pairs: tuple[Pair, ...]
    rank: int | None

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are averaged as products, not one by one."""
        return frozenset(name for pair in self.pairs for name in pair.names)

    def ranks(self, terms: Mapping[str, int]) -> Ranks:
        """The rank of each averaged product by the name of A, from how many products it sums."""
        return {pair.a: pair.new_rank(terms[pair.a], self.rank) for pair in self.pairs}


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one output: the weights, and the side files by relative path."""

    weights: WeightPlan
    side_files: dict[str, bytes]


def check_rank(lora: str | None, rank: int | None) -> None:
    """Refuse a rank below 1, or a rank without `lora="product"`, with a `SettingError`."""
    if rank is not None and (lora != "product" or rank < 1):
        wrong = f"rank is {rank}; it must be 1 or more." if rank < 1 else f"rank is {rank}, but lora is not product."
        raise SettingError(wrong, hint="For example: --lora product --rank 16")


def find_products(run: Run, lora: str | None, rank: int | None) -> Products | None:
    """The products to average with `lora="product"`; None for averages tensor by tensor.

    Raises:
        UnsupportedFormatError: the run holds no adapter, or one that is not a product of two factors.
        MismatchError: two checkpoints scale a product by different s.
    """
    if lora is None:
        return None
    if lora == "factors":
        check_holds_adapter(run)
        return None
    if run.last.kind not in ("adapter", "file"):
        raise no_adapter(run.last)
    pairs = find_pairs(run.last, read_facts(run.last))
    for checkpoint in run.checkpoints[:-1]:
        others = {pair.a: pair for pair in find_pairs(checkpoint, read_facts(checkpoint))}
        for pair in pairs:
            there = others[pair.a].scaling
            if there != pair.scaling:
                raise different_scaling(pair, checkpoint.step, there, run.last.step, pair.scaling)
    return Products(pairs, rank)


def check_holds_adapter(run: Run) -> None:
    """Refuse a run in which no tensor is named like a low-rank factor."""
    if not (names_of_pairs(run.last) or hold_factors(run.tensors)):
        raise no_adapter(run.last)


def different_scaling(pair: Pair, step: int, there: float | None, last: int, here: float | None) -> MismatchError:
    """The error for products scaled by different s."""
    return MismatchError(
        f"{pair.module}: the product BA is scaled by {there} at step {step}, but by {here} at step {last}.",
        hint="An adapter has one scaling. Choose checkpoints with the same one, with --from-step, --to-step or "
        "--skip-step; or merge each adapter into its base model and average those.",
    )


def lay_out(
    run: Run, products: Products, side_files: Mapping[str, bytes], dtype: str, terms: Mapping[str, int]
) -> Layout:
    """The files of an average that sums `terms` products of each pair; `terms` is by the name of A.

    Raises:
        SettingError: the adapters change the base model by their rank, and the average has another rank.
    """
    ranks = products.ranks(terms)
    weights = plan_weights(with_ranks(run.last, products.pairs, ranks), dtype, file_name=name_of_weights(run))
    files = dict(side_files)
    for prefix in configs_of(run.last, read_facts(run.last)):
        name = config_file(prefix)
        if name not in files:
            continue
        config = read_config(files, name)
        init = changes_base(config)
        changed = next((pair for pair in products.pairs if ranks[pair.a] != pair.rank), None)
        if init and changed is not None:
            raise SettingError(
                f"lora product: these adapters were initialized with {init}: PEFT then removes a part of rank "
                f"{changed.rank} from the base model, and at rank {ranks[changed.a]} it would remove another part.",
                hint=f"Keep the rank with --rank {changed.rank}, or convert the adapters as PEFT documents.",
            )
        new = with_config(config, prefix, products.pairs, ranks)
        files[name] = json.dumps(new, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return Layout(weights, files)
