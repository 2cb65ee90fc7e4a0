"""Python code that loads a result with the library that knows it: a line for the shell, and an example for the card.

Pure: the small files beside the weights say what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckavg.output.commands import shell_word
from ckavg.output.side_files import CONFIG, PIPELINE_CONFIG, read_config

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
"""Weight files that a loader finds only by the name of their variant, such as `model.fp16.safetensors`."""

_GENERATE = 'print(run("Once upon a time", max_new_tokens=40)[0]["generated_text"])'
_CHAT = """\
messages = [{"role": "user", "content": "Tell me a story."}]
print(run(messages, max_new_tokens=40)[0]["generated_text"][-1]["content"])"""
_TEXT_TASKS = {
    "ForCausalLM": ("text-generation", _GENERATE),
    "LMHeadModel": ("text-generation", _GENERATE),
    "ForMaskedLM": ("fill-mask", 'print(run(f"Paris is the {run.tokenizer.mask_token} of France."))'),
    "ForSequenceClassification": ("text-classification", 'print(run("I liked this film."))'),
    "ForTokenClassification": ("token-classification", 'print(run("Ada Lovelace lived in London."))'),
}
"""The pipeline of transformers and a call of it, by the end of a model's class."""

_ENCODERS = {
    "SentenceTransformer": """\
embeddings = model.encode(["The weather is lovely today.", "It is sunny outside."])
print(model.similarity(embeddings, embeddings))""",
    "SparseEncoder": """\
embeddings = model.encode(["The weather is lovely today.", "It is sunny outside."])
print(model.similarity(embeddings, embeddings))""",
    "CrossEncoder": 'print(model.predict([("How is the weather?", "It is sunny outside.")]))',
}
"""A use of each class of sentence-transformers."""

_IMAGE_CALLS = {
    re.compile("(StableDiffusion(XL|3)?|Flux|PixArt(Alpha|Sigma)|Sana)Pipeline"): '"a photo of a cat"',
    re.compile("DD[PI]MPipeline"): "",
}
"""What pipelines of diffusers that make images from a prompt, or from noise alone, are called with."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
_COUNT = 'print(f"{model.num_parameters():,} parameters")'


@dataclass(frozen=True, slots=True)
class _Loader:
    """The class that loads the weights.

    Attributes:
        library: the module that has it.
        name: of the class, or of a function of a path.
        folder: where in the result its files are; empty for the result itself.
        arguments: further ones of `from_pretrained`, each after a comma.
        call: what of the class takes the path; empty where the class itself does.
    """

    library: str
    name: str
    folder: str = ""
    arguments: str = ""
    call: str = ".from_pretrained"


def load_command(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    """A command line that loads a result.

    Args:
        directory: of the result.
        files: its small files by relative path.
        weights: the names of its weight files, those of the largest part first.
    """
    return f"python -c {shell_word(_one_line(directory, files, weights))}"


def _one_line(directory: Path, files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    loader = _find_loader(files, weights)
    if loader is not None:
        place = _string(directory / loader.folder)
        return f"from {loader.library} import {loader.name} as M; M{loader.call}({place}{loader.arguments})"
    first = directory / weights[0]
    if len(weights) == 1 or f"{weights[0]}.index.json" in files:
        return f"from safetensors.torch import load_file as f; f({_string(first)})"
    glob = f'Path({_string(first.parent)}).glob("*.safetensors")'
    return f"from pathlib import Path; from safetensors.torch import load_file as f; [f(p) for p in {glob}]"


def example(files: Mapping[str, bytes], weights: Sequence[str]) -> str:
    """Python code that loads a result from the current directory and, where its small files tell how, uses it.

    Args:
        files, weights: as of `load_command`.
    """
    loader = _find_loader(files, weights)
    if loader is None:
        return _use_timm() if is_timm(read_config(files)) else _use_tensors(weights)
    place = f"{_string(Path(loader.folder))}{loader.arguments}"
    load = f"from {loader.library} import {loader.name}\n\nmodel = {loader.name}{loader.call}({place})\n"
    if loader.library == "sentence_transformers":
        return load + _ENCODERS.get(loader.name, "print(model)")
    if loader.library == "diffusers":
        return _use_diffusers(files, loader, load, place)
    if loader.library.startswith("peft"):
        return _use_adapter(files, loader, load, place)
    return _use_transformers(files, loader, place) or load + _COUNT


def _use_transformers(files: Mapping[str, bytes], loader: _Loader, place: str) -> str:
    """By the pipeline of the model's task; empty where the task or its tokenizer is not known."""
    config = read_config(files, f"{loader.folder}/{CONFIG}".lstrip("/"))
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else loader.name
    task, call = next((each for end, each in _TEXT_TASKS.items() if str(name).endswith(end)), ("", ""))
    if not (task and _has_tokenizer(files, loader.folder)) or "variant" in loader.arguments:
        return ""
    if call == _GENERATE and _has_chat_template(files, loader.folder):
        call = _CHAT
    return f'from transformers import pipeline\n\nrun = pipeline("{task}", model={place})\n{call}'


def _use_adapter(files: Mapping[str, bytes], loader: _Loader, load: str, place: str) -> str:
    if not loader.call:
        return f"{load}# On the base model: PeftModel.from_pretrained(base_model, {place})"
    load = load.rstrip("\n") + "  # loads the base model, too\n"
    if loader.name != "AutoPeftModelForCausalLM":
        return load.rstrip("\n")
    tokenizer = place if _has_tokenizer(files, loader.folder) else "model.active_peft_config.base_model_name_or_path"
    return f"""\
from transformers import AutoTokenizer
{load}tokenizer = AutoTokenizer.from_pretrained({tokenizer})
inputs = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""


def _use_diffusers(files: Mapping[str, bytes], loader: _Loader, load: str, place: str) -> str:
    if loader.name != "DiffusionPipeline":
        return load + _COUNT
    name = str(read_config(files, PIPELINE_CONFIG).get("_class_name"))
    prompts = [prompt for pattern, prompt in _IMAGE_CALLS.items() if pattern.fullmatch(name)]
    use = f'run({prompts[0]}).images[0].save("sample.png")' if prompts else "print(run)"
    return f"from diffusers import DiffusionPipeline\n\nrun = DiffusionPipeline.from_pretrained({place})\n{use}"


def _use_timm() -> str:
    return """\
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()
images = torch.zeros(1, *model.pretrained_cfg["input_size"])
print(model(images).shape)"""


def _use_tensors(weights: Sequence[str]) -> str:
    first = Path(weights[0])
    if len(weights) == 1:
        imports, load = "", f"weights = load_file({_string(first)})"
    else:
        imports, glob = "from pathlib import Path\n\n", f'Path({_string(first.parent)}).glob("*.safetensors")'
        load = f"weights = {{name: tensor for file in {glob} for name, tensor in load_file(file).items()}}"
    is_lora = first.name == "pytorch_lora_weights.safetensors"
    into = (
        'In a pipeline of diffusers: pipeline.load_lora_weights(".")' if is_lora else "model.load_state_dict(weights)"
    )
    count = 'print(f"{sum(tensor.numel() for tensor in weights.values()):,} parameters")'
    return f"{imports}from safetensors.torch import load_file\n\n{load}\n{count}\n# {into}"


def _has_tokenizer(files: Mapping[str, bytes], folder: str) -> bool:
    return any(f"{folder}/{name}".lstrip("/") in files for name in _TOKENIZERS)


def _has_chat_template(files: Mapping[str, bytes], folder: str) -> bool:
    prefix = f"{folder}/" if folder else ""
    return f"{prefix}chat_template.jinja" in files or "chat_template" in read_config(
        files, f"{prefix}tokenizer_config.json"
    )


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of timm."""
    return isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), dict)


def _find_loader(files: Mapping[str, bytes], weights: Sequence[str]) -> _Loader | None:
    """The class that the small files name; None where they name none."""
    if PIPELINE_CONFIG in files:
        return _Loader("diffusers", "DiffusionPipeline", arguments=_variant(weights[0]))
    if "modules.json" in files:
        stated = read_config(files, "config_sentence_transformers.json").get("model_type")
        name = str(stated) if _is_class(stated) else "SentenceTransformer"  # as its loader has it
        return _Loader("sentence_transformers", name, call="")
    for weight in weights:
        folder, variant = weight.rpartition("/")[0], _variant(weight)
        prefix = f"{folder}/" if folder else ""
        adapter = read_config(files, f"{prefix}adapter_config.json")
        config = read_config(files, f"{prefix}{CONFIG}") if f"{prefix}{CONFIG}" in files else {}
        if "peft_type" in adapter:
            return _adapter_loader(folder, adapter)
        if _is_class(config.get("_class_name")):
            return _Loader("diffusers", config["_class_name"], folder, variant)
        if "model_type" in config:
            return _transformers_loader(folder, config, variant)
    return None


def _adapter_loader(folder: str, config: Mapping[str, Any]) -> _Loader:
    name = _ADAPTERS.get(str(config.get("task_type")), "AutoPeftModel" if config.get("auto_mapping") else "")
    if not name or not config.get("base_model_name_or_path"):  # no class knows the model that it is an adapter to
        return _Loader("peft.utils", "load_peft_weights", folder, call="")
    return _Loader("peft", name, folder)


def _transformers_loader(folder: str, config: Mapping[str, Any], variant: str) -> _Loader:
    own, named = config.get("auto_map"), config.get("architectures")
    if isinstance(own, dict):
        name = next((key for key in own if key.startswith("AutoModelFor") and _is_class(key)), "AutoModel")
        return _Loader("transformers", name, folder, f"{variant}, trust_remote_code=True")
    name = named[0] if isinstance(named, list) and named and _is_class(named[0]) else "AutoModel"
    return _Loader("transformers", name, folder, variant)


def _variant(weight: str) -> str:
    found = _VARIANT.fullmatch(weight)
    return "" if found is None else f', variant="{found[1]}"'


def _is_class(name: object) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier()


def _string(path: Path) -> str:
    """As a string in Python's own notation, which is JSON's as long as every byte of it is text."""
    return json.dumps(str(path), ensure_ascii=not str(path).isprintable())
