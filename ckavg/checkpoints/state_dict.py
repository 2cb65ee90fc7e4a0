"""Stage *discover*: which tensors of a pickle belong to the model: `{"model": …, "optimizer": …, "epoch": 3}`.

The model is the value with the name of a model, or the only value that holds tensors; without either, everything except
training state. Inside it, only a further wrapper is removed, so that the names of tensors stay complete. Values may be
nested or shared without end, and may contain themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckavg.checkpoints.layouts import is_averaged
from ckavg.checkpoints.run import WhyLeftOut
from ckavg.checkpoints.unpickler import Opaque
from ckavg.checkpoints.unsupported import MODELS, TRAINING_STATE

_TRAINING_STATE = re.compile(TRAINING_STATE, re.IGNORECASE)
_STEPS = ("global_step", "step", "steps", "iteration", "iter", "iter_num", "num_updates")
"""The keys under which trainers save the optimizer step."""

_LARGEST_STEP = 10**18
_DEEPEST = 32
_MOST_VALUES = 4_000_000
_SHOWN = 80

Found = tuple[dict[str, Any], list[tuple[WhyLeftOut, str]]]
"""Tensors by name; and other saved values with tensors: why each is left out, and its name."""


def find_weights_in(saved: Any, tensor: type) -> Found:
    """The tensors of the model in a saved value, as values of type `tensor` by name.

    Raises:
        ValueError: it is nested too deeply, a tensor has no name, or two tensors have the same name.
    """
    left_out: list[tuple[WhyLeftOut, str]] = []
    top = True
    for _ in range(_DEEPEST):
        items = _items(saved)
        held = {name: value for name, value in items.items() if _holds(value, tensor, in_lists=False)}
        kept = [name for name in held if "." in str(name) or not _TRAINING_STATE.search(str(name))]
        parts = [name for name in kept if type(held[name]) is not tensor]
        loose = [name for name in kept if type(held[name]) is tensor and (held[name].shape or not parts)]
        known = [name for name in MODELS if name in parts]
        alone = len(parts) == 1 and not loose
        is_wrapped = bool(known or alone) if top else bool(known and alone and len(items) > 1)
        chosen = (known or parts)[:1] if is_wrapped else parts + loose if top else [*held]
        taken = set(chosen)
        left_out += [
            ("average" if is_averaged(shown) else "training state", shown)
            for name, value in items.items()
            if name not in taken and _holds(value, tensor, in_lists=True)
            for shown in (str(name)[:_SHOWN],)
        ]
        if not is_wrapped:
            return _flattened({name: held[name] for name in chosen}, tensor), left_out
        saved, top = held[chosen[0]], False
    raise ValueError("it is nested more deeply than any state dict")


def step_of(saved: Any) -> int | None:
    """The optimizer step that a trainer saved beside the model; None if it saved none."""
    items = _items(saved)
    history = items.get("optimizer_history")  # of fairseq
    last = _items(history[-1]) if type(history) is list and history else {}
    for value in (*map(items.get, _STEPS), last.get("num_updates")):
        if type(value) is int and 0 <= value < _LARGEST_STEP:
            return value
    return None


def _items(value: Any) -> Mapping[Any, Any]:
    """The items of a dict, or of a subclass of dict; for a pickled module, its parameters, buffers and modules."""
    if type(value) is dict:
        return value
    if type(value) is not Opaque:
        return {}
    state = value.state
    if type(state) is not dict or type(state.get("_modules")) is not dict:
        return value.items or {}
    parameters, buffers = (_items(state.get(key)) for key in ("_parameters", "_buffers"))
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if type(transient) is list else []
    return {
        **parameters,
        **{name: each for name, each in buffers.items() if name not in transient},
        **state["_modules"],
    }


def _holds(value: Any, tensor: type, *, in_lists: bool) -> bool:
    """Whether a value is a tensor, or is a dict (or list) that holds one at any depth."""
    seen: set[int] = set()
    left = [value]
    while left:
        each = left.pop()
        if type(each) is tensor:
            return True
        inner = each if in_lists and type(each) in (list, tuple) else _items(each).values()
        if inner and id(each) not in seen:
            seen.add(id(each))
            left += inner
    return False


def _flattened(held: Mapping[Any, Any], tensor: type) -> dict[str, Any]:
    """All tensors in nested dicts, by the joined keys that lead to them."""
    found: dict[str, Any] = {}
    for name, value in _walk(held, "", tensor, _DEEPEST, iter(range(_MOST_VALUES))):
        if name in found:
            raise ValueError(f"it holds two tensors of the name {name[:80]!r}")
        found[name] = value
    return found


def _walk(
    held: Mapping[Any, Any], before: str, tensor: type, levels: int, budget: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    if not levels:
        raise ValueError("it is nested more deeply than any state dict")
    for key, value in held.items():
        if next(budget, None) is None:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        is_tensor = type(value) is tensor
        inner = {} if is_tensor else _items(value)
        if not (is_tensor or inner):
            continue
        if type(key) not in (str, int):
            raise ValueError("a name in it is not a string")
        if is_tensor:
            yield f"{before}{key}", value
        else:
            yield from _walk(inner, f"{before}{key}.", tensor, levels - 1, budget)
