"""What headers say besides tensors: carried over, and compared where it changes what the tensors mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ckavg
from ckavg.checkpoints.headers import read_header
from ckavg.errors import MismatchError
from tests.runs import write_checkpoint
from tests.trainers import put

STEPS = (10, 20, 30)


def write_run(root: Path, *headers: dict[str, str] | None) -> Path:
    for step, header in zip(STEPS, headers, strict=True):
        put(root / f"step_{step}.safetensors", {"w": torch.ones(4) * step}, header)
    return root


def header_of_mean(root: Path) -> dict[str, str]:
    result = ckavg.average(ckavg.open_run(root), ckavg.Mean())
    with safe_open(next(result.directory.glob("*.safetensors")), "pt") as file:
        return dict(file.metadata() or {})


@pytest.mark.parametrize("name", ["np", "pd", "flax", "mlx", "tf", "pt"])
def test_the_format_is_kept(tmp_path: Path, name: str) -> None:
    assert header_of_mean(write_run(tmp_path, *[{"format": name}] * 3)) == {"format": name}


def test_a_header_without_entries_gets_the_format_that_loaders_ask_for(tmp_path: Path) -> None:
    assert header_of_mean(write_run(tmp_path, None, None, None)) == {"format": "pt"}


def test_entries_of_any_kind_are_kept(tmp_path: Path) -> None:
    header = {"ß": 'ü\n"\\ \u2028', "empty": "", "long": "x" * 100_000, "ss_tag_frequency": json.dumps({"a": {"b": 1}})}
    assert header_of_mean(write_run(tmp_path, *[header] * 3)) == header


MEANING = (
    "lora_adapter_metadata", "ss_network_alpha", "ss_network_dim", "ss_network_module", "ss_network_args", "rank",
    "loraAlpha", "modelspec.architecture", "modelspec.prediction_type", "ss_base_model_version", "ss_sd_model_name",
    "ss_v2", "ss_v_parameterization", "adapter_config", "peft_config", "use_rslora", "target_modules", "quantization",
)  # fmt: skip


@pytest.mark.parametrize("key", MEANING)
@pytest.mark.parametrize("other", ["other", None], ids=("differs", "missing"))
@pytest.mark.parametrize("place", [0, 2])
def test_entries_that_change_the_meaning_may_not_differ(
    tmp_path: Path, key: str, other: str | None, place: int
) -> None:
    headers = [{key: "one", "format": "pt"} for _ in STEPS]
    headers[place] = {"format": "pt"} | ({} if other is None else {key: other})
    with pytest.raises(MismatchError, match=f"in the header of the weights, {key} is"):
        ckavg.open_run(write_run(tmp_path, *headers))


@pytest.mark.parametrize(
    "key",
    ["ss_steps", "ss_epoch", "ss_training_finished_at", "modelspec.date", "training_info", "ss_session_id",
     "ss_max_train_steps", "best_loss", "format"],
)  # fmt: skip
def test_what_changes_while_a_run_goes_on_is_that_of_the_last(tmp_path: Path, key: str) -> None:
    run = write_run(tmp_path, *({key: f"value {step}"} for step in STEPS))
    assert not any(key in each for each in ckavg.open_run(run).warnings)
    assert header_of_mean(run) == {key: "value 30"}


def test_other_entries_that_differ_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, *({"comment": f"value {step}"} for step in STEPS))
    assert any(
        "state different values of comment; the result has that of the last" in w for w in ckavg.open_run(run).warnings
    )
    assert header_of_mean(run) == {"comment": "value 30"}


def test_json_is_compared_by_what_it_says(tmp_path: Path) -> None:
    texts = ('{"a": 1, "b": 2}', '{"b":2,"a":1}', '{"a": 1.0, "b": 2}')
    run = write_run(tmp_path, *({"lora_adapter_metadata": text} for text in texts))
    assert header_of_mean(run) == {"lora_adapter_metadata": texts[-1]}


def test_hashes_of_the_content_go_and_those_of_the_base_stay(tmp_path: Path) -> None:
    headers = [
        {"modelspec.hash_sha256": f"0x{step}", "file_md5": f"{step}", "ss_new_sd_model_hash": "base"} for step in STEPS
    ]
    assert header_of_mean(write_run(tmp_path, *headers)) == {"ss_new_sd_model_hash": "base"}


def test_a_base_model_need_not_say_what_the_run_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *[{"ss_network_alpha": "2"}] * 3)
    base = put(tmp_path / "base.safetensors", {"w": torch.zeros(4)})
    assert ckavg.open_run(run, init=base).steps == (0, *STEPS)
    put(base, {"w": torch.zeros(4)}, {"ss_network_alpha": "4"})
    with pytest.raises(MismatchError, match="ss_network_alpha is 2, but 4 at step 0"):
        ckavg.open_run(run, init=base)


def test_shards_keep_each_its_own(tmp_path: Path) -> None:
    for step in STEPS:
        here = write_checkpoint(tmp_path / f"checkpoint-{step}", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
        for number, name in ((1, "a"), (2, "b")):
            put(
                here / f"model-0000{number}-of-00002.safetensors", {name: torch.ones(2)}, {"format": "pt", "part": name}
            )
    directory = ckavg.average(ckavg.open_run(tmp_path), ckavg.Mean()).directory
    found = [read_header(path).metadata["part"] for path in sorted(directory.glob("*.safetensors"))]
    assert found == ["a", "b"]
