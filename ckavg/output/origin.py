"""Where a run comes from: its own card, its licence, its base model, and the card that the user wrote.

Reads small files only, and trusts none of them. What a card states about the last checkpoint also holds for the
average, except measurements: evaluation results are not copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckavg.checkpoints.run import Run
from ckavg.errors import ReadError, SettingError
from ckavg.output.loading import is_timm
from ckavg.output.output_path import CARD
from ckavg.output.side_files import read_config
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import Bounds, problem_with, read_small, storage_of

_MOST_BYTES = 4_000_000
_MOST_CHARACTERS = 1_000_000
"""Limit on the length of front matter."""

_DEEPEST = 32
_MOST_LISTED, _LONGEST = 50, 200

_BLOCK = re.compile(r"\A\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_OPENS = re.compile(r"\A\s*---[ \t]*\n")
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:[@/].*)?", re.ASCII)
_IN_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_LISTS = {
    "language": re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual"),
    "datasets": re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII),
    "tags": re.compile(r"(?!base_model:)[A-Za-z0-9][\w.+-]*(?::[\w.+-]+)*(?:[:][\w.-]+/[\w.-]+)?", re.ASCII),
    "base_model": _HUB_ID,
}
_TEXTS = {
    "pipeline_tag": re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*"),
    "base_model_relation": re.compile(r"adapter|finetune|merge"),  # `quantized` weights are not averaged
    "license": re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*"),
    "license_name": re.compile(r"[A-Za-z0-9][\w. -]*", re.ASCII),
    "license_link": re.compile(r"https?://[^\s<>\"'\\]+|LICENSE(?:\.md)?", re.ASCII),
}
"""The fields of a run's card that also hold for its average, and the form that the Hub expects of their values."""

_LICENSE_FIELDS = ("license", "license_name", "license_link")
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
    "StableDiffusionPipeline": "text-to-image",
    "StableDiffusionXLPipeline": "text-to-image",
    "StableDiffusion3Pipeline": "text-to-image",
    "FluxPipeline": "text-to-image",
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The task of an architecture, pipeline or adapter, by the end of its name. Ambiguous ones are left out:
`ForConditionalGeneration` has several tasks, and reward models also use `ForSequenceClassification`."""

_LICENSE_FILES = ("LICENSE", "LICENSE.md")


@dataclass(frozen=True, slots=True)
class Card:
    """A model card in two parts: the fields of its front matter, by name, and the Markdown below."""

    metadata: Mapping[str, Any]
    text: str


@dataclass(frozen=True, slots=True)
class Origin:
    """What a card says besides the recipe.

    Attributes:
        metadata: fields for the Hub, from the run's configs, its own card and its licence; without ckavg's tags.
        own: the card that the user wrote for the result, if any.
        is_adapter: whether the weights are those of an adapter.
        repository: the repository on the Hub that the checkpoints come from; empty for other sources.
        warnings: for the user.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    own: Card | None = None
    is_adapter: bool = False
    repository: str = ""
    warnings: tuple[str, ...] = ()


def find_origin(run: Run, side_files: Mapping[str, bytes], card: Path | str | None = None) -> Origin:
    """Gather what the card of a result says about the run.

    Args:
        run: the checkpoints.
        side_files: the files copied beside the weights, by relative path.
        card: a Markdown file by the user, whose fields and text come first; or None.

    Raises:
        ReadError: `card` cannot be read.
        SettingError: its front matter is not valid.
    """
    own = None if card is None else _read_own(Path(card))
    config, adapter = read_config(side_files), read_config(side_files, "adapter_config.json")
    warnings: list[str] = []
    of_trainer = [(run.last.directory, run.named(run.last)), (run.source, run.source)]  # where trainers save theirs
    inherited = _inherited(_first_card(of_trainer, warnings), run)
    if "license" not in inherited and run.anchor_is_init:
        init = run.checkpoints[0]
        of_init = _inherited(_first_card([(init.directory, run.named(init))], warnings), run)
        inherited |= {name: of_init[name] for name in _LICENSE_FIELDS if name in of_init}
    file = next((name for name in _LICENSE_FILES if name in side_files), None)
    if "license" not in inherited and file is not None:
        inherited |= {"license": "other", "license_link": file}
    base = _base_model(run, config, adapter, inherited.pop("base_model", []))
    relation = inherited.pop("base_model_relation", None)
    repository = _repository(str(run.source))
    if not base:
        base, relation = repository, "merge" if repository else None
    elif adapter:
        relation = None
    found = {
        "base_model": base,
        "base_model_relation": relation,
        "library_name": _library_of(side_files, config, adapter),
        "pipeline_tag": pipeline_of(config, adapter),
    }
    found |= {name: inherited.get(name) for name in _LICENSE_FIELDS}
    metadata = {name: value for name, value in found.items() if value} | inherited
    return Origin(metadata, own, bool(adapter), repository, tuple(dict.fromkeys(warnings)))


def parse_card(content: bytes) -> Card:
    """The front matter and the text of a Markdown file.

    Args:
        content: the file, in UTF-8.

    Raises:
        ValueError: it is not text, or its front matter is not a mapping of plain values; the message says which.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    found = _BLOCK.match(text)
    if found is None:
        if _OPENS.match(text):
            raise ValueError("its front matter has no closing ---")
        return Card({}, text)
    return Card(_parsed(found[1] or ""), text[found.end() :])


def _parsed(block: str) -> dict[str, Any]:
    import yaml  # slow to import, and most runs have no card

    if len(block) > _MOST_CHARACTERS:
        raise ValueError(f"its front matter is longer than {_MOST_CHARACTERS:,} characters")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the parser in C, if available: ten times as fast
    try:
        depth = 0
        for event in yaml.parse(block, Loader=loader):
            if isinstance(event, yaml.AliasEvent):  # a few aliases can expand to more values than memory holds
                raise ValueError("its front matter uses an alias (*name), which is not supported")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"its front matter is nested more than {_DEEPEST} deep")
        _check_keys(yaml.compose(block, Loader=loader))
        parsed = yaml.load(block, Loader=loader)  # noqa: S506 - one of the two safe ones
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 2})" if mark is not None else ""
        raise ValueError(f"its front matter is not valid YAML{where}") from error
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError("its front matter has an invalid value") from error
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise ValueError("its front matter is not a mapping of fields to values")
    return parsed


def _check_keys(node: Any) -> None:
    """Refuse a field that is stated twice: parsers differ in which of the two they take."""
    values = node.value if node is not None and not isinstance(node.value, str) else []
    if node is not None and node.id == "mapping":
        keys = [key.value for key, _ in values if isinstance(key.value, str)]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise ValueError(f"its front matter states {twice!r} twice")
        values = [value for _, value in values]
    for value in values:
        _check_keys(value)


def is_hub_id(name: str) -> bool:
    """Whether a name could be a repository id of the Hub, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def _library_of(side_files: Mapping[str, bytes], config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> str:
    if adapter_config:
        return "peft"
    if "modules.json" in side_files:
        return "sentence-transformers"
    if "_diffusers_version" in config:
        return "diffusers"
    if is_timm(config):
        return "timm"
    return "transformers" if "model_type" in config else ""


def pipeline_of(config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> str:
    """The task of a model in the Hub's terms; empty where its configs do not settle it.

    >>> pipeline_of({"architectures": ["LlamaForCausalLM"]}, {}), pipeline_of({"architectures": ["T5Model"]}, {})
    ('text-generation', '')
    """
    named = config.get("architectures")
    name = config.get("_class_name") or (named[0] if isinstance(named, list) and len(named) == 1 else None)
    name = adapter_config.get("task_type") if adapter_config else name
    if not isinstance(name, str) or not name.isidentifier():
        return ""
    return next((task for end, task in _TASKS.items() if name.endswith(end)), "")


def _read_own(path: Path) -> Card:
    try:
        content = read_small(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"card: {path} cannot be read: {why}.", hint="Give a Markdown file with --card.") from error
    try:
        card = parse_card(content)
        _check_written(card.metadata)
    except ValueError as error:
        raise SettingError(
            f"card: {path} is not a valid model card: {error}.",
            hint="Expected: fields between two lines of ---, such as 'license: mit', then any Markdown.",
        ) from error
    return card


def _check_written(metadata: Mapping[str, Any]) -> None:
    """Refuse fields that huggingface_hub cannot write, such as a `model-index` without metrics."""
    from huggingface_hub.repocard_data import ModelCardData  # slow to import

    try:
        ModelCardData(**metadata).to_yaml()
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        named = "model-index" if "model-index" in metadata else "front matter"
        raise ValueError(f"its {named} is not in the form that the Hub expects") from error


def _first_card(places: Sequence[tuple[AnyPath, AnyPath]], warnings: list[str]) -> Mapping[str, Any]:
    """The metadata of the first card that has any. A card that cannot be read is skipped with a warning.

    Args:
        places: directories, each with the directory that the user named, which no link may leave.
        warnings: to add to.
    """
    for directory, named in places:
        path = directory / CARD
        found = problem_with(path, Bounds.of(directory, named))
        if found is not None:
            warnings.append(f"The card of the run is not used. {found.message}")
            continue
        try:
            metadata = parse_card(storage_of(path).read_small(path, _MOST_BYTES)).metadata
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            warnings.append(f"The card {path} is not used: {why}.")
            continue
        if metadata:
            return metadata
    return {}


def _inherited(card: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The fields of the run's card that also hold for its average, if their values have the form the Hub expects."""
    found: dict[str, Any] = {}
    for name, pattern in _LISTS.items():
        values = [each for each in _texts(card.get(name)) if pattern.fullmatch(each)]
        if name == "datasets":
            values = [each for each in values if not _is_local(each, run)]
        if values:
            found[name] = values
    for name, pattern in _TEXTS.items():
        value = card.get(name)
        if isinstance(value, str) and len(value) <= _LONGEST and pattern.fullmatch(value):
            found[name] = value
    if "license" not in found:
        return {name: value for name, value in found.items() if name not in _LICENSE_FIELDS}
    return found


def _base_model(run: Run, config: Mapping[str, Any], adapter: Mapping[str, Any], of_card: list[str]) -> str | list[str]:
    """The base model on the Hub; empty where none is known. A name that is also a directory means the directory."""
    of_cache = ""
    if run.selection.init is not None:
        named = resolved(run.selection.init)
        cached = next((found for each in named.parts if (found := _IN_CACHE.fullmatch(each))), None)
        of_cache = f"{cached['owner']}/{cached['name']}" if cached else _repository(str(run.selection.init))
    of_configs = [adapter.get("base_model_name_or_path"), config.get("_name_or_path"), of_cache]
    known = [
        each if isinstance(each, str) and is_hub_id(each) and not _is_local(each, run) else "" for each in of_configs
    ]
    of_card = [each for each in of_card if not _is_local(each, run)]
    if of_card and not known[0]:
        return of_card[0] if len(of_card) == 1 else of_card
    return next(filter(None, known), "")


def _repository(address: str) -> str:
    """The repository of an address on the Hub; empty for any other address."""
    match = _ADDRESS.fullmatch(address)
    return match["repo"] if match else ""


def _is_local(name: str, run: Run) -> bool:
    """Whether a name is a path that exists here: `outputs/base` also looks like owner and name."""
    above = [Path()]
    if not isinstance(run.source, RemotePath):
        above += [run.source, run.source.parent]
    if not isinstance(run.last.directory, RemotePath):
        above.append(run.last.directory)
    return "/" in name and any((directory / name).exists() for directory in above)


def _texts(value: object) -> list[str]:
    """A text, or the texts of a list, without duplicates and at most 50."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(each for each in values if isinstance(each, str) and len(each) <= _LONGEST))[
        :_MOST_LISTED
    ]
