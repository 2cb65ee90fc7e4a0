"""Stage *write*: the model card of a result, in the form the Hugging Face Hub reads. Pure: from the record to text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckavg import __version__
from ckavg.output.citations import about, citations
from ckavg.output.command import as_options, shell_word
from ckavg.output.front_matter import as_front_matter
from ckavg.output.metadata import is_hub_id, related
from ckavg.output.origin import Origin
from ckavg.output.record import BASE_MODEL, Averaged, is_address
from ckavg.schemes import Scheme

PICTURE = "ckavg.svg"
"""Name of the picture that a card shows, beside it."""

_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]")
_MOST_ROWS, _FIRST_ROWS = 24, 8
_OF_LICENSE = ("license", "license_name", "license_link")


def write_card(record: Averaged, scheme: Scheme, origin: Origin, *, picture: str | None = None) -> str:
    """The text of `README.md`: metadata, what this is, how it was made and checked, and what to cite.

    Args:
        record: what was done, as it may be published.
        scheme: how.
        origin: what is known of the run besides; a card of the user's comes first, and its fields win.
        picture: name of the file beside the card that shows the weights; None: there is none.
    """
    metadata = _metadata(record, origin)
    own = origin.own.text.strip("\n") if origin.own is not None else ""
    level = "##" if own else "#"
    heading = "How the weights were averaged" if own else _escaped(record.outputs[-1].name)
    parts = [
        as_front_matter(metadata),
        own,
        f"{level} {heading}",
        _description(record, scheme, metadata, origin.repository),
        _evaluation(record, level),
        f"{level}# Recipe\n\n{_recipe(record, scheme)}",
        f"{level}# Checkpoints",
        f"![The weight of each checkpoint in the average, by optimizer step]({picture})" if picture else "",
        _table(record),
        f"{level}# To make it again\n\n{_again(record, scheme, metadata)}",
        f"{level}# What was checked\n\n{_checks(record)}",
        _warnings(record, level),
        _citation(scheme, level),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def reproduce(record: Averaged, scheme: Scheme) -> str:
    """The command line that forms the same average; in the directory of the checkpoints, if they have no address."""
    settings: dict[str, object] = {**scheme.stated, **record.selection}
    settings.pop("every_from", None)  # follows from --burn-in
    if "init" in settings and not is_address(settings["init"]):
        settings["init"] = BASE_MODEL  # a local path, and nobody else's
    if record.dtype != "source":
        settings["dtype"] = record.dtype
    if record.accumulate != "float32":
        settings["accumulate"] = record.accumulate
    if record.allow_nonfinite:
        settings["allow_nonfinite"] = True
    if record.outputs[-1].step < record.steps[-1]:
        settings["snapshot_every"] = record.outputs[-1].step
    if record.sample < 1:
        settings["sample"] = record.sample
    if record.path_length is not None:
        settings["path_exclude"] = record.path_exclude
        if record.zero_sigma != "exclude":
            settings["zero_sigma"] = record.zero_sigma
    source = f" {shell_word(str(record.source))}" if is_address(record.source) else ""
    return f"ckavg {record.scheme}{source} {as_options(settings)}".rstrip()


def _metadata(record: Averaged, origin: Origin) -> dict[str, Any]:
    """The fields for the Hub; those of the user's card take the place of ours, and null removes one."""
    ours = dict(origin.metadata)
    ours["tags"] = list(dict.fromkeys(["checkpoint-averaging", record.scheme, *ours.pop("tags", ())]))
    own = origin.own.metadata if origin.own is not None else {}
    if "license" in own:
        for name in _OF_LICENSE:
            ours.pop(name, None)
    if "base_model" in own:
        ours.pop("base_model_relation", None)
    fields = related({**ours, **own}, is_adapter=origin.is_adapter)
    return {name: value for name, value in fields.items() if value is not None}


def _description(record: Averaged, scheme: Scheme, metadata: Mapping[str, Any], repository: str) -> str:
    text = f"{_what(record)}, made with ckavg {__version__} without any further training."
    if record.scheme == "last":
        return text
    text += (
        "\nCheckpoints along a run differ by the noise of training, of which their average holds less. It loads and\n"
        "runs like any of them."
    )
    base = metadata.get("base_model")
    if repository:
        text += f" The checkpoints are those of [`{repository}`](https://huggingface.co/{repository})."
    if isinstance(base, str) and is_hub_id(base) and base != repository:
        text += f" The run began with [`{base}`](https://huggingface.co/{base})."
    told = about(scheme)
    return f"{text}\n\n{told}" if told else text


def _what(record: Averaged) -> str:
    step, last = record.outputs[-1].step, record.steps[-1]
    taken = [each for each, weight in zip(record.steps, record.weights, strict=True) if weight]
    if len(taken) == 1:
        return f"The checkpoint of step {taken[0]} of a training run"
    what = f"The average of {len(taken)} checkpoints of one training run, from step {taken[0]} to step\n{step}"
    return what if step == last else f"{what}, as it stood on the way to step {last}"


def _evaluation(record: Averaged, level: str) -> str:
    """What the user's own command said; in words alone, since nothing tells which metric it is, and on which data."""
    told = record.evaluation
    if told is None or told.value is None:
        return ""
    of_weights = "with the directory of these weights in the place of `{dir}`"
    return (
        f"{level}# Evaluation\n\nThis command, {of_weights}, printed **{told.value:.10g}**:\n\n"
        f"    {_in_one_line(told.command)}"
    )


def _recipe(record: Averaged, scheme: Scheme) -> str:
    lines = [
        f"Scheme: {scheme.title}; {scheme.reference}",
        f"Hyper-parameters: {_parameters(record) or 'none'}",
        f"Anchor: step {record.anchor_step}; span: {record.span} optimizer steps{_path(record)}",
        f"Accumulated in {record.accumulate}, rounded once",
    ]
    if record.uncorrected:
        lines.append(f"Running statistics, averaged without the correction: {len(record.uncorrected)} tensors")
    if record.copied:
        lines.append(f"Copied from the last checkpoint, since not all have them: {len(record.copied)} tensors")
    return "\n".join(f"- {line}" for line in lines)


def _parameters(record: Averaged) -> str:
    return ", ".join(f"{name} = {value}" for name, value in record.parameters.items())


def _path(record: Averaged) -> str:
    if record.path_length is None:
        return ""
    told = f"; normalized path length ℓ(T) = {record.path_length[-1]:.4f}"
    if record.path_length_error is None:
        return told
    error = f"standard error {record.path_length_error[-1]:.4f}"
    return f"{told}, estimated from {100 * record.sample:g} % of each tensor, {error}"


def _table(record: Averaged) -> str:
    """Every checkpoint with its weight; of a long run the first and the last ones, and the sum of what is between."""
    columns = record.columns()
    rows = list(zip(*columns.values(), strict=True))
    told = ""
    if len(rows) > _MOST_ROWS:
        first, last = _FIRST_ROWS, len(rows) - (_MOST_ROWS - _FIRST_ROWS)
        between = sum(record.weights[first:last])
        rows[first:last] = [("…",) * len(columns)]
        told = (
            f"\n\n{last - first} checkpoints in the middle are not shown; together they have the weight {between:.4f}. "
            "`ckavg.json` lists all."
        )
    table = "\n".join(f"| {' | '.join(row)} |" for row in [tuple(columns), ("---:",) * len(columns), *rows])
    return table + told


def _again(record: Averaged, scheme: Scheme, metadata: Mapping[str, Any]) -> str:
    where = "" if is_address(record.source) else ", in their directory"
    text = f"From the same checkpoints{where}:\n\n    {reproduce(record, scheme)}"
    base = metadata.get("base_model")
    if "init" in record.selection and not is_address(record.selection["init"]):
        known = f", `{base}`" if isinstance(base, str) and is_hub_id(base) else ""
        text += f"\n\n`BASE_MODEL` is the directory of the model that the run began with{known}."
    return f"{text}\n\n`ckavg.json` holds the full record."


def _checks(record: Averaged) -> str:
    finite = (
        "- NaN and infinity in the checkpoints were let through; where they hold one, so do these weights."
        if record.allow_nonfinite
        else "- No checkpoint that was averaged holds NaN or infinity, and neither do these weights."
    )
    alike = "the tensors that were averaged" if record.copied else "the same tensors"
    return f"""- All checkpoints have {alike}, with the same shapes and dtypes.
{finite}
- `ckavg.json` states the SHA-256 of every other file here, and a checksum of every checkpoint as it was read.
  `ckavg verify .` compares; with `--replay`, where the checkpoints are at hand, it also computes elements of the
  average again."""


def _warnings(record: Averaged, level: str) -> str:
    told = [f"- {_escaped(warning)}" for warning in record.warnings]
    return "\n".join([f"{level}# Worth knowing", "", *told]) if told else ""


def _citation(scheme: Scheme, level: str) -> str:
    bibtex = citations(scheme)
    return f"{level}# Citation\n\n```bibtex\n{bibtex}\n```" if bibtex else ""


def _escaped(text: str) -> str:
    """A text in one line of Markdown, in which nothing of it has a meaning."""
    return _MARKUP.sub(r"\\\g<0>", _in_one_line(text))


def _in_one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
