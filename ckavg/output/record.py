"""The record of a result, `ckavg.json`: what was done, in numbers. It is written here, and read as a stranger's file.

What is read is a record only where it is whole: every value of its kind, lists of one length, steps in order, and names
that stay inside their directories. Whether its numbers are right is for `verify/`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ckavg import __version__
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import CkavgError, CombinedError, ReadError, RecordError, SettingError, raise_all, short_repr
from ckavg.output.staging import bring_back
from ckavg.schemes import SCHEMES, Scheme
from ckavg.storage.address import AddressPath, is_meant_for_address
from ckavg.storage.local import parse_json, read_small

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from ckavg import Pushed

RUN, BASE_MODEL = "RUN", "BASE_MODEL"
"""What stands in a record for a run, and for the model it began with, that lie elsewhere on the machine."""

MOST_BYTES = 32 << 20
"""Of a run of 200 checkpoints in 30 shards each, with as many snapshots, it takes 2 MB."""

MOST_VALUES = 1_000_000
"""Some 250 bytes each, once they are parsed."""

ALL_OTHERS = 0.01
_LARGEST = 2**63
_SHOWN = 60
_MESSAGES = {"missing": "missing", "tuple_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}
"""What pydantic says by other words, by the types of its errors."""

_BEYOND_ASCII = re.compile("[^\n -~]")


def _is_plain(value: Any) -> bool:
    """Whether a text holds no NUL, and a number is finite, and no whole one of more than 64 bits."""
    if isinstance(value, str):
        return "\0" not in value
    return isinstance(value, list) or (abs(value) < _LARGEST if type(value) is int else math.isfinite(value))


@dataclass(frozen=True, slots=True)
class _Must:
    """What a value that is read must be, for people and as a test. pydantic, which asks, is imported when one is."""

    be: str
    kinds: tuple[type, ...]
    passes: Callable[[Any], object] = lambda value: True

    def __get_pydantic_core_schema__(self, source: object, handler: Callable[[object], Any]) -> Any:
        from pydantic_core import core_schema

        def check(value: object) -> object:
            if type(value) not in self.kinds or not _is_plain(value) or not self.passes(value):
                raise ValueError
            return value

        tested = core_schema.no_info_before_validator_function(check, handler(source))
        return core_schema.custom_error_schema(tested, "wrong", custom_error_message=self.be)


class _ToFirstError:
    """Of a list or an object, the first wrong value alone is told: there may be a million."""

    @staticmethod
    def __get_pydantic_core_schema__(source: object, handler: Callable[[object], Any]) -> Any:
        return {**handler(source), "fail_fast": True}


def _is_plain_path(name: str) -> bool:
    """Whether this is a file inside a directory: relative, without `..`, in one way of writing it."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\\" in name)


Text = Annotated[str, _Must("a text", (str,))]
Flag = Annotated[bool, _Must("true or false", (bool,))]
Whole = Annotated[int, _Must("a whole number", (int,))]
Count = Annotated[int, _Must("a whole number, 0 or more", (int,), lambda value: value >= 0)]
Number = Annotated[float, _Must("a finite number", (int, float))]
Digest = Annotated[str, _Must("64 hexadecimal digits", (str,), re.compile("[0-9a-f]{64}").fullmatch)]
FileName = Annotated[str, _Must("the plain path of a file inside its directory", (str,), _is_plain_path)]
Directory = Annotated[Path, _Must("a text", (str,))]
Place = Annotated[Path | str, _Must("a text", (str,))]
Parameter = Annotated[float | int | str, _Must("a finite number or a text", (float, int, str))]
Selected = Annotated[bool | int | str | tuple[int | str, ...], _Must("what an option takes", (bool, int, str, list))]
Accumulated = Annotated[str, _Must("float32 or float64", (str,), {"float32", "float64"}.__contains__)]
Lora = Annotated[Literal["factors", "product"], _Must("factors or product", (str,))]
ZeroSigma = Annotated[Literal["exclude", "eps"], _Must("exclude or eps", (str,))]
EvaluationGoal = Annotated[Literal["min", "max", ""], _Must("min, max or empty", (str,))]

Texts = Annotated[tuple[Text, ...], _ToFirstError]
Numbers = Annotated[tuple[Number, ...], _ToFirstError]
MaybeNumbers = Annotated[tuple[Number | None, ...], _ToFirstError]


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that took part.

    Attributes:
        step: its optimizer step.
        directory: where it was, on this machine or by its address.
        files: bytes of its weight files, by path relative to `directory`.
        checksum: of its averaged tensors, as `engine/checksums.py` takes it; None where they were not read.
    """

    step: Whole
    directory: Place
    files: Annotated[dict[FileName, Count], _ToFirstError]
    checksum: Digest | None


@dataclass(frozen=True, slots=True)
class Output:
    """One written checkpoint.

    Attributes:
        name: its name.
        step: the optimizer step it stands for.
        directory: where it is; of a result that went to an address, an `AddressPath`.
        files: the files in it, by path relative to `directory`.
        sha256: SHA-256 of each of them, but for the record itself.
        discarded_energy: where products of low-rank adapters were cut to a rank, the part of the squared Frobenius norm
            of all of them that was lost; else None.
    """

    name: Text
    step: Whole
    directory: Directory
    files: Annotated[tuple[FileName, ...], _ToFirstError]
    sha256: Annotated[dict[FileName, Digest], _ToFirstError]
    discarded_energy: Number | None = None


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock time: pass 1, pass 2, and all of it."""

    path: Number
    replay: Number
    total: Number


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a user's own command said of a result.

    Attributes:
        command: as it was given, with `{dir}` in the place of the result's directory.
        value: of the metric; None where it failed.
        problem: why there is no value, or not the standard error that was asked for; empty where nothing is wrong.
        metric: its name; empty where the last number printed counts.
        stderr: standard error of the value; None where none is known.
        goal: whether the least or the greatest value is best; empty in records of earlier versions.
        best_of: how many averages were evaluated, of which its value made this one the choice; 0: none did.
    """

    command: Text
    value: Number | None
    problem: Text = ""
    metric: Text = ""
    stderr: Number | None = None
    goal: EvaluationGoal = ""
    best_of: Count = 0


Curves = Sequence[tuple[str, Sequence[tuple[int, Evaluation]]]]
"""Evaluations by series, then by optimizer step: of the run's own checkpoints, and of averages along it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An average that was formed and written.

    Attributes:
        scheme: its name, such as `pema`.
        parameters: its hyper-parameters.
        ckavg_version: the version that made it.
        source: the directory or address that the checkpoints came from.
        selection: what was chosen of it, where it was not everything.
        steps: optimizer step of every checkpoint that took part, the anchor's first.
        anchor_step: optimizer step of θ_0.
        span: T = t_K − t_0 in optimizer steps.
        path_length: ℓ at every checkpoint; None where the scheme does not use it.
        path_length_error: standard error of each; None where they are exact.
        betas: β of every update; None for the anchor and before.
        alphas: α likewise; None for schemes without a correction.
        weights: effective weight of every checkpoint; they sum to 1.
        effective_count: 1 / Σ w²: how many equal checkpoints would be spread as wide; None in older records, as are
            the next two.
        mean_age: Σ w_k (t_K − t_k) in optimizer steps, how far the average lags; negative where it leads.
        anchor_weight: weight of θ_0.
        path_kernel: what computed ℓ: `torch`, compiled `llvm` or, in older records, `numba`; None where it was not
            measured, or known from before.
        sample: the fraction of each tensor from which ℓ was estimated; 1 where it is exact.
        path_exclude: shell patterns of tensors that were not to count in ℓ.
        zero_sigma: what became of tensors without spread.
        excluded_from_path: floating tensors that did not count in ℓ.
        parameters_counted: N, the scalars that did; None where ℓ was not measured.
        dtype: output dtype that was asked for.
        accumulate: dtype in which tensors were accumulated.
        allow_nonfinite: whether checkpoints that hold NaN or infinity were let through.
        lora: how low-rank adapters were averaged: `factors` or `product`.
        rank: the rank to which averaged products were cut; None where none were.
        uncorrected: running statistics that were averaged without the correction of the scheme.
        infinite: tensors that hold infinities, the same ones in all checkpoints and in the result.
        copied: floating tensors that were copied from the last checkpoint: not all have them, or they never change.
        warnings: what a user should know.
        evaluation: what the user's own command said of it; None where there was none.
        inputs: the checkpoints that took part, the anchor first.
        outputs: what was written; snapshots first, the average over all checkpoints last.
        bytes_read: bytes of checkpoints read.
        seconds: how long it took.
    """

    scheme: Text
    parameters: Annotated[dict[Text, Parameter], _ToFirstError]
    ckavg_version: Text = __version__
    source: Place
    selection: Annotated[dict[Text, Selected], _ToFirstError]
    steps: Annotated[tuple[Whole, ...], _ToFirstError]
    anchor_step: Whole
    span: Count
    path_length: Numbers | None
    path_length_error: Numbers | None
    betas: MaybeNumbers
    alphas: MaybeNumbers | None
    weights: Numbers
    effective_count: Number | None = None
    mean_age: Number | None = None
    anchor_weight: Number | None = None
    path_kernel: Text | None
    sample: Number
    path_exclude: Texts
    zero_sigma: ZeroSigma
    excluded_from_path: Texts
    parameters_counted: Count | None
    dtype: Text
    accumulate: Accumulated
    allow_nonfinite: Flag = False
    lora: Lora = "factors"
    rank: Count | None = None
    uncorrected: Texts = ()
    infinite: Texts = ()
    copied: Texts
    warnings: Texts
    evaluation: Evaluation | None
    inputs: Annotated[tuple[Input, ...], _ToFirstError]
    outputs: Annotated[tuple[Output, ...], _ToFirstError]
    bytes_read: Count
    seconds: Seconds

    def __repr__(self) -> str:
        return short_repr(self)

    def push_to_hub(self, repo: str, *, private: bool | None = None, **options: Any) -> Pushed:
        """Upload the result to the Hugging Face Hub: `ckavg.push` of its directory, with the same arguments."""
        from ckavg import push  # the one call of a later room

        return push(self.directory, repo, private=private, **options)

    @property
    def output(self) -> Output:
        """The entry of the result itself; those of its snapshots come before it."""
        return self.outputs[-1]

    @property
    def directory(self) -> Path:
        """Where the average is."""
        return self.output.directory

    @property
    def output_index(self) -> int:
        """Index of the checkpoint after which the result was written: the last one, but for a snapshot."""
        return self.steps.index(self.output.step)

    @property
    def chosen(self) -> str:
        """Which checkpoints it visits, as far as averages of one sweep may differ in that."""
        names = "every", "every_from", "from_step", "to_step", "last"
        ranges = {name: self.selection.get(name) for name in names}
        stated = [f"{name.replace('_', ' ')} {value}" for name, value in ranges.items() if value is not None]
        return ", ".join(stated) or "all checkpoints"

    @property
    def anchor_is_init(self) -> bool:
        """Whether θ_0 is a model given apart from the run."""
        return "init" in self.selection

    @property
    def is_mostly_anchor(self) -> bool:
        """Whether it is in effect θ_0."""
        return is_mostly_anchor(self.weights, self.steps.index(self.anchor_step), self.output_index)

    def to_scheme(self) -> Scheme:
        """How it was averaged: the scheme of this name with these hyper-parameters, each of the type of its default.

        Raises:
            RecordError: there is none.
        """
        return scheme_from(self.scheme, self.parameters)

    def columns(self) -> dict[str, list[str]]:
        """The numbers of each checkpoint as text, by column: step, ℓ and α where there are any, β, weight."""
        numbers = {"ℓ": self.path_length, "β": self.betas, "α": self.alphas, "weight": self.weights}
        return {"step": [str(step) for step in self.steps]} | {
            name: ["" if value is None else f"{value:.4f}" for value in values]
            for name, values in numbers.items()
            if values is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The record as one JSON object."""
        return as_json(self.to_dict())

    def to_bytes(self) -> bytes:
        """The record as a file: `ckavg.json`."""
        return self.to_json().encode() + b"\n"


def is_mostly_anchor(weights: Sequence[float], start: int, last: int) -> bool:
    """Whether an average is in effect the checkpoint where it begins: all others together have 1 % of weight or less,
    whatever its sign. One that also ends there is rather the last checkpoint.
    """
    others = math.fsum(abs(weight) for place, weight in enumerate(weights) if place != start)
    return start < last and others <= ALL_OTHERS


def is_address(place: object) -> bool:
    """Whether a place is one for everybody, rather than a directory here."""
    return "://" in str(place)


def scheme_from(name: str, parameters: Mapping[str, Any]) -> Scheme:
    """The scheme of a name with these hyper-parameters, each of the type of its default.

    Raises:
        RecordError: there is none.
    """
    named = [scheme for scheme in SCHEMES if scheme.name == name] or _own_schemes(Scheme, name)  # type: ignore[type-abstract]
    if not named:
        raise RecordError(
            f"scheme is {name[:40]!r}, which is not known.",
            hint="If it is one of your own, read the result in Python, where its class has been imported.",
        )
    for scheme in named:
        defaults = {field.name: field.default for field in dataclasses.fields(scheme)}
        required = defaults.keys() - {*scheme.added_fields}
        if required <= parameters.keys() <= defaults.keys():
            try:
                return scheme(
                    **{
                        name: value
                        if isinstance(value, str) and name in scheme.repeatable
                        else _as_typed(value, defaults[name])
                        for name, value in parameters.items()
                    }
                )
            except (ValueError, SettingError) as error:
                raise RecordError(f"parameters do not fit {name}: {error}") from error
    raise RecordError(f"parameters are not those of {name}.")


def _own_schemes(base: type[Scheme], name: str) -> list[type[Scheme]]:
    """The schemes of a name that were defined outside this package, the newest first."""
    found = [each for kind in base.__subclasses__() for each in (*_own_schemes(kind, name), kind) if each.name == name]
    return found[::-1]


def as_json(value: object) -> str:
    """One JSON object as text: readable, and without a character that a terminal would obey, or could not show."""
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    return _BEYOND_ASCII.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def _as_typed(value: float | int | str, default: object) -> Any:
    kind = type(default)
    if kind is float and (value == "inf" or type(value) in (int, float)):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:40]!r} must be of the type {kind.__name__}.")
    return value


def read_record(directory: Path) -> Record:
    """Read the record of a result; one that a killed process had moved aside gets its name back first.

    Raises:
        RecordError: there is none, or it is not what a record must be; all that is wrong is listed.
        ReadError: the system would not let us read it.
    """
    if is_meant_for_address(directory):
        raise RecordError(
            f"{AddressPath(directory)} is not on this machine.",
            hint="Copy it here first. Of all commands, verify and diff alone fetch a result.",
        )
    for place in (directory.parent, directory):  # the result, perhaps, of which this is a snapshot
        bring_back(place)
    path = directory / RESULT_RECORD
    try:
        data = read_small(path, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordError(
            f"{directory} is not a result of ckavg: it holds no {RESULT_RECORD}.",
            hint="Name the directory of a result, such as checkpoints/averaged/pema-gamma0.15.",
        ) from error
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise ReadError(
            f"{path} cannot be read: {told}.", hint="Check that it is a record, and that you may read it."
        ) from error
    return parse_record(data, path)


def parse_record(data: bytes, path: object) -> Record:
    """The record in a file; RecordError where it is not what a record must be. `path` is for messages."""
    version = __version__
    try:
        fields = parse_fields(data)
        version = str(fields.get("ckavg_version", version))
        return _validated(fields)
    except CkavgError as error:
        hint = "The record was damaged or edited. Take it from a copy, or form the average again."
        if version != __version__:
            hint = f"It was made with ckavg {version}; this is {__version__}. Verify it with that version."
        raise RecordError(f"{path}: {error.message}", hint=hint) from error


def parse_fields(data: bytes) -> dict[str, Any]:
    """One JSON object of a bounded size, in which no name appears twice.

    Raises:
        RecordError: it is not.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise RecordError(f"holds more than {MOST_VALUES:,} values.")
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RecordError("is not a JSON object.")
    return value


@functools.cache
def _adapter() -> TypeAdapter[Record]:
    """What validates records; to make it takes 50 ms."""
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _validated(fields: dict[str, Any]) -> Record:
    from pydantic import ValidationError

    try:
        record = _adapter().validate_python(fields)
    except ValidationError as error:
        found = error.errors(include_input=False)  # which would be a copy of the whole record, time and again
        wrong = [_wrong(fields, each["loc"], _MESSAGES.get(each["type"], each["msg"])) for each in found]
        raise (CombinedError(wrong) if len(wrong) > 1 else wrong[0]) from error
    raise_all([RecordError(message) for is_wrong, message in _inconsistencies(record) if is_wrong])
    return record


def _wrong(fields: dict[str, Any], place: tuple[int | str, ...], message: str) -> RecordError:
    """What pydantic has found at a place of a record."""
    names = (f"[{each}]" if isinstance(each, int) else f".{each[:_SHOWN]}" for each in place if each != "[key]")
    where = "".join(names).lstrip(".")
    if message == "missing":
        return RecordError(f"{where} is not there.")
    value: Any = fields
    for each in place:
        value = value[each] if each != "[key]" else place[-2]
    if isinstance(value, dict | list):
        shown = "a list" if isinstance(value, list) else "an object"
    elif type(value) is int and abs(value) >= _LARGEST:
        shown = "a huge number"
    else:
        shown = json.dumps(value)
    return RecordError(f"{where} is {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'}; it must be {message}.")


def _inconsistencies(record: Record) -> list[tuple[bool, str]]:
    """What must not be between the values of a record, and whether it is."""
    steps, outputs = record.steps, record.outputs
    if len(steps) < 2:
        return [(True, "steps holds fewer than two checkpoints.")]
    lists = (record.betas, record.weights, record.inputs, record.alphas, record.path_length)
    names = [output.name for output in outputs]
    return [
        (any(after <= before for before, after in itertools.pairwise(steps)), "steps are not ascending."),
        (
            any(each is not None and len(each) != len(steps) for each in lists),
            "steps, betas, weights, inputs, alphas and path_length are not of one length.",
        ),
        (record.anchor_step not in steps, "anchor_step is not among the steps."),
        (tuple(each.step for each in record.inputs) != steps, "inputs are not of the steps in steps."),
        (not all(each.files for each in record.inputs), "inputs[].files is empty."),
        (not outputs, "outputs is empty."),
        (not all(each.step in steps for each in outputs), "outputs[].step is not among the steps."),
        (len({each.step for each in outputs}) < len(outputs), "outputs[].step is there twice."),
        (len(outputs) > 1 and outputs[-1].step != steps[-1], "the last of outputs is not of the last step."),
        (
            any("/" in name or name in ("", ".", "..") for name in names[:-1]) or len(set(names)) < len(names),
            "outputs[].name is no name of a directory, or appears twice.",
        ),
        (
            any({*each.sha256, RESULT_RECORD} != set(each.files) for each in outputs),
            f"outputs[].sha256 is not of the files in outputs[].files but {RESULT_RECORD}.",
        ),
        (any(len(set(each.files)) < len(each.files) for each in outputs), "outputs[].files names one twice."),
        (
            record.path_length is not None and any(length < 0 for length in record.path_length),
            "path_length holds a negative number.",
        ),
        (record.to_scheme().needs_path and record.path_length is None, "path_length is null."),
        (not 0 < record.sample <= 1, "sample is no fraction in (0, 1]."),
    ]
