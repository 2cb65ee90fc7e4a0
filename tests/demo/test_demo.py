import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics as python_topics

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckavg.demo
from ckavg.demo import (
    Corpus,
    LlamaShape,
    held_out_loss,
    initialised_llama,
    load_corpus,
    load_model,
    remove_earlier,
    train,
    write_checkpoint,
)
from ckavg.engine.stream import one_core_per_kernel
from ckavg.errors import OutputExistsError
from tests.cli.runner import run_cli

SHAPE = LlamaShape(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
)
STEPS = 0, 10, 20, 25


def tiny_run(directory: Path, *, seed: int = 0, on_progress: Callable[[int, int, float], None] | None = None) -> Path:
    saved = train(
        directory, steps=25, save_every=10, pretraining_steps=12, shape=SHAPE, seed=seed, on_progress=on_progress
    )
    assert saved == STEPS
    return directory


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(run / f"checkpoint-{step}" / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A checkpoint whose norms and logits are not nearly alike, as initial ones are: a mistake would hide in them."""
    model = initialised_llama(SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0).add_(0.1 * torch.arange(parameter.numel()).view_as(parameter).sin())
    return write_checkpoint(tmp_path, 7, model, {"global_step": 7})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(2))


def paragraphs(text: bytes) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.decode().split("\n\n")} - {""}


def test_the_corpus_is_the_whole_reference_in_three_parts_that_share_no_paragraph() -> None:
    corpus = load_corpus()
    parts = [paragraphs(part) for part in corpus]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) == set().union(*(paragraphs(text.encode()) for text in python_topics.values()))
    assert corpus == load_corpus(dict(reversed(list(python_topics.items()))))
    second_half = len(corpus.training) + len(corpus.held_out)
    # No topic is longer than a fifth of the text, so the cut is at most a tenth from the middle.
    assert 0.4 < second_half / (len(corpus.pretraining) + second_half) < 0.6
    assert 0.08 < len(corpus.held_out) / second_half < 0.2


def test_a_paragraph_repeated_with_other_indentation_is_kept_once() -> None:
    corpus = load_corpus({"a": "x y\n z", "b": "    x\n    y z\n\nfirst\n\nsecond"})
    assert corpus == Corpus(pretraining=b"x y\n z\n\n", training=b"first\n\n", held_out=b"second\n\n")


@pytest.mark.parametrize("topics", [{}, {"a": "one\n\ntwo"}, {"a": "one", "b": "two"}])
def test_too_little_text_is_refused(topics: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="too little to train on one part"):
        load_corpus(topics)


def test_transformers_loads_it_computes_the_same_and_saves_the_same(
    uneven: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(uneven, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert {problem: list(names) for problem, names in loading.items() if names} == {}
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = load_model(uneven)(tokens)
    # Two layers of sums over at most 48 products, in another order: some tens of rounding errors.
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=100 * torch.finfo(torch.float32).eps * scale)
    theirs.save_pretrained(tmp_path / "again")
    before, after = load_model(uneven).state_dict(), load_model(tmp_path / "again").state_dict()
    assert before.keys() == after.keys() == load_file(tmp_path / "again" / "model.safetensors").keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_token_sees_only_those_before_it(uneven: Path, tokens: torch.Tensor) -> None:
    model = load_model(uneven)
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amin(-1).max() > 0


def test_weights_of_another_shape_are_refused(uneven: Path) -> None:
    (uneven / "config.json").write_text(json.dumps(replace(SHAPE, num_hidden_layers=3).to_config()))
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.2"):
        load_model(uneven)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = initialised_llama(SHAPE, generator=torch.Generator().manual_seed(1))
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, 1, model, {"global_step": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoints_are_those_of_a_trainer(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {f"checkpoint-{step}" for step in STEPS}
    for step in STEPS:
        with safe_open(run / f"checkpoint-{step}" / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert {tensor.dtype for tensor in weights(run, step).values()} == {torch.float32}
        assert load_model(run / f"checkpoint-{step}").shape == SHAPE


def test_the_trainer_state_tells_the_step_and_the_history(run: Path) -> None:
    states = [json.loads((run / f"checkpoint-{step}/trainer_state.json").read_text()) for step in STEPS]
    assert [state["global_step"] for state in states] == list(STEPS)
    assert [[entry["step"] for entry in state["log_history"]] for state in states] == [[], [10], [10, 20], [10, 20]]
    last = states[-1]
    assert [entry["learning_rate"] for entry in last["log_history"]] == pytest.approx([0.5e-3, 1e-3])
    assert (last["max_steps"], last["save_steps"], last["train_batch_size"]) == (25, 10, 4)
    assert last["epoch"] == pytest.approx(25 * 4 * 32 / len(load_corpus().training))


def test_transformers_reads_the_trainer_state(run: Path) -> None:
    callback = pytest.importorskip("transformers.trainer_callback")
    state = callback.TrainerState.load_from_json(str(run / "checkpoint-20" / "trainer_state.json"))
    assert (state.global_step, state.log_history[-1]["step"]) == (20, 20)


def test_every_checkpoint_has_moved(run: Path) -> None:
    for before, after in pairwise(STEPS):
        earlier, later = weights(run, before), weights(run, after)
        assert all(not torch.equal(earlier[name], later[name]) for name in earlier)


def test_pretraining_and_run_lower_the_held_out_loss(run: Path, tmp_path: Path) -> None:
    train(tmp_path, steps=1, save_every=1, pretraining_steps=0, shape=SHAPE)
    untrained, begun, ended = (
        held_out_loss(each) for each in (tmp_path / "checkpoint-0", run / "checkpoint-0", run / "checkpoint-25")
    )
    assert untrained == pytest.approx(math.log(256), abs=0.1)
    assert ended + 0.3 < begun < untrained - 0.1


def test_a_seed_gives_one_run_by_one_thread(run: Path, tmp_path: Path) -> None:
    # Whatever the process drew before must not matter, and what it draws next must not change.
    torch.rand(5)
    before, threads, used = torch.get_rng_state(), torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        again = tiny_run(tmp_path / "again", on_progress=lambda *_: used.add(torch.get_num_threads()))
        assert (used, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(threads)
    other = tiny_run(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for step in STEPS:
        for file in ("model.safetensors", "config.json", "trainer_state.json"):
            name = f"checkpoint-{step}/{file}"
            assert (run / name).read_bytes() == (again / name).read_bytes()
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(run, 25)[name], weights(other, 25)[name])


def test_progress_counts_every_step(tmp_path: Path) -> None:
    calls: list[tuple[int, int, float]] = []
    tiny_run(tmp_path, on_progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(step, 37) for step in range(1, 38)]
    # about what guessing gives; the text, which is that of the Python here, makes a little of the difference
    assert calls[0][2] == pytest.approx(math.log(256), abs=0.15)
    assert calls[-1][2] < calls[0][2] - 0.5
    state = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    logged = [entry["loss"] for entry in state["log_history"]]
    assert logged == pytest.approx([sum(loss for _, _, loss in calls[12 + k : 22 + k]) / 10 for k in (0, 10)])


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(OutputExistsError, match=r"holds checkpoints already.\n.*force=True"):
        tiny_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["checkpoint-5", ".tmp-checkpoint-5"])
@pytest.mark.parametrize("kind", ["link", "notes", "folder", "folder of our name", "file"])
def test_what_the_demo_did_not_make_is_never_removed(tmp_path: Path, name: str, kind: str) -> None:
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    for place in (elsewhere, run / name):
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text('{"trial_name": "ckavg demo"}')
    if kind == "notes":
        (run / name / "notes.txt").write_text("mine")
    elif kind.startswith("folder"):
        (run / name / ("mine" if kind == "folder" else "config.json")).mkdir()
    else:
        shutil.rmtree(run / name)
        (run / name).symlink_to(elsewhere) if kind == "link" else (run / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputExistsError, match=f"{name} was not made by the demo"):
        remove_earlier(run)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("state", ['{"trial_name": "mine"}', "[]", "{}", "{", None])
def test_a_run_of_somebody_else_is_never_removed(tmp_path: Path, state: str | None) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"trial_name": "ckavg demo"}')
    if state is not None:
        (tmp_path / "checkpoint-7" / "trainer_state.json").write_text(state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputExistsError, match="checkpoint-7 was not made by the demo"):
        remove_earlier(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_demo_made_is_removed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    shutil.copytree(run / "checkpoint-10", tmp_path / ".tmp-checkpoint-7")
    (tmp_path / "notes.txt").write_text("mine")
    remove_earlier(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        tiny_run(file)
    assert file.read_text() == "mine"


def test_the_held_out_loss_is_over_every_byte_but_the_first(run: Path) -> None:
    checkpoint = run / "checkpoint-25"
    model, text = load_model(checkpoint), list(load_corpus().held_out)
    window = SHAPE.max_position_embeddings
    total = 0.0
    # One window at a time, in plain steps.
    with torch.no_grad(), one_core_per_kernel():
        for start in range(0, len(text) - 1, window):
            tokens = torch.tensor(text[start : start + window + 1])
            log_probabilities = model(tokens[None, :-1])[0].double().log_softmax(-1)
            total -= log_probabilities[torch.arange(len(tokens) - 1), tokens[1:]].sum().item()
    assert held_out_loss(checkpoint) == pytest.approx(total / (len(text) - 1), rel=1e-5)
    assert held_out_loss(checkpoint) == held_out_loss(checkpoint)


def test_a_model_that_knows_nothing_has_the_loss_of_chance(run: Path, tmp_path: Path) -> None:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in weights(run, 25).items()}
    save_file(nothing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((run / "checkpoint-25" / "config.json").read_bytes())
    assert held_out_loss(tmp_path) == pytest.approx(math.log(256), rel=1e-5)


def test_the_command_trains_averages_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ckavg.demo, "train", lambda directory, on_progress: tiny_run(directory, on_progress=on_progress)
    )
    run = tmp_path / "run"
    first = run_cli("demo", run)
    assert first.exit_code == 0
    assert "4 checkpoints of one training run" in first.stdout
    again = run_cli("demo", run)
    assert again.exit_code == 1
    assert "holds checkpoints already" in again.stderr
    told = json.loads(run_cli("demo", run, "--force", "--json").stdout)
    places = {name: run / "averaged" / name for name in ("ema-gamma0.15", "pema-gamma0.15", "bema-eta0.2")}
    places["last checkpoint"] = run / "checkpoint-25"
    assert told["held_out_loss"] == {name: held_out_loss(place) for name, place in places.items()}
    for name, loss in told["held_out_loss"].items():
        assert any(line.split("  ")[0] == name and f"{loss:.4f}" in line for line in first.stdout.splitlines())
    (run / "checkpoint-10" / "notes.txt").write_text("mine")
    refused = run_cli("demo", run, "--force")
    assert refused.exit_code == 1
    assert "checkpoint-10 was not made by the demo" in refused.stderr
    assert (run / "checkpoint-25").is_dir()
