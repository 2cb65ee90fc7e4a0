"""Which names are checkpoints of one run, and which step each states."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckavg
from ckavg.checkpoints.layouts import read_labels
from ckavg.errors import CkavgError, MissingShardError, MixedOrderError, NoCheckpointsError, SettingError
from tests.runs import write_checkpoint
from tests.trainers import put


def weights(place: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0) + place}


ONE_RUN: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    "numbers": (("5", "10", "100"), (5, 10, 100)),
    "steps": (("step_5", "step_10", "step_100"), (5, 10, 100)),
    "steps with a hyphen": (("step-5", "step-10"), (5, 10)),
    "steps without": (("step5", "step10"), (5, 10)),
    "global steps": (("global_step_5", "global_step_10"), (5, 10)),
    "DeepSpeed": (("global_step5", "global_step10"), (5, 10)),
    "a model": (("my.model-step-5", "my.model-step-10"), (5, 10)),
    "sd-scripts, epochs": (("a-000001", "a-000002", "a-000010"), (1, 2, 10)),
    "sd-scripts, steps": (("a-step00000500", "a-step00001000"), (500, 1000)),
    "ai-toolkit": (("a_000000250", "a_000000500"), (250, 500)),
    "MLX": (("0000100_adapters", "0000200_adapters"), (100, 200)),
    "OneTrainer": (("a-save-500-2-0", "a-save-1000-4-1"), (500, 1000)),
    "OneTrainer, times": (("a2026-01-02_03-04-05-save-500-2-0", "a2026-01-02_04-04-05-save-900-3-0"), (500, 900)),
    "Lightning": (("epoch=1-step=100", "epoch=3-step=300"), (100, 300)),
    "Lightning, metrics": (("epoch=02-val_loss=0.32", "epoch=10-val_loss=0.30"), (2, 10)),
    "words behind": (("a_500steps", "a_1000steps"), (500, 1000)),
    "epochs, words behind": (("a-5epochs", "a-10epochs"), (5, 10)),
    "losses": (("step100_loss2.9310", "step200_loss2.85"), (100, 200)),
    "losses of validation": (("a-000100-val_loss_0.31", "a-000200-val_loss_0.3"), (100, 200)),
    "converted": (("step_100_hf", "step_200_hf"), (100, 200)),
    "OLMo": (("step1000-unsharded", "step20000-unsharded"), (1000, 20000)),
    "OLMo, stages": (("stage1-step1000-tokens5B", "stage1-step20000-tokens84B"), (1000, 20000)),
    "levanter": (("hf-100", "hf-2000"), (100, 2000)),
    "Composer": (("ba100", "ba2000"), (100, 2000)),
    "Composer, epochs": (("ep0-ba100", "ep1-ba2000"), (100, 2000)),
    "thousands": (("100k", "1000k", "2M"), (100_000, 1_000_000, 2_000_000)),
    "with a version": (("lora_v2_000100", "lora_v2_000200"), (100, 200)),
    "with a size": (("llama-7b-step100", "llama-7b-step200"), (100, 200)),
    "a number in front": (("flux1-dev_000000100", "flux1-dev_000000200"), (100, 200)),
    "Megatron": (("iter_0000100", "iter_0000200"), (100, 200)),
    "dots": (("model.100", "model.2000"), (100, 2000)),
}


@pytest.mark.parametrize("case", ONE_RUN)
@pytest.mark.parametrize("flat", [True, False], ids=("files", "directories"))
def test_one_stem_and_a_number_that_varies_is_one_run(tmp_path: Path, case: str, flat: bool) -> None:
    names, steps = ONE_RUN[case]
    for place, name in enumerate(reversed(names)):
        if flat:
            save_file(weights(place), tmp_path / f"{name}.safetensors")
        else:
            write_checkpoint(tmp_path / name, weights(place))
    assert ckavg.open_run(tmp_path).steps == tuple(steps)


TWO_RUNS: Mapping[str, tuple[Sequence[str], str]] = {
    "words in front": (("sft-step-100", "dpo-step-150", "sft-step-200"), "sft*"),
    "stages": (("stage1-step100-tokens1B", "stage2-step150-tokens2B"), "stage1*"),
    "ingredients": (("stage2-ingredient1-step100", "stage2-ingredient2-step200"), "stage2-ingredient1*"),
    "experiments": (("exp1_000100", "exp1_000200", "exp2_000150", "exp2_000250"), "exp1*"),
    "seeds": (("seed1-step100", "seed2-step200"), "seed1*"),
    "versions": (("a_v1_10", "a_v1_20", "a_v2_15", "a_v2_25"), "a_v1*"),
    "words behind": (("step_100_actor", "step_150_critic", "step_200_actor"), "*actor*"),
    "rates": (("lr1e-4-step100", "lr1e-5-step150"), "lr1e-4*"),
    "an older one": (("checkpoint-100", "checkpoint-200", "old_checkpoint-150"), "checkpoint-*"),
    "one stem in another": (("a-step100", "ab-step150", "a-step200"), "a-step*"),
}


@pytest.mark.parametrize("case", TWO_RUNS)
@pytest.mark.parametrize("flat", [True, False], ids=("files", "directories"))
def test_two_stems_are_two_runs(tmp_path: Path, case: str, flat: bool) -> None:
    names, pattern = TWO_RUNS[case]
    for place, name in enumerate(names):
        if flat:
            save_file(weights(place), tmp_path / f"{name}.safetensors")
        else:
            write_checkpoint(tmp_path / name, weights(place))
    with pytest.raises(MixedOrderError, match="to 2 runs, stages or experiments") as met:
        ckavg.open_run(tmp_path)
    assert all(name in met.value.message for name in names)
    assert met.value.hint.endswith(f"--match '{pattern}'")


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002", "model-00002-of-00002"),
        ("consolidated.00", "consolidated.01"),
        ("model", "model_1", "model_2"),
        ("layer_1", "layer_20"),
        ("unet", "text_encoder", "text_encoder_2"),
        ("lora_v1", "lora_v2"),
        ("seed1", "seed42"),
    ],
)
def test_numbers_that_are_no_steps(names: Sequence[str]) -> None:
    found = {name: label for name, label in read_labels(names).items() if label.number is not None}
    assert found == {} or names[0] == "model"


def test_parts_of_one_model_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    """The directory of a checkpoint is named instead of that of the run."""
    for name in ("model.safetensors", "2_Dense/model.safetensors", "30_Dense/model.safetensors"):
        put(tmp_path / name, weights(1))
    (tmp_path / "modules.json").write_text("[]")
    put(tmp_path / "model_1.safetensors", weights(2))
    with pytest.raises(NoCheckpointsError, match="is one checkpoint, not a directory of checkpoints") as met:
        ckavg.open_run(tmp_path)
    assert "Try its parent" not in met.value.hint


def test_the_parent_is_named_where_it_holds_the_run(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    with pytest.raises(NoCheckpointsError) as met:
        ckavg.open_run(tmp_path / "checkpoint-20")
    assert met.value.hint == f"Try its parent: {tmp_path}"


# --- the end of a run, and weights that lie twice ---


def test_the_file_without_a_number_is_the_end_of_the_run(tmp_path: Path) -> None:
    for name, place in {"a-000010": 1, "a-000020": 2, "a": 3}.items():
        save_file(weights(place), tmp_path / f"{name}.safetensors")
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20, 30)
    assert any("a.safetensors states no step: it is assumed to be the end of the run" in each for each in run.warnings)


def test_the_end_of_each_of_two_runs_has_the_name_of_its_own(tmp_path: Path) -> None:
    for noise, step in itertools.product(("high_noise", "low_noise"), ("_000250", "_000500", "")):
        save_file(weights(len(step + noise)), tmp_path / f"wan{step}_{noise}.safetensors")
    run = ckavg.open_run(tmp_path, match="*high_noise*")
    assert [each.path.stem for each in run.checkpoints][-1] == "wan_high_noise"
    with pytest.raises(MixedOrderError, match="to 2 runs") as met:
        ckavg.open_run(tmp_path)
    assert met.value.hint.endswith("--match '*_high_noise.safetensors'")


@pytest.mark.parametrize("end", ["a-final", "a_last", "a"])
def test_weights_that_lie_twice_are_one_checkpoint(tmp_path: Path, end: str) -> None:
    for name, place in {"a-000010": 1, "a-000020": 2, end: 2}.items():
        save_file(weights(place), tmp_path / f"{name}.safetensors", {"saved": name})
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20)
    assert any(f"{end}.safetensors holds the same weights as a-000020.safetensors" in each for each in run.warnings)


def test_other_files_are_named(tmp_path: Path) -> None:
    for name in ("a-000010", "a-000020", "vae", "b"):
        save_file(weights(1), tmp_path / f"{name}.safetensors")
    write_checkpoint(tmp_path / "base_model", weights(0))
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20)
    assert any("b.safetensors, base_model, vae.safetensors" in each for each in run.warnings)


@pytest.mark.parametrize("same", [True, False])
def test_the_final_model_beside_the_checkpoints(tmp_path: Path, same: bool) -> None:
    """The Trainer saves it once more; it is worth a word where it is not the last checkpoint."""
    for step in (10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    save_file(weights(20 if same else 10), tmp_path / "model.safetensors", {"format": "pt"})
    warnings = ckavg.open_run(tmp_path).warnings
    assert any("no step in the name: model.safetensors" in each for each in warnings) != same


@pytest.mark.parametrize("suffix", ["-merged", "_hf", ".bak", " (copy)"])
def test_what_is_made_from_a_checkpoint_is_no_other_run(tmp_path: Path, suffix: str) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    write_checkpoint(tmp_path / f"checkpoint-20{suffix}", weights(0))
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20)
    assert any(f"checkpoint-20{suffix}" in each for each in run.warnings)


def test_of_two_formats_the_one_that_is_read(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"step{step}").mkdir()
        (tmp_path / f"step{step}" / "model.pt").write_bytes(b"a pickle")
        write_checkpoint(tmp_path / f"step{step}-unsharded", weights(step))
    assert [each.path.name for each in ckavg.open_run(tmp_path).checkpoints] == ["step10-unsharded", "step20-unsharded"]


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("name", ["checkpoint-30", "step_30.safetensors"])
def test_links_that_lead_nowhere_are_no_silence(tmp_path: Path, name: str, looping: bool) -> None:
    for step in (10, 20):
        if name.endswith(".safetensors"):
            save_file(weights(step), tmp_path / f"step_{step}.safetensors")
        else:
            write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    (tmp_path / name).symlink_to(name if looping else "gone")
    with pytest.raises(CkavgError, match=f"{name} is a link|{name} cannot be read: Too many levels"):
        ckavg.open_run(tmp_path)
    if not looping:
        with pytest.raises(MissingShardError):
            ckavg.open_run(tmp_path)
        assert ckavg.open_run(tmp_path, skip_incomplete=True).steps == (10, 20)


def test_a_link_to_a_checkpoint_is_not_told_of(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / f"{step:06d}", weights(step))
    (tmp_path / "last").symlink_to("000020")
    run = ckavg.open_run(tmp_path)
    assert run.steps == (10, 20)
    assert not any("last" in each for each in run.warnings)


def test_headers_that_contradict_the_names_are_refused(tmp_path: Path) -> None:
    for number, step in ((1, 100), (2, 50), (3, 300)):
        put(tmp_path / f"a-{number:06d}.safetensors", weights(step), {"ss_steps": str(step)})
    with pytest.raises(MixedOrderError, match=r"a-000002\.safetensors states step 50 in its header, but a-000001"):
        ckavg.open_run(tmp_path)


# --- which of them take part ---


def test_steps_that_are_named(tmp_path: Path) -> None:
    for step in range(100, 600, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    assert ckavg.open_run(tmp_path, steps=(500, 100, 300)).steps == (100, 300, 500)
    assert ckavg.open_run(tmp_path, skip_step=(200, 500)).steps == (100, 300, 400)
    assert ckavg.open_run(tmp_path, skip_step=(500,), last=2).steps == (300, 400)
    assert ckavg.open_run(tmp_path, steps=(100, 300, 500), from_step=200).steps == (300, 500)
    for selection in ({"steps": (100, 301)}, {"skip_step": (301,)}):
        with pytest.raises(SettingError, match="names 301, where there is no checkpoint") as met:
            ckavg.open_run(tmp_path, **selection)
        assert "100, 200, 300, 400, 500" in met.value.hint
    run = ckavg.open_run(tmp_path, last=100)
    assert any("--last 100 asks for more checkpoints than there are: 5" in each for each in run.warnings)


def test_a_foreign_checkpoint_need_not_be_moved_away(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / f"checkpoint-{step}", weights(step))
    write_checkpoint(tmp_path / "checkpoint-25", {"other": torch.ones(3)})
    with pytest.raises(CkavgError):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, skip_step=(25,)).steps == (10, 20, 30)


def test_a_pattern_that_matches_nothing_says_what_is_there(tmp_path: Path) -> None:
    for step, name in itertools.product((10, 20), ("a", "b")):
        save_file(weights(step), tmp_path / f"{name}-step{step}.safetensors")
    with pytest.raises(NoCheckpointsError, match=r"no checkpoints whose names match 'c\*'") as met:
        ckavg.open_run(tmp_path, match="c*")
    assert "a-step10.safetensors" in met.value.hint
    assert ckavg.open_run(tmp_path, match="a-*").steps == ckavg.open_run(tmp_path, match="b*.safetensors").steps


def test_what_holds_no_checkpoints_says_where_weights_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "final_model", weights(0))
    put(tmp_path / "optimizer/state.safetensors", weights(0))
    with pytest.raises(NoCheckpointsError) as met:
        ckavg.open_run(tmp_path)
    assert "final_model/" in met.value.message
    assert "optimizer" not in str(met.value)
