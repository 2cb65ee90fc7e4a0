"""Stage *discover*, its values: a run, its checkpoints, their shards and tensors. Plain data; opens no file."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckavg.checkpoints.layouts import as_safetensors
from ckavg.checkpoints.pieces import Piece, overlapping
from ckavg.errors import CkavgError, UnsupportedFormatError, short_repr
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.remote import RemoteStorage, storages_of

Kind = Literal["model", "adapter", "pipeline", "file"]

WhyLeftOut = Literal[
    "average", "second model", "copy", "adapter", "training state", "pickle", "other format", "link", "not everywhere"
]  # fmt: skip

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes per element of every dtype that is read, by its safetensors code."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that are averaged; all others are copied from the last checkpoint."""

CONSTANT = frozenset({"C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""The dtypes that are copied only where all checkpoints hold the same bytes."""

DTYPE_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating dtypes: safetensors code to the name users type."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header declares it.

    Attributes:
        dtype: safetensors dtype code, such as `BF16`.
        shape: its dimensions, `()` for a scalar.
        shard: index into `Checkpoint.shards`.
        offset: where its bytes begin, counted from the start of the file.
        kept: whether it is copied whatever its dtype, since not every checkpoint has it.
        pieces: where it lies, if not in one place; `shard` and `offset` are then those of the first.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    kept: bool = False
    pieces: tuple[Piece, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements: 1 for a scalar, 0 for an empty tensor."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.item_bytes

    def ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Where its elements `start` to `stop` lie: shard, first byte and end of each range."""
        item = self.item_bytes
        if not self.pieces:
            return [(self.shard, self.offset + start * item, self.offset + stop * item)]
        return [
            (piece.shard, piece.offset + first * item, piece.offset + last * item)
            for piece, first, last in overlapping(self.pieces, start, stop)
        ]

    @property
    def is_floating(self) -> bool:
        """Whether it is averaged rather than copied."""
        return self.dtype in FLOATING and not self.kept

    @property
    def must_be_constant(self) -> bool:
        """Whether it can be copied only where it is the same, bit for bit, in every checkpoint."""
        return self.dtype in CONSTANT


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file.

    Attributes:
        path: where it is.
        nbytes: its size in bytes.
        state: inode and time of modification when its header was read; None where that does not matter.
        identity: what tells its content from any other, by whoever keeps it; None for a file of this machine.
        part: how the names of its tensors begin in the run, and not in the file: `unet/`, say; see `Checkpoint.parts`.
        metadata: what its header says besides the tensors, by name.
    """

    path: AnyPath
    nbytes: int
    state: tuple[int, int] | None = None
    identity: str | None = None
    part: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def saved_as(self) -> str:
        """The name of such a file in a result."""
        return as_safetensors(self.path.name)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model, as its headers describe it.

    Attributes:
        step: optimizer step (`global_step`) at which it was saved.
        path: the directory, or the file of a flat layout.
        kind: `model`, `adapter` (PEFT, LoRA), `pipeline` (models in folders, its components), or `file` (one weight
            file on its own).
        shards: its weight files, in the order of their names.
        indexes: the shard indexes beside them, where there are any; a pipeline may have one in each component.
        entries: every tensor by name, which begins with the part that it is in.
        left_out: weights in the directory that are not read: why, and the path relative to it.
        saved_as: the file name of a result of such checkpoints; empty where it takes the names of their files.
    """

    step: int
    path: AnyPath
    kind: Kind
    shards: tuple[Shard, ...]
    indexes: tuple[AnyPath, ...]
    entries: Mapping[str, TensorInfo]
    left_out: tuple[tuple[WhyLeftOut, str], ...] = ()
    saved_as: str = ""

    __repr__ = short_repr

    def ranges(self, name: str, start: int, stop: int) -> list[tuple[AnyPath, int, int]]:
        """Where elements `start` to `stop` of a tensor lie: file, first byte and end of each range."""
        return [(self.shards[shard].path, begin, end) for shard, begin, end in self.entries[name].ranges(start, stop)]

    @property
    def directory(self) -> AnyPath:
        """Where its side files are."""
        return self.path.parent if self.kind == "file" else self.path

    def with_copied(self, names: Collection[str]) -> Checkpoint:
        """The same, with these of its tensors to be copied rather than averaged."""
        if not names:
            return self
        entries = {
            name: dataclasses.replace(entry, kept=True) if name in names else entry
            for name, entry in self.entries.items()
        }
        return dataclasses.replace(self, entries=entries)

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same, as if these of its tensors were not there."""
        if not names:
            return self
        entries = {name: entry for name, entry in self.entries.items() if name not in names}
        return dataclasses.replace(self, entries=entries)

    @property
    def nbytes(self) -> int:
        """Size of its weight files in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def is_distributed(self) -> bool:
        """Whether torch.distributed.checkpoint saved it, in files of its own format."""
        return self.shards[0].path.suffix == ".distcp"

    @property
    def names(self) -> tuple[str, ...]:
        """Its weight files, by path relative to its directory."""
        return tuple(self._within(shard.path) for shard in self.shards)

    @property
    def names_of_result(self) -> tuple[str, ...]:
        """The weight files of a result that is laid out like it, likewise."""
        return tuple(self._within(shard.path.parent / shard.saved_as) for shard in self.shards)

    def _within(self, path: AnyPath) -> str:
        return path.relative_to(self.directory).as_posix()

    @property
    def parts(self) -> tuple[str, ...]:
        """What is loaded by itself, in the order of the shards: `` for the weights in the directory itself, `unet/` for
        those in a folder, `value_head.safetensors/` for a file beside them.
        """
        return tuple(dict.fromkeys(shard.part for shard in self.shards))

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that hold weights in a result, sorted; the directory itself is `""`."""
        places = {shard.path.parent for shard in self.shards}
        if self.saved_as and self.kind != "file":
            return ("",)
        return tuple(sorted("" if each == self.directory else self._within(each) for each in places))

    def with_parts(self, parts: Collection[str], *, why: WhyLeftOut | None = None) -> Checkpoint:
        """The same without the weights of all other parts, which are told to be left out where it is said why."""
        if set(parts) >= set(self.parts):
            return self
        kept = [place for place, shard in enumerate(self.shards) if shard.part in parts]
        moved = {place: new for new, place in enumerate(kept)}
        entries = {
            name: dataclasses.replace(entry, shard=moved[entry.shard])
            for name, entry in self.entries.items()
            if entry.shard in moved
        }
        shards = tuple(self.shards[place] for place in kept)
        folders = {shard.path.parent for shard in shards}
        indexes = tuple(index for index in self.indexes if index.parent in folders)
        others = [self._within(shard.path) for shard in self.shards if shard.part not in parts]
        left_out = self.left_out + (() if why is None else tuple((why, name) for name in others))
        return dataclasses.replace(self, shards=shards, indexes=indexes, entries=entries, left_out=left_out)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Its floating dtypes by name, most bytes first; `("bfloat16",)` for most models."""
        total: dict[str, int] = {}
        for entry in self.entries.values():
            if entry.is_floating:
                total[entry.dtype] = total.get(entry.dtype, 0) + entry.nbytes
        return tuple(DTYPE_NAMES[code] for code in sorted(total, key=lambda code: (-total[code], code)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which checkpoints of a source take part, and from which anchor.

    Attributes:
        init: the anchor θ_0, a checkpoint directory or safetensors file; None: the first checkpoint selected.
        init_step: optimizer step of `init`.
        match: shell pattern of the names of checkpoints, where several runs lie in one directory.
        steps: exactly these optimizer steps; empty: all.
        skip_step: leave out these optimizer steps.
        every: update frequency f in optimizer steps: visit only checkpoints with (t_k − t_0) mod f = 0.
        every_from: count `every` from this step instead of the anchor's.
        from_step: leave out checkpoints before this optimizer step.
        to_step: leave out checkpoints after this optimizer step.
        best: keep only this many checkpoints, the best by a metric of the trainer's log, before `last`.
        metric: its name in the log, such as `eval_loss`.
        goal: whether `min` or `max` of it is best; None: as its name tells.
        last: keep only this many checkpoints, the newest.
        skip_incomplete: leave out checkpoints that are not written in full.
        common_only: average the tensors that all checkpoints have, and copy the others.
        revisions: patterns of the revisions of a repository, each of which is a checkpoint.
        prefix: how the names of the model's tensors begin in what torch.distributed.checkpoint saved; it is taken off.
        copy: shell patterns of further files of the last checkpoint that go into the result.
    """

    init: AnyPath | None = None
    init_step: int = 0
    match: str | None = None
    steps: tuple[int, ...] = ()
    skip_step: tuple[int, ...] = ()
    every: int | None = None
    every_from: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    best: int | None = None
    metric: str | None = None
    goal: Literal["min", "max"] | None = None
    last: int | None = None
    skip_incomplete: bool = False
    common_only: bool = False
    revisions: tuple[str, ...] = ()
    prefix: str | None = None
    copy: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def stated(self) -> dict[str, int | str | tuple[int | str, ...]]:
        """The parts that differ from choosing everything, by name."""
        values = {each.name: (getattr(self, each.name), each.default) for each in dataclasses.fields(self)}
        stated = {name: value for name, (value, default) in values.items() if value != default}
        stated |= {} if self.init is None else {"init": str(self.init)}
        return stated | ({"steps": ",".join(map(str, self.steps))} if self.steps else {})

    @property
    def label(self) -> str:
        """What tells it from others in the name of a result; empty where everything is chosen.

        >>> Selection(every=100, from_step=400).label, Selection(steps=(100, 300), match="run a*").label
        ('every100-from-step400', 'match-run-a-a6584b-steps100-300')
        >>> Selection(best=5, metric="eval_loss").label
        'best5-eval_loss'
        """
        parts = ["init"] if self.init is not None else []
        parts += [f"init-step{self.init_step}"] if self.init_step else []
        parts += [f"match-{_short(self.match)}"] if self.match is not None else []
        parts += [f"prefix-{_short(self.prefix)}"] if self.prefix is not None else []
        named = {"steps": self.steps, "skip-step": self.skip_step}
        parts += [f"{name}{_short('-'.join(map(str, steps)))}" for name, steps in named.items() if steps]
        parts += [f"best{self.best}-{_short(self.metric or '')}"] if self.best is not None else []
        ranges = {"every": self.every, "from-step": self.from_step, "to-step": self.to_step, "last": self.last}
        return "-".join([*parts, *(f"{name}{value}" for name, value in ranges.items() if value is not None)])


_LONGEST = 24
_UNSAFE = re.compile(r"[^A-Za-z0-9._]+")


def _short(text: str) -> str:
    """A text as part of a file name; where that is not the text itself, some of its hash goes with it."""
    safe = _UNSAFE.sub("-", text)[:_LONGEST].strip("-.")
    if safe == text:
        return text
    return "-".join(filter(None, [safe, hashlib.sha256(text.encode()).hexdigest()[:6]]))


_COLUMNS = ("step", "size", "dtype", "path")
_MOST_ROWS = 10


def _size(nbytes: int) -> str:
    return next((f"{nbytes / unit:.1f} {name}" for unit, name in _UNITS if nbytes >= unit), f"{nbytes} B")


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one training run that take part, ordered by step; the first is the anchor.

    Attributes:
        source: what was named: a directory, or an address.
        selection: what was chosen of it.
        checkpoints: the anchor θ_0 and the visited checkpoints after it; at least two.
        warnings: what a user should know about how the run was read.
    """

    source: AnyPath
    selection: Selection
    checkpoints: tuple[Checkpoint, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        steps = f", steps {self.steps[0]} to {self.steps[-1]}" if self.checkpoints else ""
        return f"{type(self).__name__}({str(self.source)!r}, {len(self.checkpoints)} checkpoints{steps})"

    def __str__(self) -> str:
        lines = [
            "  ".join((f"{step:>10}", f"{size:>10}", f"{dtype:<10}", path)) for step, size, dtype, path in self._rows()
        ]
        return "\n".join(
            [repr(self), *(line.rstrip() for line in lines), *(f"warning: {each}" for each in self.warnings)]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in list(self._rows())[1:]
        )
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        warnings = "".join(f"<p>warning: {html.escape(each)}</p>" for each in self.warnings)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>{warnings}"

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """The cells of a table of the checkpoints, the titles first; of many, without those in the middle."""
        yield _COLUMNS
        for place, each in enumerate(self.checkpoints):
            if len(self.checkpoints) > _MOST_ROWS and place == _MOST_ROWS // 2:
                yield "…", "", "", f"{len(self.checkpoints) - _MOST_ROWS} more"
            if min(place, len(self.checkpoints) - 1 - place) < _MOST_ROWS // 2:
                path = f"{each.path}{'' if place else ' (anchor)'}"
                yield str(each.step), _size(each.nbytes), "+".join(each.dtypes), path

    @property
    def address(self) -> str:
        """What was named, as it was named."""
        return str(self.source)

    @property
    def home(self) -> Path:
        """Where results go by default: the directory that was named; the current one for a run that is not here."""
        return Path() if isinstance(self.source, RemotePath) else self.source

    @property
    def storages(self) -> list[RemoteStorage]:
        """The storages elsewhere that its checkpoints are in."""
        return storages_of(checkpoint.path for checkpoint in self.checkpoints)

    @property
    def anchor_is_init(self) -> bool:
        """Whether θ_0 was named apart from the run."""
        return self.selection.init is not None

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer step of every checkpoint, the anchor's first."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def named(self, checkpoint: Checkpoint) -> AnyPath:
        """The directory or file that the user named, in which a checkpoint of the run was found."""
        own = self.selection.init
        return own if own is not None and checkpoint.path == own else self.source

    @property
    def last(self) -> Checkpoint:
        """The newest checkpoint: the result takes its shard cut and side files."""
        return self.checkpoints[-1]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, as the last checkpoint stores it."""
        return self.last.entries

    def is_wide(self, name: str) -> bool:
        """Whether a tensor is float64 in any checkpoint: then nothing narrower is computed with."""
        return any(checkpoint.entries[name].dtype == "F64" for checkpoint in self.checkpoints)


def distinct_tables(checkpoints: Sequence[Checkpoint]) -> list[tuple[Mapping[str, TensorInfo], int]]:
    """Their tables of tensors, each once, and how many of them have it: mostly it is one that they share."""
    counts = Counter(id(checkpoint.entries) for checkpoint in checkpoints)
    tables = {id(checkpoint.entries): checkpoint.entries for checkpoint in checkpoints}
    return [(tables[key], count) for key, count in counts.items()]


def holds_float64(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether any of them has a float64 tensor."""
    tables = distinct_tables(checkpoints)
    return any(entry.dtype == "F64" and entry.is_floating for table, _ in tables for entry in table.values())


def not_constant(name: str, other: Checkpoint, last: Checkpoint) -> CkavgError:
    """The error where a tensor that can only be copied is not the same in two checkpoints."""
    return UnsupportedFormatError(
        f"tensor {name!r} has dtype {last.entries[name].dtype!r}, which cannot be averaged, and differs between step "
        f"{other.step} and step {last.step}.",
        hint="Such tensors are copied where all checkpoints hold the same. Quantized weights do not average: average "
        "the checkpoints before quantizing them.",
    )


_ALONE = re.compile(
    r"_*(running|moving|ema)_\w+|_*(cluster_size|num_batches_tracked)|(?!.*log)(\w*_)?(var|variance|std|stddev|sq)"
)
"""Components of names that say it by themselves: a kind of average, or what cannot be negative but by its logarithm."""

_BESIDE = re.compile(r"(\w*_)?(mean|avg|sum|count|min|max|embed|embedding|codebook)")
"""Those that do where the same module holds one of the others: a mean beside its variance, a codebook and its sizes."""


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """The running statistics among the tensors of a model: of normalization layers, normalizers, codebooks.

    A variance that a correction takes below zero makes every output NaN. So they take the average without it, and count
    in no path length. Names alone tell them; what is taken for one by mistake is averaged all the same.

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
