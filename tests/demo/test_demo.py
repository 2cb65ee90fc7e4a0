import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckavg.demo.checkpoint import load_model
from ckavg.demo.corpus import load_corpus
from ckavg.demo.evaluate import held_out_loss
from ckavg.demo.model import LlamaShape
from ckavg.demo.train import TrainedRun, remove_earlier, train

SHAPE = LlamaShape(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
)


def tiny_run(directory: Path, *, seed: int = 0, calls: list[tuple[int, int, float]] | None = None) -> TrainedRun:
    return train(
        directory,
        steps=25,
        save_every=10,
        pretraining_steps=12,
        shape=SHAPE,
        seed=seed,
        on_progress=None if calls is None else lambda done, total, loss: calls.append((done, total, loss)),
    )


def weights(run: TrainedRun, step: int) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(run.directory / f"checkpoint-{step}" / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return tiny_run(tmp_path_factory.mktemp("demo") / "run")


def test_the_checkpoints_are_those_of_a_trainer(run: TrainedRun) -> None:
    assert run.steps == (0, 10, 20, 25)
    assert {path.name for path in run.directory.iterdir()} == {f"checkpoint-{step}" for step in run.steps}
    for step in run.steps:
        checkpoint = run.directory / f"checkpoint-{step}"
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert {tensor.dtype for tensor in weights(run, step).values()} == {torch.float32}
        assert sum(tensor.numel() for tensor in weights(run, step).values()) == run.parameters
        assert LlamaShape.from_config(json.loads((checkpoint / "config.json").read_text())) == SHAPE


def test_the_trainer_state_tells_the_step_and_the_history(run: TrainedRun) -> None:
    states = [json.loads((run.directory / f"checkpoint-{step}/trainer_state.json").read_text()) for step in run.steps]
    assert [state["global_step"] for state in states] == list(run.steps)
    assert [[entry["step"] for entry in state["log_history"]] for state in states] == [[], [10], [10, 20], [10, 20]]
    last = states[-1]
    assert [entry["learning_rate"] for entry in last["log_history"]] == pytest.approx([0.5e-3, 1e-3])
    assert (last["max_steps"], last["save_steps"], last["train_batch_size"]) == (25, 10, 4)
    assert last["epoch"] == pytest.approx(25 * 4 * 32 / len(load_corpus().training))


def test_transformers_reads_the_trainer_state(run: TrainedRun) -> None:
    callback = pytest.importorskip("transformers.trainer_callback")
    state = callback.TrainerState.load_from_json(str(run.directory / "checkpoint-20" / "trainer_state.json"))
    assert (state.global_step, state.log_history[-1]["step"]) == (20, 20)


def test_every_checkpoint_has_moved(run: TrainedRun) -> None:
    for before, after in pairwise(run.steps):
        earlier, later = weights(run, before), weights(run, after)
        assert all(not torch.equal(earlier[name], later[name]) for name in earlier)


def test_the_first_checkpoint_is_already_trained(run: TrainedRun, tmp_path: Path) -> None:
    untrained = train(tmp_path, steps=1, save_every=1, pretraining_steps=0, shape=SHAPE)
    assert held_out_loss(run.directory / "checkpoint-0") < held_out_loss(untrained.directory / "checkpoint-0")


def test_a_seed_gives_one_run(run: TrainedRun, tmp_path: Path) -> None:
    # Whatever the process drew before must not matter, and what it draws next must not change.
    torch.rand(5)
    before = torch.get_rng_state()
    again, other = tiny_run(tmp_path / "again"), tiny_run(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for step in run.steps:
        for file in ("model.safetensors", "config.json", "trainer_state.json"):
            name = f"checkpoint-{step}/{file}"
            assert (run.directory / name).read_bytes() == (again.directory / name).read_bytes()
    assert not torch.equal(
        weights(run, 25)["model.embed_tokens.weight"], weights(other, 25)["model.embed_tokens.weight"]
    )


def test_progress_counts_every_step(tmp_path: Path) -> None:
    calls: list[tuple[int, int, float]] = []
    tiny_run(tmp_path, calls=calls)
    assert [(done, total) for done, total, _ in calls] == [(step, 37) for step in range(1, 38)]
    # about what guessing gives; the text, which is that of the Python here, makes a little of the difference
    assert calls[0][2] == pytest.approx(math.log(256), abs=0.15)
    assert calls[-1][2] < calls[0][2] - 0.5


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(FileExistsError, match=r"holds checkpoints already \(checkpoint-5 and 0 more\)"):
        tiny_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["checkpoint-5", ".tmp-checkpoint-5"])
@pytest.mark.parametrize("kind", ["link", "notes", "folder", "file"])
def test_what_the_demo_did_not_make_is_never_removed(tmp_path: Path, name: str, kind: str) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for place in (elsewhere, run / name):
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text('{"trial_name": "ckavg demo"}')
    if kind == "notes":
        (run / name / "notes.txt").write_text("mine")
    elif kind == "folder":
        (run / name / "mine").mkdir()
    else:
        shutil.rmtree(run / name)
        (run / name).symlink_to(elsewhere) if kind == "link" else (run / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=f"{name} was not made by the demo"):
        remove_earlier(run)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_demo_made_is_removed(tmp_path: Path) -> None:
    for name in ("checkpoint-5", ".tmp-checkpoint-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"trial_name": "ckavg demo"}')
    remove_earlier(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        tiny_run(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["steps", "save_every", "batch_size", "pretraining_batch_size"])
def test_a_count_of_zero_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        train(tmp_path / "run", **{name: 0})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_window_longer_than_the_text_is_refused(tmp_path: Path) -> None:
    shape = LlamaShape(hidden_size=4, intermediate_size=4, num_attention_heads=1, max_position_embeddings=10**8)
    with pytest.raises(ValueError, match="use a shorter window"):
        train(tmp_path, shape=shape)


def test_the_held_out_loss_is_over_every_byte_but_the_first(run: TrainedRun) -> None:
    checkpoint = run.directory / "checkpoint-25"
    model, text = load_model(checkpoint), list(load_corpus().held_out)
    window = SHAPE.max_position_embeddings
    total = 0.0
    # One window at a time, in plain steps.
    with torch.no_grad():
        for start in range(0, len(text) - 1, window):
            tokens = torch.tensor(text[start : start + window + 1])
            log_probabilities = model(tokens[None, :-1])[0].double().log_softmax(-1)
            total -= log_probabilities[torch.arange(len(tokens) - 1), tokens[1:]].sum().item()
    assert held_out_loss(checkpoint) == pytest.approx(total / (len(text) - 1), rel=1e-5)
    assert held_out_loss(checkpoint) == held_out_loss(checkpoint)


def test_a_model_that_knows_nothing_has_the_loss_of_chance(run: TrainedRun, tmp_path: Path) -> None:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in weights(run, 25).items()}
    save_file(nothing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((run.directory / "checkpoint-25" / "config.json").read_bytes())
    assert held_out_loss(tmp_path) == pytest.approx(math.log(256), rel=1e-5)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        held_out_loss(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, ckavg.demo, ckavg.demo.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
