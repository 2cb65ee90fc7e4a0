"""Stage *write*: what is known of a run besides its weights: its own card, its licence, its base model.

Reads small files only. What a card says of the last checkpoint holds for an average of the same run, unless it was
measured: evaluation results are not taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.errors import ReadError, SettingError
from ckavg.output.front_matter import Card, parse_card
from ckavg.output.metadata import RELATIONS, is_hub_id, library_of, license_of_text, pipeline_of
from ckavg.output.side_files import read_config
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import Bounds, problem_with, storage_of
from ckavg.storage.untrusted import read_small

_CARD = "README.md"

_MOST_BYTES = 4_000_000
_LICENSES = ("LICENSE", "LICENSE.md")
_OF_LICENSE = ("license", "license_name", "license_link")
_TAG = re.compile(r"(?!base_model:)[A-Za-z0-9][\w.+-]*(?::[\w.+-]+)*(?:[:][\w.-]+/[\w.-]+)?", re.ASCII)
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
_PIPELINE_TAG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_LICENSE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_LICENSE_NAME = re.compile(r"[A-Za-z0-9][\w. -]*", re.ASCII)
_LINK = re.compile(r"https?://[^\s<>\"'\\]+|LICENSE(?:\.md)?", re.ASCII)
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:[@/].*)?", re.ASCII)
_IN_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_MOST_LISTED, _LONGEST = 50, 200


@dataclass(frozen=True, slots=True)
class Origin:
    """What a card can tell besides the recipe.

    Attributes:
        metadata: fields for the Hub, from the run's configs, its own card and its licence; without tags of ours.
        own: the card that the user wrote for the result; None where there is none.
        is_adapter: whether the weights are those of an adapter.
        repository: the repository on the Hub that the checkpoints come from; empty where they do not.
        warnings: what of it a user should know.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    own: Card | None = None
    is_adapter: bool = False
    repository: str = ""
    warnings: tuple[str, ...] = ()


def find_origin(run: Run, side_files: Mapping[str, bytes], card: Path | str | None = None) -> Origin:
    """Gather what the card of a result says of the run.

    Args:
        run: the checkpoints.
        side_files: what is copied beside the weights, by relative path.
        card: a Markdown file of the user's, whose fields and text come first; None: there is none.

    Raises:
        ReadError: `card` cannot be read.
        SettingError: its front matter is not valid, or a code block in it is never closed.
    """
    own = None if card is None else _read_own(Path(card))
    config, adapter = read_config(side_files), read_config(side_files, "adapter_config.json")
    warnings: list[str] = []
    of_run = _first_card(_places_of_run(run), warnings)
    inherited = _inherited(of_run, run)
    of_license = {key: inherited.pop(key) for key in _OF_LICENSE if key in inherited}
    if "license" not in of_license:
        init = run.checkpoints[0]
        of_init = _first_card([(init, run.named(init))], warnings) if run.anchor_is_init else {}
        of_license = _license(of_init) or _license_beside(side_files)
    base = _base_model(run, config, adapter, inherited.pop("base_model", None))
    relation = inherited.pop("base_model_relation", None)
    repository = _repository(str(run.source))
    metadata: dict[str, Any] = {}
    if base:
        metadata["base_model"] = base
        if relation and not adapter:
            metadata["base_model_relation"] = relation
    elif repository:
        metadata |= {"base_model": repository, "base_model_relation": "merge"}
    library, pipeline = library_of(config, adapter), pipeline_of(config, adapter)
    metadata |= {"library_name": library} if library else {}
    metadata |= {"pipeline_tag": pipeline} if pipeline else {}
    metadata |= of_license
    return Origin(metadata | inherited, own, bool(adapter), repository, tuple(dict.fromkeys(warnings)))


def _read_own(path: Path) -> Card:
    try:
        content = read_small(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"card: {path} cannot be read: {why}.", hint="Name a Markdown file with --card.") from error
    try:
        card = parse_card(content)
        _check_closed(card.text)
    except ValueError as error:
        raise SettingError(
            f"card: {path} is no model card that can be used: {error}.",
            hint="Between two lines of --- it may have fields, such as 'license: mit'; below them, any Markdown.",
        ) from error
    return card


def _check_closed(text: str) -> None:
    """Refuse a text with something in it that is never closed, and would take in what follows: code, or a comment."""
    from markdown_it import MarkdownIt  # takes a while, and most runs have no card

    *_, last = MarkdownIt().parse(f"{text}\n\n# End")
    if last.type != "heading_close":
        begun = last.map[0] + 1 if last.map else 1
        raise ValueError(f"the code block or HTML that begins in line {begun} of its text is never closed")


def _places_of_run(run: Run) -> list[tuple[Checkpoint | None, AnyPath]]:
    """Where a trainer saves its card: in the checkpoint, and in the directory above, beside the checkpoints."""
    return [(run.last, run.named(run.last)), (None, run.source)]


def _first_card(places: Sequence[tuple[Checkpoint | None, AnyPath]], warnings: list[str]) -> Mapping[str, Any]:
    """The metadata of the first card that has any; one that cannot be read is passed over with a warning."""
    for checkpoint, named in places:
        directory = checkpoint.directory if checkpoint is not None else named
        path = directory / _CARD
        found = problem_with(path, Bounds.of(directory, named))
        if found is not None:
            warnings.append(f"Nothing is taken over from the card of the run. {found.message}")
            continue
        try:
            metadata = parse_card(storage_of(path).read_small(path, _MOST_BYTES)).metadata
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            warnings.append(f"Nothing is taken over from the card {path}: {why}.")
            continue
        if metadata:
            return metadata
    return {}


def _inherited(card: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Those fields of the run's card that hold for its average, where their values are what the Hub expects.

    Whatever else there is, such as the path that a trainer gives for a data set, is left out.
    """
    lists = {
        "language": [each for each in _texts(card.get("language")) if _LANGUAGE.fullmatch(each)],
        "datasets": [
            each for each in _texts(card.get("datasets")) if _DATASET.fullmatch(each) and not _is_local(each, run)
        ],
        "tags": [each for each in _texts(card.get("tags")) if _TAG.fullmatch(each)],
        "base_model": [each for each in _texts(card.get("base_model")) if is_hub_id(each)],
    }
    metadata: dict[str, Any] = {name: values for name, values in lists.items() if values}
    task = card.get("pipeline_tag")
    if isinstance(task, str) and _PIPELINE_TAG.fullmatch(task):
        metadata["pipeline_tag"] = task
    if card.get("base_model_relation") in RELATIONS:
        metadata["base_model_relation"] = card["base_model_relation"]
    return metadata | _license(card)


def _license(card: Mapping[str, Any]) -> dict[str, Any]:
    values = dict.fromkeys(_OF_LICENSE, "") | {key: card.get(key) for key in _OF_LICENSE}
    license_, name, link = (
        value if isinstance(value, str) and len(value) <= _LONGEST else "" for value in values.values()
    )
    if not _LICENSE.fullmatch(license_):
        return {}
    found = {"license": license_}
    if _LICENSE_NAME.fullmatch(name):
        found["license_name"] = name
    if _LINK.fullmatch(link):
        found["license_link"] = link
    return found


def _license_beside(side_files: Mapping[str, bytes]) -> dict[str, Any]:
    """That of the licence file which is copied with the weights; `other`, with a link to it, where it is not known."""
    name = next((name for name in _LICENSES if name in side_files), None)
    if name is None:
        return {}
    known = license_of_text(side_files[name].decode(errors="replace"))
    return {"license": known} if known else {"license": "other", "license_link": name}


def _base_model(
    run: Run, config: Mapping[str, Any], adapter: Mapping[str, Any], stated: list[str] | None
) -> str | list[str]:
    """The base model on the Hub; empty where none is known. A directory of that name makes it no model of the Hub."""
    of_cache = ""
    if run.selection.init is not None:
        named = resolved(run.selection.init)
        cached = next((found for each in named.parts if (found := _IN_CACHE.fullmatch(each))), None)
        of_cache = f"{cached['owner']}/{cached['name']}" if cached else _repository(str(run.selection.init))
    of_card = [each for each in stated or [] if not _is_local(each, run)]
    candidates: Iterator[object] = iter((adapter.get("base_model_name_or_path"), config.get("_name_or_path"), of_cache))
    if adapter:
        first = next(candidates)
        if isinstance(first, str) and is_hub_id(first) and not _is_local(first, run):
            return first
    if of_card:
        return of_card[0] if len(of_card) == 1 else of_card
    for each in candidates:
        if isinstance(each, str) and is_hub_id(each) and not _is_local(each, run):
            return each
    return ""


def _repository(address: str) -> str:
    """The repository of an address on the Hub; empty for any other place."""
    match = _ADDRESS.fullmatch(address)
    return match["repo"] if match else ""


def _is_local(name: str, run: Run) -> bool:
    """Whether a name that could be one of the Hub leads to something here: `outputs/base` looks like owner and name."""
    above = [Path()]
    if not isinstance(run.source, RemotePath):
        above += [run.source, run.source.parent]
    if not isinstance(run.last.directory, RemotePath):
        above.append(run.last.directory)
    return "/" in name and any((directory / name).exists() for directory in above)


def _texts(value: object) -> list[str]:
    """A text, or the texts of a list, each once and a bounded number."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(each for each in values if isinstance(each, str) and len(each) <= _LONGEST))[
        :_MOST_LISTED
    ]
