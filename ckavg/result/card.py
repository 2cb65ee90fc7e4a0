"""Stage *write*: the model card of a result, in the form the Hugging Face Hub reads. Pure: from the record to text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ckavg.result.command import as_options
from ckavg.result.record import Averaged
from ckavg.schemes import Scheme
from ckavg.version import __version__

_MARKUP = re.compile(r"[\\`*\[\]<>&|]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def write_card(record: Averaged, scheme: Scheme, config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> str:
    """The text of `README.md`: metadata, what this is, how it was made, and the weight of every checkpoint.

    Args:
        record: what was done.
        scheme: how.
        config: `config.json` of the model; empty where there is none.
        adapter_config: `adapter_config.json`; empty for a whole model.
    """
    base = adapter_config.get("base_model_name_or_path") or config.get("_name_or_path")
    metadata: dict[str, Any] = {}
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        metadata["base_model"] = base
    if adapter_config:
        metadata["library_name"] = "peft"
    elif "_diffusers_version" in config:
        metadata["library_name"] = "diffusers"
    elif "model_type" in config:
        metadata["library_name"] = "transformers"
    metadata["tags"] = ["checkpoint-averaging", record.scheme]
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    return f"""---
{front}
---

# {_heading(record.outputs[-1].name)}

{_what(record)}, made with ckavg {__version__} without any further training.

- Scheme: {scheme.title}; {scheme.reference}
- Hyper-parameters: {_parameters(record) or "none"}
- Anchor: step {record.anchor_step}; span: {record.span} optimizer steps{_path(record)}
- Accumulated in {record.accumulate}, rounded once

{_table(record)}

To make it again from the same checkpoints:

    {reproduce(record, scheme)}

`ckavg.json` holds the full record.
"""


def reproduce(record: Averaged, scheme: Scheme) -> str:
    """The command line that forms the same average, in the directory of the checkpoints."""
    settings: dict[str, object] = {**scheme.stated, **record.selection}
    settings.pop("every_from", None)  # follows from --burn-in
    if "init" in settings:
        settings["init"] = "BASE_MODEL"  # a local path, and nobody else's
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
    return f"ckavg {record.scheme} {as_options(settings)}".rstrip()


def _heading(name: str) -> str:
    """A name in one line of Markdown, in which nothing of it has a meaning."""
    return _MARKUP.sub(r"\\\g<0>", name if name.isprintable() else json.dumps(name)[1:-1])


def _what(record: Averaged) -> str:
    step, (first, *_, last) = record.outputs[-1].step, record.steps
    count = sum(each <= step for each in record.steps)
    what = f"The average of {count} checkpoints of one training run, from step {first} to step\n{step}"
    return what if step == last else f"{what}, as it stood on the way to step {last}"


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
    columns = record.columns()
    rows = [tuple(columns), ("---:",) * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
