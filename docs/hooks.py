"""Hooks of mkdocs: pages from files beside docs/, and tables that the program generates."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.core import TyperGroup, TyperOption

from ckavg import errors
from ckavg.cli.app import app
from ckavg.cli.help import ALL
from ckavg.cli.verbs import Verb
from ckavg.output.record import Input, Output, Record, Seconds
from ckavg.schemes import SCHEMES

ROOT = Path(__file__).parent.parent
BESIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the repository."""

SHARED = "shared"
"""In a marker, the options that all averaging commands have."""

_MARKER = re.compile(r"^<!-- (options|errors|record)(?:: (\w+))? -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository."""
    for page, name in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the markers by what the program generates, and links to files that are not on the site by their text."""
    return without_examples(filled(markdown))


def without_examples(text: str) -> str:
    """A page in which links to `examples/`, which is not on the site, are plain text."""
    return re.sub(r"\[([^]]+)\]\((?:\.\./)?examples/[^)]*\)", r"\1", text)


def as_page(text: str) -> str:
    """A file of the repository with the links of the site."""
    text = without_examples(text)
    for page, name in BESIDE.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text.replace("](docs/", "](")


def filled(markdown: str) -> str:
    """A page with a table in the place of every `<!-- options: VERB -->`, `<!-- errors -->` and `<!-- record -->`."""

    def table(found: re.Match[str]) -> str:
        lines = {"options": _options, "errors": _errors, "record": _record}[found[1]](found[2])
        return "\n".join(lines)

    return _MARKER.sub(table, markdown)


def options(verb: str) -> dict[str, TyperOption]:
    """The options of a verb, by their names as they are typed, without the help."""
    command = cast(Verb, cast(TyperGroup, typer.main.get_command(app)).commands[verb])
    found = (each for each in command.load().params if isinstance(each, TyperOption) and ALL not in each.opts)
    return {", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts)): each for each in found}


def shared_options() -> dict[str, TyperOption]:
    """Those of every averaging command."""
    schemes = [options(scheme.name) for scheme in SCHEMES if scheme.has_verb]
    return {names: each for names, each in schemes[0].items() if all(names in others for others in schemes)}


def _errors(_: str) -> Iterator[str]:
    yield from ("| error | a kind of | meaning |", "|---|---|---|")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.CkavgError) and kind is not errors.CkavgError:
            meaning = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
            yield f"| `{name}` | `{kind.__bases__[0].__name__}` | {meaning} |"


def _record(_: str) -> Iterator[str]:
    yield from ("| key | meaning |", "|---|---|")
    parts = {"inputs": ("inputs[].", Input), "outputs": ("outputs[].", Output)}
    for name, meaning in _attributes(Record):
        prefix, kind = parts.get(name, ("", None))
        rows = [(prefix + inner, text) for inner, text in _attributes(kind)] if kind else [(name, meaning)]
        if name == "seconds":
            rows = [(f"seconds.{field.name}", meaning) for field in dataclasses.fields(Seconds)]
        yield from (f"| `{key}` | {text} |" for key, text in rows)


def _attributes(kind: type) -> list[tuple[str, str]]:
    """Names and meanings of the attributes in a docstring, None as JSON has it."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, flags=re.MULTILINE)
    return [(name, " ".join(text.split()).replace("None", "null")) for name, text in entries]


def _options(verb: str) -> Iterator[str]:
    shared = shared_options()
    if verb == SHARED:
        for panel in dict.fromkeys(each.rich_help_panel for each in shared.values()):
            yield from ("", f"**{panel}**", "")
            yield from _table((names, each) for names, each in shared.items() if each.rich_help_panel == panel)
        return
    own, known = options(verb), {names: str(each.help) for names, each in shared.items()}
    also = [names for names, each in own.items() if known.get(names) == each.help]
    rest = {names: each for names, each in own.items() if names not in also}
    if rest:
        yield from _table(rest.items())
    if len(also) == len(shared):
        yield from ("", "All [options of every averaging command](#options-of-every-averaging-command) apply.")
    elif also:
        yield from ("", f"As in the [averaging commands](#options-of-every-averaging-command): {', '.join(also)}.")


def _table(rows: Iterable[tuple[str, TyperOption]]) -> Iterator[str]:
    yield from ("| option | default | meaning |", "|---|---|---|")
    for names, each in rows:
        yield f"| {names} | {_default(each)} | {str(each.help).replace('|', chr(92) + '|')} |"


def _default(option: TyperOption) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if option.default is None or option.default is False:
        return "off" if option.is_flag else "none"
    return str(option.default)
