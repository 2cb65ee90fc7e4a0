"""Stage *write*, its value: what was done, in numbers. The `--json` object, and the record in every result."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg import __version__

LOCAL = ".ckavg-local.json"
"""What of a record is for this machine alone, beside it: where the run was. It is never uploaded."""

RUN, BASE_MODEL = "RUN", "BASE_MODEL"
"""What stands in a record for a run, and for the model it began with, that lie elsewhere on the machine."""

_BEYOND_ASCII = re.compile("[^\n -~]")


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that took part.

    Attributes:
        step: its optimizer step.
        directory: where it was, on this machine or by its address.
        files: bytes of its weight files, by path relative to `directory`.
        checksum: of its averaged tensors, as `engine/checksums.py` takes it; None where they were not read.
    """

    step: int
    directory: Path | str
    files: dict[str, int]
    checksum: str | None


@dataclass(frozen=True, slots=True)
class Output:
    """One written checkpoint.

    Attributes:
        name: its name.
        step: the optimizer step it stands for.
        directory: where it is.
        files: the files in it, by path relative to `directory`.
        sha256: SHA-256 of each of them, but for the record itself.
    """

    name: str
    step: int
    directory: Path
    files: tuple[str, ...]
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock time: pass 1, pass 2, and all of it."""

    path: float
    replay: float
    total: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a user's own command said of a result.

    Attributes:
        command: as it was given, with `{dir}` in the place of the result's directory.
        value: the last number it printed; None where it failed.
        problem: why there is no number; empty where there is one.
    """

    command: str
    value: float | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaged:
    """An average that was formed and written.

    Attributes:
        scheme: its name, such as `pema`.
        parameters: its hyper-parameters.
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
        path_kernel: what computed ℓ: `torch` or `numba`; None where it was not measured, or known from before.
        sample: the fraction of each tensor from which ℓ was estimated; 1 where it is exact.
        path_exclude: shell patterns of tensors that were not to count in ℓ.
        zero_sigma: what became of tensors without spread.
        excluded_from_path: floating tensors that did not count in ℓ.
        parameters_counted: N, the scalars that did; None where ℓ was not measured.
        dtype: output dtype that was asked for.
        accumulate: dtype in which tensors were accumulated.
        allow_nonfinite: whether checkpoints that hold NaN or infinity were let through.
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

    scheme: str
    parameters: dict[str, float | int | str]
    source: Path | str
    selection: dict[str, int | str | tuple[int | str, ...]]
    steps: tuple[int, ...]
    anchor_step: int
    span: int
    path_length: tuple[float, ...] | None
    path_length_error: tuple[float, ...] | None
    betas: tuple[float | None, ...]
    alphas: tuple[float | None, ...] | None
    weights: tuple[float, ...]
    path_kernel: str | None
    sample: float
    path_exclude: tuple[str, ...]
    zero_sigma: str
    excluded_from_path: tuple[str, ...]
    parameters_counted: int | None
    dtype: str
    accumulate: str
    allow_nonfinite: bool
    uncorrected: tuple[str, ...]
    infinite: tuple[str, ...]
    copied: tuple[str, ...]
    warnings: tuple[str, ...]
    evaluation: Evaluation | None
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    bytes_read: int
    seconds: Seconds

    @property
    def directory(self) -> Path:
        """Where the average is."""
        return self.outputs[-1].directory

    def columns(self) -> dict[str, list[str]]:
        """The numbers of each checkpoint as text, by column: step, ℓ and α where there are any, β, weight."""
        columns = {"step": [str(step) for step in self.steps]}
        if self.path_length is not None:
            columns["ℓ"] = [f"{length:.4f}" for length in self.path_length]
        columns["β"] = ["" if beta is None else f"{beta:.4f}" for beta in self.betas]
        if self.alphas is not None:
            columns["α"] = ["" if alpha is None else f"{alpha:.4f}" for alpha in self.alphas]
        columns["weight"] = [f"{weight:.4f}" for weight in self.weights]
        return columns

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        record = dataclasses.asdict(self)
        head = {"scheme": record.pop("scheme"), "parameters": record.pop("parameters"), "ckavg_version": __version__}
        return head | record

    def to_json(self) -> str:
        """The record as one JSON object."""
        return as_json(self.to_dict())

    def to_bytes(self) -> bytes:
        """The record as a file: `ckavg.json`."""
        return self.to_json().encode() + b"\n"


def is_address(place: object) -> bool:
    """Whether a place is one for everybody, rather than a directory here."""
    return "://" in str(place)


def as_json(value: object) -> str:
    """One JSON object as text: readable, and without a character that a terminal would obey, or could not show."""
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    return _BEYOND_ASCII.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)
