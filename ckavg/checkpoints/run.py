"""Stage *discover*: the data classes of a run, its checkpoints, their shards and tensors. Opens no file."""

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
from ckavg.errors import CkavgError, UnsupportedFormatError, as_arguments, short_repr
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
"""Bytes per element of every supported dtype, by its safetensors code."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that are averaged; all others are copied from the last checkpoint."""

CONSTANT = frozenset({"C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""The dtypes that are copied only if all checkpoints hold the same bytes."""

DTYPE_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating dtypes: from the safetensors code to the name that users type."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header declares it.

    Attributes:
        dtype: safetensors dtype code, such as `BF16`.
        shape: its dimensions, `()` for a scalar.
        shard: index into `Checkpoint.shards`.
        offset: offset of its bytes in the file.
        kept: whether it is copied even if floating, because not every checkpoint has it.
        pieces: its pieces, if it is not in one place; `shard` and `offset` are then those of the first.
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
        """The byte ranges of its elements `start` to `stop`: shard, first byte and end of each."""
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
        """Whether it can be copied only if it is the same, bit for bit, in every checkpoint."""
        return self.dtype in CONSTANT


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file.

    Attributes:
        path: the file.
        nbytes: its size in bytes.
        state: inode and time of modification when its header was read; None if that does not matter.
        identity: identifies its content in a remote storage; None for a local file.
        part: prefix that its tensors' names have in the run but not in the file, such as `unet/`; see
            `Checkpoint.parts`.
        metadata: the other entries of its header, by name.
    """

    path: AnyPath
    nbytes: int
    state: tuple[int, int] | None = None
    identity: str | None = None
    part: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def saved_as(self) -> str:
        """The name of the file in a result."""
        return as_safetensors(self.path.name)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of the model, as its headers describe it.

    Attributes:
        step: optimizer step (`global_step`) at which it was saved.
        path: the directory, or the file of a flat layout.
        kind: `model`, `adapter` (PEFT, LoRA), `pipeline` (components in folders), or `file` (a single weight file).
        shards: its weight files, in the order of their names.
        indexes: its shard indexes; a pipeline may have one in each component.
        entries: every tensor by name; the name begins with its part.
        left_out: weights in the directory that are not read: why, and the relative path.
        saved_as: the file name of a result of such checkpoints; empty if a result has the names of their files.
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
        """The byte ranges of elements `start` to `stop` of a tensor: file, first byte and end of each."""
        return [(self.shards[shard].path, begin, end) for shard, begin, end in self.entries[name].ranges(start, stop)]

    @property
    def directory(self) -> AnyPath:
        """The directory of its side files."""
        return self.path.parent if self.kind == "file" else self.path

    def with_copied(self, names: Collection[str]) -> Checkpoint:
        """The same, with these tensors copied rather than averaged."""
        if not names:
            return self
        entries = {
            name: dataclasses.replace(entry, kept=True) if name in names else entry
            for name, entry in self.entries.items()
        }
        return dataclasses.replace(self, entries=entries)

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same, without these tensors."""
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
        """Whether it is in the file format of torch.distributed.checkpoint."""
        return self.shards[0].path.suffix == ".distcp"

    @property
    def names(self) -> tuple[str, ...]:
        """Its weight files, by path relative to its directory."""
        return tuple(self._within(shard.path) for shard in self.shards)

    @property
    def names_of_result(self) -> tuple[str, ...]:
        """The weight files of a result with this layout, by relative path."""
        return tuple(self._within(shard.path.parent / shard.saved_as) for shard in self.shards)

    def _within(self, path: AnyPath) -> str:
        return path.relative_to(self.directory).as_posix()

    @property
    def parts(self) -> tuple[str, ...]:
        """The separately loaded parts, in the order of the shards: `` for the weights in the directory itself, `unet/`
        for those in a folder, `value_head.safetensors/` for a file beside them.
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
        """The same with only these parts; with `why`, the others are listed in `left_out`."""
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
    """Which checkpoints of a source to average, and from which anchor; for the fields see `open_run`."""

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
        """The selection as part of the name of a result; empty if it chooses everything.

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
    """A text as part of a file name; if it had to be changed, with a part of its hash."""
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
    """The selected checkpoints of one training run, ordered by step; the first is the anchor.

    Attributes:
        source: the directory or address that was named.
        selection: which checkpoints were chosen.
        checkpoints: the anchor θ_0 and the visited checkpoints after it; at least two.
        warnings: for the user, about how the run was read. Like those of a record, they name settings as options of the
            command line; what Python prints names them as arguments.
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
            [
                repr(self),
                *(line.rstrip() for line in lines),
                *(f"warning: {as_arguments(each)}" for each in self.warnings),
            ]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in list(self._rows())[1:]
        )
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        warnings = "".join(f"<p>warning: {html.escape(as_arguments(each))}</p>" for each in self.warnings)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>{warnings}"

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """The rows of a table of the checkpoints, the titles first; a long table leaves out the middle."""
        yield _COLUMNS
        for place, each in enumerate(self.checkpoints):
            if len(self.checkpoints) > _MOST_ROWS and place == _MOST_ROWS // 2:
                yield "…", "", "", f"{len(self.checkpoints) - _MOST_ROWS} more"
            if min(place, len(self.checkpoints) - 1 - place) < _MOST_ROWS // 2:
                path = f"{each.path}{'' if place else ' (anchor)'}"
                yield str(each.step), _size(each.nbytes), "+".join(each.dtypes), path

    @property
    def address(self) -> str:
        """The source as it was named."""
        return str(self.source)

    @property
    def home(self) -> Path:
        """The parent of `averaged`: the named directory, or the current one for a remote run."""
        return Path() if isinstance(self.source, RemotePath) else self.source

    @property
    def storages(self) -> list[RemoteStorage]:
        """The remote storages of its checkpoints."""
        return storages_of(checkpoint.path for checkpoint in self.checkpoints)

    @property
    def anchor_is_init(self) -> bool:
        """Whether θ_0 was given with `init`."""
        return self.selection.init is not None

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer step of every checkpoint, the anchor's first."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def named(self, checkpoint: Checkpoint) -> AnyPath:
        """The directory or file named by the user that contains a checkpoint of the run."""
        own = self.selection.init
        return own if own is not None and checkpoint.path == own else self.source

    @property
    def last(self) -> Checkpoint:
        """The newest checkpoint: the result has its shards and side files."""
        return self.checkpoints[-1]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, as the last checkpoint stores it."""
        return self.last.entries

    def is_wide(self, name: str) -> bool:
        """Whether a tensor is float64 in any checkpoint; then it is computed in float64."""
        return any(checkpoint.entries[name].dtype == "F64" for checkpoint in self.checkpoints)


def distinct_tables(checkpoints: Sequence[Checkpoint]) -> list[tuple[Mapping[str, TensorInfo], int]]:
    """The distinct tables of tensors, and how many checkpoints share each; usually all share one."""
    counts = Counter(id(checkpoint.entries) for checkpoint in checkpoints)
    tables = {id(checkpoint.entries): checkpoint.entries for checkpoint in checkpoints}
    return [(tables[key], count) for key, count in counts.items()]


def holds_float64(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether any of them has a float64 tensor."""
    tables = distinct_tables(checkpoints)
    return any(entry.dtype == "F64" and entry.is_floating for table, _ in tables for entry in table.values())


def not_constant(name: str, other: Checkpoint, last: Checkpoint) -> CkavgError:
    """The error if a tensor that can only be copied differs between two checkpoints."""
    return UnsupportedFormatError(
        f"tensor {name!r} has dtype {last.entries[name].dtype!r}, which cannot be averaged, and differs between step "
        f"{other.step} and step {last.step}.",
        hint="Such tensors are copied if all checkpoints hold the same. Quantized weights cannot be averaged: average "
        "the checkpoints from before quantizing.",
    )


_ALONE = re.compile(
    r"_*(running|moving|ema)_\w+|_*(cluster_size|num_batches_tracked)|(?!.*log)(\w*_)?(var|variance|std|stddev|sq)"
)
"""Name components that mark running statistics: averages, and values that cannot be negative unless in log space."""

_BESIDE = re.compile(r"(\w*_)?(mean|avg|sum|count|min|max|embed|embedding|codebook)")
"""Components that mark them only beside one of those in the same module: a mean and its variance, a codebook and its
sizes."""


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """The running statistics among the tensors of a model: of normalization layers, normalizers, codebooks.

    A correction could make a variance negative, and then every output is NaN. So they are averaged without correction,
    and do not count in the path length. They are recognised by name; a false match is still averaged.

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
    """The running statistics that are averaged rather than copied."""
    return frozenset(name for name in running_statistics(entries) if entries[name].is_floating)
