"""Stage *discover*: which tensors of a distributed checkpoint belong to the model, and their names in it. Pure.

A trainer saves `{"model": …, "optimizer": …, "step": 3}`. The keys that lead to a tensor distinguish a wrapper of the
model from its modules: `{"model": {"lm_head.weight": …}}` from `{"model.lm_head.weight": …}`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ckavg.checkpoints.layouts import is_averaged, is_training_state
from ckavg.checkpoints.run import WhyLeftOut
from ckavg.checkpoints.unsupported import MODELS, TRAINING_STATE

_STATE = re.compile(TRAINING_STATE, re.IGNORECASE)
_FLAT_STATE = re.compile(
    r"(?:^|.*\.)optim(?:izer)?s?(?:[-_]?\d+)?\.(?:.*\.)?(?:state|param|param_groups|distributed)\..*|"
    r"(?:optim(?:izer)?s?(?:[-_]?\d+)?|lr[-_]schedulers?|data_?loader|train(?:er|ing)?[-_]state|rng[-_]state|"
    r"random[-_]state|grad[-_]scaler)[./].*",
    re.ASCII,
)
_MOMENT = re.compile(
    r"(?:^|[./])(?:(?:max_)?exp_avg(?:_sq|_res)?|exp_inf|momentum_buffer|square_avg|acc_delta|grad_avg)(?:[./]|$)"
)
"""The names of an optimizer's tensors."""

_DEEPEST = 4
_CONVERSIONS = {
    r"(?:.*\.)?decoder\.layers\..*linear_(?:qkv|fc1|proj)\..*": (
        "Megatron",
        "Megatron Bridge (AutoBridge.export_ckpt)",
    ),
    r"tok_embeddings\.weight": ("torchtitan", "its scripts/checkpoint_conversion/convert_to_hf.py"),
    r"blocks\.0\.attention\.w_q\.weight": ("OLMo-core", "its src/examples/huggingface/convert_checkpoint_to_hf.py"),
}
"""By the name of a tensor: the trainer with such names, and the program that maps them to those of Hugging Face."""


def choose_model(
    paths: Mapping[str, tuple[str, ...]], prefix: str | None = None, *, scalars: Collection[str] = ()
) -> tuple[dict[str, str], list[tuple[WhyLeftOut, str]]]:
    """The tensors of the model, from their saved name to their name in the model; and other weights beside it.

    Args:
        paths: for each name, the keys that lead to the tensor.
        prefix: how the names of the model's tensors begin; None: inferred from the keys.
        scalars: names of tensors without dimensions; beside a model they are counters.

    >>> choose_model({"model.w": ("model", "w"), "optimizer.w": ("optimizer", "w")})
    ({'model.w': 'w'}, [])
    >>> choose_model({"model.w": ("model.w",), "head.w": ("head.w",)})
    ({'model.w': 'model.w', 'head.w': 'head.w'}, [])
    """
    if prefix is not None:
        begin = f"{prefix}." if any(name.startswith(f"{prefix}.") for name in paths) else prefix
        return {name: name.removeprefix(begin) for name in paths if name.startswith(begin) and name != begin}, []
    kept = {name: path for name, path in paths.items() if not _is_state(path)}
    left_out: list[tuple[WhyLeftOut, str]] = [
        ("average", top)
        for top in sorted({path[0] for name, path in paths.items() if name not in kept and len(path) > 1})
        if is_averaged(top)
    ]
    depth = 0
    while depth < _DEEPEST:
        inner = {path[depth] for path in kept.values() if len(path) > depth + 1}
        loose = [name for name, path in kept.items() if len(path) == depth + 1 and name not in scalars]
        known = [name for name in MODELS if name in inner]
        if not inner or (loose and not (known and depth == 0)) or (len(inner) > 1 and not known):
            break
        chosen = known[0] if known else next(iter(inner))
        others = sorted(inner - {chosen}) + sorted(loose)
        left_out += [("second model", ".".join([*next(iter(kept.values()))[:depth], each])) for each in others]
        kept = {name: path for name, path in kept.items() if len(path) > depth + 1 and path[depth] == chosen}
        depth += 1
    return {name: ".".join(path[depth:]) for name, path in kept.items()}, left_out


def conversion(names: Iterable[str]) -> tuple[str, str] | None:
    """The trainer whose names a model has, and the program that maps them to those of Hugging Face; None if unknown.

    >>> conversion(["layers.0.attention.wq.weight", "tok_embeddings.weight"])[0]
    'torchtitan'
    """
    for name in names:
        for pattern, found in _CONVERSIONS.items():
            if re.fullmatch(pattern, name):
                return found
    return None


def _is_state(path: tuple[str, ...]) -> bool:
    """Whether a tensor is training state, judged by the keys that lead to it or by its name."""
    *above, name = path
    if _MOMENT.search(name) or _FLAT_STATE.match(name):
        return True
    return any(_STATE.search(key) or is_training_state(key) for key in above)


def count_moments(names: Iterable[str]) -> int:
    """How many of the names belong to an optimizer's moments."""
    return sum(_MOMENT.search(name) is not None for name in names)
