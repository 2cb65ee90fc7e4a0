"""Stage *write*: the command that loads a result, with the class that its config names. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckavg.output.command import shell_word
from ckavg.output.side_files import PIPELINE_CONFIG, read_config

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


def load_command(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    """A command line that loads a result.

    Args:
        directory: of the result.
        files: content of its small files, by relative path.
        weights: its weight files by relative path, those of the largest part first.
    """
    return f"python -c {shell_word(_code(directory, files, weights))}"


def _code(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    if PIPELINE_CONFIG in files:
        return _from_pretrained("diffusers", "DiffusionPipeline", directory, _variant(weights[0]))
    if "modules.json" in files:
        stated = _object(files, "config_sentence_transformers.json").get("model_type")
        name = stated if _is_class(stated) else "SentenceTransformer"  # as its loader has it
        return f"from sentence_transformers import {name} as M; M({_string(directory)})"
    for weight in weights:
        folder, variant = weight.rpartition("/")[0], _variant(weight)
        place, prefix = directory / folder, f"{folder}/" if folder else ""
        adapter = _object(files, f"{prefix}adapter_config.json")
        if "peft_type" in adapter:
            return _of_adapter(place, adapter)
        config = _object(files, f"{prefix}config.json")
        if _is_class(config.get("_class_name")):
            return _from_pretrained("diffusers", config["_class_name"], place, variant)
        if "model_type" in config:
            return _of_transformers(place, config, variant)
    first = directory / weights[0]
    if len(weights) == 1 or f"{weights[0]}.index.json" in files:
        return f"from safetensors.torch import load_file as f; f({_string(first)})"
    glob = f'Path({_string(first.parent)}).glob("*.safetensors")'
    return f"from pathlib import Path; from safetensors.torch import load_file as f; [f(p) for p in {glob}]"


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return read_config(files, name) if name in files else {}


def _of_adapter(place: Path, config: Mapping[str, Any]) -> str:
    name = _ADAPTERS.get(str(config.get("task_type")))
    if name is None and config.get("auto_mapping"):
        name = "AutoPeftModel"
    if name is None or not config.get("base_model_name_or_path"):  # no class knows the model that it is an adapter to
        return f"from peft.utils import load_peft_weights as f; f({_string(place)})"
    return _from_pretrained("peft", name, place)


def _variant(weight: str) -> str:
    found = _VARIANT.fullmatch(weight)
    return "" if found is None else f', variant="{found[1]}"'


def _of_transformers(place: Path, config: Mapping[str, Any], variant: str) -> str:
    own = config.get("auto_map")
    if isinstance(own, dict):
        name = next((key for key in own if key.startswith("AutoModelFor") and _is_class(key)), "AutoModel")
        return _from_pretrained("transformers", name, place, f"{variant}, trust_remote_code=True")
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and architectures and _is_class(architectures[0])
    name = architectures[0] if named else "AutoModel"  # type: ignore[index]
    return _from_pretrained("transformers", name, place, variant)


def _from_pretrained(library: str, name: str, place: Path, more: str = "") -> str:
    return f"from {library} import {name} as M; M.from_pretrained({_string(place)}{more})"


def _is_class(name: object) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier()


def _string(path: Path) -> str:
    """As a string in Python's own notation, which is JSON's as long as no byte of it is no text."""
    return json.dumps(str(path), ensure_ascii=not str(path).isprintable())
