"""Stage *report*: which tensors of a model lie in its layers, by their names. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ckavg.path.table import PathLength

_MOST_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Layers:
    """The path length of every counted tensor at the last step, put where the tensor is in the model.

    Attributes:
        kinds: kinds of tensors in the layers, such as `self_attn.q_proj`, sorted; empty where the names tell no layers.
        numbers: numbers of the layers, rising.
        lengths: ℓ by kind, then by layer; NaN where a layer has no counted tensor of that kind.
        others: ℓ of the tensors outside the layers by their whole names, the longest first.
    """

    kinds: tuple[str, ...]
    numbers: tuple[int, ...]
    lengths: tuple[tuple[float, ...], ...]
    others: tuple[tuple[str, float], ...]


def find_layers(path: PathLength) -> Layers:
    """Arrange the counted tensors by layer and kind.

    A layer's number is the first component of a name that is a number. Tensors that differ only in further numbers,
    such as the experts of a layer, are one kind; its ℓ is that of all their parameters together:

        ℓ = Σ_p numel_p · ℓ_p / Σ_p numel_p

    Names tell layers only where some kind is found in more than one of them.
    """
    cell_of = _cells(path.counted)
    cells: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, cell in cell_of.items():
        cells[cell].append(name)
    kinds = tuple(sorted({kind for kind, _ in cells}))
    numbers = tuple(sorted({number for _, number in cells}))
    others = [(name, path.tensor_lengths(name)[-1]) for name in path.counted if name not in cell_of]
    return Layers(
        kinds,
        numbers,
        tuple(tuple(_joint(path, cells.get((kind, number), ())) for number in numbers) for kind in kinds),
        tuple(sorted(others, key=lambda other: (-other[1], other[0]))),
    )


def furthest(layers: Layers, most: int) -> Layers:
    """The layers with no more than `most` kinds: those of which some tensor travelled furthest, in the same order."""
    longest = [max(length for length in row if not math.isnan(length)) for row in layers.lengths]
    kept = sorted(sorted(range(len(longest)), key=lambda place: -longest[place])[:most])
    return dataclasses.replace(
        layers,
        kinds=tuple(layers.kinds[place] for place in kept),
        lengths=tuple(layers.lengths[place] for place in kept),
    )


def shortened(text: str, width: int) -> str:
    """The text with its middle left out where it is longer than `width` characters; names differ most at their ends.

    >>> shortened("vision_tower.encoder.self_attn.q_proj", 21), shortened("lm_head.weight", 21)
    ('vision_tow…ttn.q_proj', 'lm_head.weight')
    """
    if len(text) <= width:
        return text
    kept = width - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _place(name: str) -> tuple[tuple[str, ...], int, tuple[str, ...]] | None:
    """What precedes the number of the layer in a name, the number, and what follows; None where there is no number.

    >>> _place("model.layers.3.mlp.experts.17.up_proj.weight")
    (('model', 'layers'), 3, ('mlp', 'experts', '*', 'up_proj'))
    >>> _place("0.weight"), _place("lm_head.weight")
    (((), 0, ('weight',)), None)
    """
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if _is_number(part)), None)
    if at is None:
        return None
    kind = tuple("*" if _is_number(part) else part for part in parts[at + 1 :])
    return tuple(parts[:at]), int(parts[at]), kind[:-1] if len(kind) > 1 and kind[-1] == "weight" else kind


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= _MOST_DIGITS


def _cells(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Kind, as it is shown, and layer of each tensor; none where no kind is in more than one layer.

    What the names of all stacks of layers have in common at either end is left out: `encoder.block.0.q` is of the kind
    `encoder.q` where there is a `decoder.block`, and of the kind `q` where there is not.
    """
    places = {name: place for name in names if (place := _place(name)) is not None}
    stacks = {stack: stack for stack, _, _ in places.values()}
    front = _shared(stacks.values())
    stacks = {stack: stack[front:] for stack in stacks}
    back = _shared(rest[::-1] for rest in stacks.values())
    stacks = {stack: rest[: len(rest) - back] for stack, rest in stacks.items()}
    cells = {
        name: (".".join((*stacks[stack], *kind)) or ".".join(stack), number)
        for name, (stack, number, kind) in places.items()
    }
    several = len({*cells.values()}) > len({kind for kind, _ in cells.values()})
    return cells if several else {}


def _shared(names: Iterable[tuple[str, ...]]) -> int:
    """How many parts all names have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False)))


def _joint(path: PathLength, names: Iterable[str]) -> float:
    sizes = {name: path.tensors[name].numel for name in names}
    moved = math.fsum(numel * path.tensor_lengths(name)[-1] for name, numel in sizes.items())
    return moved / sum(sizes.values()) if sizes else math.nan
