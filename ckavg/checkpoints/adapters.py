"""Low-rank adapters: which tensors are the factors of a product BA, its scaling, and what another rank changes.

An adapter adds s·BA to a weight. PEFT and diffusers have α and r in a config, with s = α/r or, with `use_rslora`, α/√r;
kohya's sd-scripts have a tensor α beside the factors. Uses names, shapes and configs; reads no weight.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.configs import ADAPTER_CONFIG, Facts
from ckavg.checkpoints.run import Checkpoint, Shard
from ckavg.errors import UnsupportedFormatError
from ckavg.storage.local import parse_json

DIFFUSERS_CONFIG = "lora_adapter_metadata"
"""The header entry with diffusers' configs of adapters; its keys begin with the name of a component."""

_PEFT, _PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<peft>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|"
    r"lora[_.](?P<kohya>down|up)\.weight)|(?P<processor>.+_lora)\.(?P<diffusers>down|up)\.weight"
)
"""The names of factors in PEFT, sd-scripts and diffusers; `down` is A."""

_FACTOR_PREFIXES = ("lora_", "hada_", "lokr_", "vera_lambda_")
"""Prefixes, in parts of tensor names, of factors of a product: LoRA, LoHa, LoKr, VeRA."""

_OTHER = re.compile(
    r"(?:.*\.)?(?:lora_(?:mid|E|diag|magnitude\w*|[ab])|dora_scale|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+)"
    r"(?:\..*)?"
)
"""Tensors beside or instead of factors which mean that the change of a weight is not s·BA."""

_OTHER_METHODS = (
    "use_dora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "target_parameters",
)  # fmt: skip
"""Settings of PEFT that make it another product, or name the factors differently."""

_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""Repeated groups in a pattern: a config is not trusted, and they may make a search take forever."""

_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model unchanged; others remove a part of the adapter's rank."""

_MERGE = (
    "Leave out --lora product to average tensor by tensor, or merge each adapter into its base model and average those."
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one product: A (r, …) and B (…, r). In convolutions A has more axes, and B more axes of size 1.

    Attributes:
        a, b: the names of the tensors.
        module: the adapted module, as its config names it.
        config: the prefix of tensor names that its config is for; see `configs_of`.
        rank: r.
        scaling: s; None if the tensor `alpha` holds α = s·r.
        alpha: the name of that tensor; empty without one.
        numel: elements of A, of B.
        most: the largest rank that a product of this shape can have.
    """

    a: str
    b: str
    module: str
    config: str
    rank: int
    scaling: float | None
    alpha: str
    numel: tuple[int, int]
    most: int

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors."""
        return (self.a, self.b, self.alpha) if self.alpha else (self.a, self.b)

    def new_rank(self, terms: int, rank: int | None) -> int:
        """The rank of a sum of `terms` such products: all their columns, or truncated to `rank` if that is less."""
        stacked = terms * self.rank
        return stacked if rank is None or stacked <= rank else min(rank, self.most)


def find_pairs(checkpoint: Checkpoint, facts: Facts) -> tuple[Pair, ...]:
    """The pairs of an adapter, by the name of A.

    Args:
        checkpoint: any checkpoint of the run.
        facts: its configs.

    Raises:
        UnsupportedFormatError: it holds no adapter, or one whose product is not BA or whose scaling is unknown.
    """
    factors: dict[tuple[str, str], dict[str, str]] = {}
    for name in sorted(checkpoint.entries):
        if found := _FACTOR.fullmatch(name):
            half = next(each for key in ("peft", "embedding", "kohya", "diffusers") if (each := found[key]))
            kind = "embedding" if found["embedding"] else ""
            key = found["module"] or found["processor"], kind
            factors.setdefault(key, {})["A" if half in ("A", "down") else "B"] = name
        elif _OTHER.fullmatch(name):
            raise _unsupported(checkpoint, f"because of tensor {name!r} it is not a product of two factors")
    if not factors:
        raise no_adapter(checkpoint)
    configs = configs_of(checkpoint, facts)
    return tuple(_pair(checkpoint, module, names, configs) for (module, _), names in factors.items())


def no_adapter(checkpoint: Checkpoint) -> UnsupportedFormatError:
    """The error if there is no adapter to average."""
    return UnsupportedFormatError(
        f"{checkpoint.path} holds no low-rank adapter: no file with lora_A and lora_B, or lora_down and lora_up.",
        hint="Leave out --lora: it is for adapters saved by PEFT, diffusers or sd-scripts.",
    )


def hold_factors(names: Iterable[str], prefixes: tuple[str, ...] = _FACTOR_PREFIXES) -> bool:
    """Whether tensors are named like the factors of low-rank adapters."""
    text = ".".join(["", *names])  # one search for each prefix, however many tensors there are
    return any(f".{prefix}" in text for prefix in prefixes)


def names_of_pairs(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of an adapter that belong to its products, judged by name only."""
    factors = {name: found for name in checkpoint.entries if (found := _FACTOR.fullmatch(name))}
    alphas = {f"{found['module'] or found['processor']}.alpha" for found in factors.values()}
    return frozenset(factors) | (alphas & checkpoint.entries.keys())


def configs_of(checkpoint: Checkpoint, facts: Facts) -> dict[str, Mapping[str, Any]]:
    """The configs of adapters by the prefix of their tensors' names: `base_model.model.`, or `unet.`.

    Raises:
        UnsupportedFormatError: the change of a weight is not s·BA, or the config is missing.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for shard in checkpoint.shards:
        folder = shard.path.parent.relative_to(checkpoint.directory).as_posix()
        config = facts.adapters.get("" if folder == "." else folder, {}) if checkpoint.kind == "adapter" else {}
        if config and shard.saved_as == _PEFT:
            own = [name for name in checkpoint.entries if name.startswith(f"{shard.part}{_PEFT_PREFIX}")]
            configs[f"{shard.part}{_PEFT_PREFIX}" if own else shard.part] = config
        elif shard.saved_as == _PEFT or any(
            name.startswith(f"{shard.part}{_PEFT_PREFIX}") for name in checkpoint.entries
        ):
            raise UnsupportedFormatError(
                f"{shard.path} has no {ADAPTER_CONFIG} beside it, so the scaling of its products is unknown.",
                hint=f"Put the {ADAPTER_CONFIG} of the run into each checkpoint.",
            )
        configs |= {f"{shard.part}{name}.": each for name, each in _in_header(shard).items()}
    for config in configs.values():
        kind = str(config.get("peft_type", "LORA"))
        other = kind if kind != "LORA" else next((key for key in _OTHER_METHODS if config.get(key)), "")
        if other:
            raise _unsupported(checkpoint, f"its config states {other}, which is not a product of two factors")
    return configs


def _unsupported(checkpoint: Checkpoint, why: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"{checkpoint.path} cannot be averaged as products: {why}.", hint=_MERGE)


def _in_header(shard: Shard) -> dict[str, dict[str, Any]]:
    """The configs in the header of a diffusers file, by component."""
    configs: dict[str, dict[str, Any]] = {}
    with suppress(ValueError, RecursionError):
        stated = parse_json(shard.metadata.get(DIFFUSERS_CONFIG, "{}"))
        for key, value in stated.items() if isinstance(stated, dict) else ():
            component, dot, name = key.partition(".")
            if dot:
                configs.setdefault(component, {})[name] = value
    return {component: config for component, config in configs.items() if "r" in config}


def _pair(
    checkpoint: Checkpoint, place: str, names: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]]
) -> Pair:
    """The pair of a module, with its shapes checked."""
    if len(names) < 2:
        raise _unsupported(checkpoint, f"tensor {next(iter(names.values()))!r} has no partner")
    a, b = checkpoint.entries[names["A"]], checkpoint.entries[names["B"]]
    rank = a.shape[0] if a.shape else 0
    if not rank or len(a.shape) < 2 or b.shape[1:2] != (rank,) or b.numel != b.shape[0] * rank:
        raise _unsupported(checkpoint, f"the shapes of {names['A']!r} and {names['B']!r} are {a.shape} and {b.shape}")
    if not (a.is_floating and b.is_floating):
        raise _unsupported(checkpoint, f"tensor {names['A']!r} or {names['B']!r} is copied rather than averaged")
    prefix = max((each for each in configs if place.startswith(each)), key=len, default="")
    module, config = place.removeprefix(prefix), configs.get(prefix, {})
    alpha = f"{place}.alpha" if f"{place}.alpha" in checkpoint.entries and not config else ""
    if alpha and checkpoint.entries[alpha].numel != 1:
        raise _unsupported(checkpoint, f"tensor {alpha!r} has {checkpoint.entries[alpha].numel} elements, not 1")
    scaling = _scaling(checkpoint, module, rank, config) if not alpha else None
    shape = rank, a.numel // rank, b.shape[0]
    return Pair(names["A"], names["B"], module, prefix, rank, scaling, alpha, (a.numel, b.numel), min(shape[1:]))


def _scaling(checkpoint: Checkpoint, module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The scaling s of a module from its config; 1 without one, like loaders."""
    if not config:
        return 1.0
    stated, alpha = (
        _matched(checkpoint, config.get(f"{key}_pattern"), module, config.get(default))
        for key, default in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if stated != rank or not isinstance(alpha, int | float):
        raise _unsupported(
            checkpoint, f"the factors of {module} have rank {rank}; its config has r {stated} and lora_alpha {alpha}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(checkpoint: Checkpoint, patterns: object, module: str, default: Any) -> Any:
    """The value that PEFT uses for a module: that of the first pattern that its name ends in."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if _REPEATED_GROUP.search(pattern):
            raise _unsupported(checkpoint, f"its config repeats a group in the pattern {pattern[:80]!r}")
        with suppress(re.error):
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default


# --- another rank ---


Ranks = Mapping[str, int]
"""The rank of each pair in a result, by the name of A."""


def with_ranks(checkpoint: Checkpoint, pairs: tuple[Pair, ...], ranks: Ranks) -> Checkpoint:
    """The checkpoint with these ranks: shapes of tensors, and header entries.

    A tensor α is float32, which can hold s·R for any dtype of the factors.
    """
    entries = dict(checkpoint.entries)
    for pair in pairs:
        rank, a, b = ranks[pair.a], entries[pair.a], entries[pair.b]
        entries[pair.a] = dataclasses.replace(a, shape=(rank, *a.shape[1:]))
        entries[pair.b] = dataclasses.replace(b, shape=(b.shape[0], rank, *b.shape[2:]))
        if pair.alpha:
            entries[pair.alpha] = dataclasses.replace(entries[pair.alpha], dtype="F32", kept=True)
    shards = tuple(dataclasses.replace(shard, metadata=_metadata(shard, pairs, ranks)) for shard in checkpoint.shards)
    return dataclasses.replace(checkpoint, entries=entries, shards=shards)


def with_config(config: Mapping[str, Any], prefix: str, pairs: tuple[Pair, ...], ranks: Ranks) -> dict[str, Any]:
    """A config with these ranks, and α that keep every s: the most common values, and patterns for the others."""
    own = [pair for pair in pairs if pair.config == prefix]
    root = math.sqrt if config.get("use_rslora") else float
    alphas = {pair.module: _as_whole((pair.scaling or 0.0) * root(ranks[pair.a])) for pair in own}
    new = {pair.module: ranks[pair.a] for pair in own}
    if not own:
        return dict(config)
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (new, alphas))
    return {
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": each for name, each in new.items() if each != rank},
        "alpha_pattern": {f"^{name}": each for name, each in alphas.items() if each != alpha},
    }


def config_file(prefix: str) -> str:
    """The relative path of PEFT's config for a prefix of names."""
    return f"{prefix.removesuffix(_PEFT_PREFIX)}{ADAPTER_CONFIG}"


def changes_base(config: Mapping[str, Any]) -> str:
    """The initialization of the adapter if it changes the base model by a part of the adapter's rank; else empty."""
    init = config.get("init_lora_weights")
    return "" if init in _PLAIN_INITS else str(init)


def _as_whole(value: float) -> float:
    """α as an integer if it is one except for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-15) else value


def _metadata(shard: Shard, pairs: tuple[Pair, ...], ranks: Ranks) -> dict[str, str]:
    metadata = dict(shard.metadata)
    configs = _in_header(shard)
    if configs:
        stated = parse_json(metadata[DIFFUSERS_CONFIG])
        for component, config in configs.items():
            new = with_config(config, f"{shard.part}{component}.", pairs, ranks)
            stated |= {f"{component}.{key}": value for key, value in new.items()}
        metadata[DIFFUSERS_CONFIG] = json.dumps(stated, indent=2, sort_keys=True)
    with suppress(KeyError, ValueError):
        before = int(metadata["ss_network_dim"])
        (after,) = {ranks[pair.a] for pair in pairs if pair.rank == before}
        metadata["ss_network_dim"] = str(after)
        metadata["ss_network_alpha"] = str(float(metadata["ss_network_alpha"]) * after / before)
    return metadata
