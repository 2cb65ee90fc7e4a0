"""Saved runs put on the Hub on loopback: each checkpoint a revision, or all of them as folders of one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from tests.hub.server import LARGE, Hub, Repo, Tree

BY_STEP = "step{step}"
BY_TOKENS = "stage1-step{step}-tokens{tokens}B"
REPO = "lab/run"
NOT_PUBLISHED = {"optimizer.pt", "trainer_state.json"}
"""Files that stay with whoever trained, where each checkpoint is published as a model of its own."""
OF_A_MODEL: Tree = {
    ".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False),
    "README.md": (b"---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# A model\n", False),
    "tokenizer_config.json": (b'{"model_max_length": 128}', False),
}


def tree_of(directory: Path, *, without: Sequence[str] = ()) -> Tree:
    """The files below a directory, as they lie in a repository; weights and whatever is large are large files."""
    tree: Tree = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in without:
            data = path.read_bytes()
            name = path.relative_to(directory).as_posix()
            tree[name] = data, path.suffix in (".safetensors", ".pt") or len(data) > LARGE
    return tree


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """The directories of a run with their steps, the number at the end of the name, in order."""
    found = [(re.search(r"(\d+)$", path.name), path) for path in run.iterdir() if path.is_dir()]
    return sorted((int(number[1]), path) for number, path in found if number)


def publish_revisions(
    hub: Hub, name: str, run: Path, *, called: str = BY_STEP, private: bool = False, tags: bool = False
) -> Repo:
    """Put each checkpoint of a run into a revision of one repository.

    Args:
        hub: where to.
        name: of the repository, which is made.
        run: a directory of checkpoints whose names end with their steps.
        called: the name of a revision; `{step}` and `{tokens}` (a tenth of the step) are filled in.
        private: who may see the repository.
        tags: whether the revisions are tags rather than branches.

    Returns:
        The repository. `main` leads to the last checkpoint, too.
    """
    repo = hub.add(name, private=private)
    for step, directory in checkpoints_of(run):
        revision = called.format(step=step, tokens=step // 10)
        files = OF_A_MODEL | tree_of(directory, without=tuple(NOT_PUBLISHED))
        oid = hub.put(repo, files, f"Upload {revision}", label=revision)
        (repo.tags if tags else repo.branches)[revision] = oid
        repo.branches["main"] = oid
    return repo


def publish_folders(hub: Hub, name: str, run: Path, *, revision: str = "main", private: bool = False) -> Repo:
    """Put a run into one revision of a repository as it lies in its directory: `checkpoint-10/…`, `checkpoint-20/…`."""
    repo = hub.add(name, private=private)
    files = {path: each for path, each in OF_A_MODEL.items() if path != "tokenizer_config.json"}
    repo.branches[revision] = hub.put(repo, files | tree_of(run), f"Upload to {revision}", label=revision)
    return repo


def weights(run: Path, step: int = 10) -> bytes:
    """The one weight file of a checkpoint."""
    return (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def digest_of(data: bytes) -> str:
    """The name of a large file in the storage."""
    return hashlib.sha256(data).hexdigest()
