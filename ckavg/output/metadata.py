"""Stage *write*: what the Hugging Face Hub calls a model, from its configs. Pure; silent where it is not certain."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

RELATIONS = ("adapter", "finetune", "merge")
"""How a model may be related to its base model, but for `quantized`: such weights are not averaged."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}
"""The task of an architecture, by the end of its name. Not there: those that stand for several tasks, such as
`ForConditionalGeneration`, and `ForSequenceClassification`, which reward models have, too."""

_ADAPTER_TASKS = {
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_TEXT_TO_IMAGE = frozenset(
    {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"}
)

_LICENSES = (
    (
        "apache-2.0",
        "Apache License",
        "END OF TERMS",
        "d5e4c8942091934e8f11f49efe6055366918b8034549dbfffc2e71a2c4f5de32",
    ),
    ("mit", "Permission is hereby", "", "fe2a9817987f862eaced948f0468c7f51d2fedfc48c5c505b246a49a3870e9a5"),
)
"""Identifier, the words with which the terms begin and before which they end, and their SHA-256, each word apart by one
space."""

_APPENDIX = "END OF TERMS AND CONDITIONS APPENDIX: How to apply the Apache License to your work."
_APPENDIX_CHARACTERS, _TITLE_CHARACTERS = 1_400, 300


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a repository on the Hub, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def library_of(config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> str:
    """The library that loads a model; empty where the configs do not tell.

    >>> library_of({"model_type": "llama"}, {})
    'transformers'
    """
    if adapter_config:
        return "peft"
    if "_diffusers_version" in config:
        return "diffusers"
    return "transformers" if "model_type" in config else ""


def pipeline_of(config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> str:
    """The task of a model, in the Hub's words; empty where its configs leave a doubt.

    >>> pipeline_of({"architectures": ["LlamaForCausalLM"]}, {}), pipeline_of({"architectures": ["T5Model"]}, {})
    ('text-generation', '')
    """
    if adapter_config:
        return _ADAPTER_TASKS.get(str(adapter_config.get("task_type")), "")
    if config.get("_class_name") in _TEXT_TO_IMAGE:
        return "text-to-image"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        return ""
    (name,) = architectures
    return next((task for end, task in _TASKS.items() if name.isidentifier() and name.endswith(end)), "")


def license_of_text(text: str) -> str:
    """The identifier of a licence that is given in full and alone; empty for all but the two most common ones."""
    words = " ".join(text.split())
    for name, begin, end, digest in _LICENSES:
        before, found, terms = words.partition(begin)
        terms, _, after = (found + terms).partition(end) if end else (found + terms, "", "")
        rest = end + after
        whole = len(before) < _TITLE_CHARACTERS and (
            not end or rest == _APPENDIX.partition(" APPENDIX")[0] or rest.startswith(_APPENDIX)
        )
        if whole and len(rest) < _APPENDIX_CHARACTERS and hashlib.sha256(terms.encode()).hexdigest() == digest:
            return name
    return ""


def related(metadata: Mapping[str, Any], *, is_adapter: bool) -> dict[str, Any]:
    """The fields with the relation to the base model, where there is one and it is not stated.

    The Hub calls a merge what was made of several models, each of them a base model. The checkpoints of one run have
    one base model between them, and none of them is a model of its own: their average stands where the run's last
    checkpoint would, as a fine-tune of that model, or as an adapter to it.
    """
    base = metadata.get("base_model")
    if not isinstance(base, str) or "base_model_relation" in metadata:
        return dict(metadata)
    relation = {"base_model_relation": "adapter" if is_adapter else "finetune"}
    return {"base_model": base, **relation, **metadata}
