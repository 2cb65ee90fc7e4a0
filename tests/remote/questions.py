"""What a reader of the Hub asks, one question for each stage that can go wrong; with the client's own calls."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import HfApi, HfFileSystem

REPO = "lab/run"
FILE = "model.safetensors"

ASK: dict[str, Callable[[HfApi], object]] = {
    "info": lambda api: api.repo_info(REPO, revision="step10"),
    "refs": lambda api: api.list_repo_refs(REPO),
    "list": lambda api: list(api.list_repo_tree(REPO, revision="step10")),
    "look": lambda api: api.get_paths_info(REPO, FILE, revision="step10"),
    "head": lambda api: api.get_hf_file_metadata(url=f"{api.endpoint}/{REPO}/resolve/step10/{FILE}"),
    "resolve": lambda api: HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True).cat_file(
        f"{REPO}@step10/config.json", start=0, end=4
    ),
    "fetch": lambda api: HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True).cat_file(
        f"{REPO}@step10/{FILE}", start=0, end=4
    ),
}
