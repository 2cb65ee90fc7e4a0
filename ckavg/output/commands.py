"""Command lines that people type: what loads a result, and what forms it again. Pure."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckavg.output.record import BASE_MODEL, Record, is_address
from ckavg.output.side_files import CONFIG, PIPELINE_CONFIG, read_config
from ckavg.schemes import Scheme

_ADAPTERS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
"""The class that loads an adapter with its base model, by the task in its config."""

_VARIANT = re.compile(r"(?:.*/)?(?:diffusion_pytorch_)?model\.(\w+)(?:-\d+-of-\d+)?\.safetensors", re.ASCII)
"""The names of weights that loaders take where their variant is named, such as `model.fp16.safetensors`."""


def as_options(settings: Mapping[str, object]) -> str:
    """The options that state these settings; one with several values is repeated, and a switch that is on has none.

    >>> as_options({"gamma": 0.15, "from_step": 100, "path_exclude": ("lm_head.*", "b")})
    "--gamma 0.15 --from-step 100 --path-exclude 'lm_head.*' --path-exclude b"
    >>> as_options({"common_only": True})
    '--common-only'
    """
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if each is True else f" {shell_word(str(each))}")
        for name, value in settings.items()
        for each in (value if isinstance(value, tuple) else (value,))
    )


def shell_word(text: str) -> str:
    r"""The text as a word of a shell's command line, in one line and without a character that a terminal would obey.

    >>> print(shell_word("run"), shell_word("my run"), shell_word("a\nb's"))
    run 'my run' $'a\nb\'s'
    """
    if text.isprintable():
        return shlex.quote(text)
    octal = {char: "".join(f"\\{byte:03o}" for byte in os.fsencode(char)) for char in text if not char.isprintable()}
    octal |= {"\n": "\\n", "\\": r"\\", "'": r"\'"}
    return f"$'{''.join(octal.get(char, char) for char in text)}'"


def reproduce(record: Record, scheme: Scheme) -> str:
    """The command line that forms the same average; in the directory of the checkpoints, if they have no address."""
    settings: dict[str, object] = {**scheme.stated, **record.selection}
    settings.pop("every_from", None)  # follows from --burn-in
    if "init" in settings and not is_address(settings["init"]):
        settings["init"] = BASE_MODEL  # a local path, and nobody else's
    snapshot = record.output.step if record.output.step < record.steps[-1] else None
    measured = record.path_length is not None
    others: dict[str, tuple[object, object]] = {
        "dtype": (record.dtype, "source"),
        "accumulate": (record.accumulate, "float32"),
        "allow_nonfinite": (record.allow_nonfinite, False),
        "allow_anchor": (record.is_mostly_anchor, False),
        "snapshot_every": (snapshot, None),
        "lora": (record.lora, "factors"),
        "rank": (record.rank, None),
        "sample": (record.sample, 1),
        "path_exclude": (record.path_exclude if measured else (), ()),
        "zero_sigma": (record.zero_sigma if measured else "exclude", "exclude"),
    }
    settings |= {name: value for name, (value, default) in others.items() if value != default}
    source = f" {shell_word(str(record.source))}" if is_address(record.source) else ""
    return f"ckavg {record.scheme}{source} {as_options(settings)}".rstrip()


def load_command(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    """A command line that loads a result.

    `files` are its small files by relative path; `weights` the names of the others, those of the largest part first.
    """
    return f"python -c {shell_word(_code(directory, files, weights))}"


def _code(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    if PIPELINE_CONFIG in files:
        return _from_pretrained("diffusers", "DiffusionPipeline", directory, _variant(weights[0]))
    if "modules.json" in files:
        stated = read_config(files, "config_sentence_transformers.json").get("model_type")
        name = stated if _is_class(stated) else "SentenceTransformer"  # as its loader has it
        return f"from sentence_transformers import {name} as M; M({_string(directory)})"
    for weight in weights:
        folder, variant = weight.rpartition("/")[0], _variant(weight)
        place, prefix = directory / folder, f"{folder}/" if folder else ""
        adapter = read_config(files, f"{prefix}adapter_config.json")
        config = read_config(files, f"{prefix}{CONFIG}") if f"{prefix}{CONFIG}" in files else {}
        if "peft_type" in adapter:
            return _load_adapter(place, adapter)
        if _is_class(config.get("_class_name")):
            return _from_pretrained("diffusers", config["_class_name"], place, variant)
        if "model_type" in config:
            return _load_transformers(place, config, variant)
    first = directory / weights[0]
    if len(weights) == 1 or f"{weights[0]}.index.json" in files:
        return f"from safetensors.torch import load_file as f; f({_string(first)})"
    glob = f'Path({_string(first.parent)}).glob("*.safetensors")'
    return f"from pathlib import Path; from safetensors.torch import load_file as f; [f(p) for p in {glob}]"


def _load_adapter(place: Path, config: Mapping[str, Any]) -> str:
    name = _ADAPTERS.get(str(config.get("task_type")), "AutoPeftModel" if config.get("auto_mapping") else "")
    if not name or not config.get("base_model_name_or_path"):  # no class knows the model that it is an adapter to
        return f"from peft.utils import load_peft_weights as f; f({_string(place)})"
    return _from_pretrained("peft", name, place)


def _load_transformers(place: Path, config: Mapping[str, Any], variant: str) -> str:
    own, named = config.get("auto_map"), config.get("architectures")
    if isinstance(own, dict):
        name = next((key for key in own if key.startswith("AutoModelFor") and _is_class(key)), "AutoModel")
        return _from_pretrained("transformers", name, place, f"{variant}, trust_remote_code=True")
    name = named[0] if isinstance(named, list) and named and _is_class(named[0]) else "AutoModel"
    return _from_pretrained("transformers", name, place, variant)


def _variant(weight: str) -> str:
    found = _VARIANT.fullmatch(weight)
    return "" if found is None else f', variant="{found[1]}"'


def _from_pretrained(library: str, name: str, place: Path, more: str = "") -> str:
    return f"from {library} import {name} as M; M.from_pretrained({_string(place)}{more})"


def _is_class(name: object) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier()


def _string(path: Path) -> str:
    """As a string in Python's own notation, which is JSON's as long as no byte of it is no text."""
    return json.dumps(str(path), ensure_ascii=not str(path).isprintable())
