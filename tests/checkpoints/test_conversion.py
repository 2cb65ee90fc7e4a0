"""The commands that convert what is not read, run as they are printed: on a terminal of 80 columns, by `sh`."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.checkpoints import unsupported
from ckavg.checkpoints.pickles import read_pickle
from tests.cli.runner import run_cli, snapshot
from tests.exhaustive import all_but
from tests.runs import OLD_PICKLE, save_old, write_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = (10, 20, 30)
Weights = dict[str, Tensor]


def weights(step: int) -> Weights:
    """Tensors of every kind that is apt to go wrong: tied, transposed, of 16 bits, scalars, integers, empty."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(4, 3, generator=generator)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,
        "transposed.weight": torch.randn(3, 5, generator=generator).T,
        "part.weight": embedding[1:],
        "norm.weight": torch.randn(7, generator=generator).bfloat16(),
        "logit_scale": torch.tensor(float(step)),
        "empty": torch.empty(0, 3),
        "position_ids": torch.arange(5),
    }


def environment() -> dict[str, str]:
    """With the programs of this interpreter's environment first, as where that is activated."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "TERM": "xterm", "OMP_NUM_THREADS": "1"}


def printed(*words: str | Path, cwd: Path | None = None) -> list[str]:
    """The lines that ckavg prints on a terminal of 80 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "ckavg", *map(str, words)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd=cwd, env=environment())
    os.close(follower)
    text = b""
    try:
        while more := os.read(leader, 1 << 16):
            text += more
    except OSError:  # the end, on Linux
        pass
    os.close(leader)
    process.wait()
    return text.decode().replace("\r\n", "\n").splitlines()


def command_of(lines: list[str]) -> str:
    """The one command among some lines."""
    (command,) = [line for line in lines if re.match(r"\s*(\(for d in |(\S*/)?python )", line)]
    return command


def in_shell(command: str, *, shell: str = "sh", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([shell, "-c", command], cwd=cwd, env=environment(), capture_output=True, text=True)


def convert(run: Path) -> str:
    """Run the command that ckavg prints, and check that it changes no existing file; returns the command."""
    before = snapshot(run)
    command = command_of(run_cli("ema", run).stderr.splitlines())
    done = in_shell(command)
    assert done.returncode == 0, done.stderr
    after = snapshot(run)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith((".safetensors", ".index.json")) for name in after.keys() - before.keys())
    return command


def check_mean(run: Path, expected: Callable[[int], Mapping[str, Tensor]], steps: tuple[int, ...] = STEPS) -> None:
    """`inspect` reads the run, and its mean is that of the tensors in float64."""
    inspected = run_cli("inspect", run)
    assert inspected.exit_code == 0, inspected.stdout
    result = ckavg.average(ckavg.open_run(run), ckavg.Mean(), out=run.parent / "mean", force=True)
    assert result.steps == steps
    found = {
        f"{file.parent.relative_to(run.parent / 'mean')}/{name}".removeprefix("./"): tensor
        for file in (run.parent / "mean").rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    states = [expected(step) for step in steps]
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        of_name = [state[name].double().numpy() for state in states]
        assert tensor.dtype == states[0][name].dtype
        if tensor.is_floating_point():
            close = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
            np.testing.assert_allclose(tensor.double().numpy(), np.mean(of_name, axis=0), rtol=close, atol=1e-7)
        else:
            np.testing.assert_array_equal(tensor.numpy(), of_name[-1])


@pytest.mark.parametrize("kind", all_but(("symbolic",), ["symbolic", "second name"]))
def test_nothing_is_written_through_a_link_that_was_planted(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("three years")
    for step in STEPS:
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        names = [f"pytorch_model-0000{place}-of-00002.bin" for place in (1, 2)]
        for place, name in enumerate(names):
            save_old({f"w{place}": torch.full((4,), float(step))}, checkpoint / name)
        index = {"weight_map": {f"w{place}": name for place, name in enumerate(names)}}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    command = command_of(run_cli("ema", tmp_path / "run").stderr.splitlines())
    for checkpoint in (tmp_path / "run").iterdir():
        for name in (".model-00001-of-00002.safetensors.part", "model.safetensors.index.json"):
            if kind == "symbolic":
                (checkpoint / name).symlink_to(victim)
            else:
                (checkpoint / name).hardlink_to(victim)
    assert in_shell(command).returncode == 0
    assert victim.read_text() == "three years"
    check_mean(tmp_path / "run", lambda step: {f"w{place}": torch.full((4,), float(step)) for place in (0, 1)})


# --- what trainers save, in one pickle a step ---

STATE = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4)}}, "param_groups": [{"lr": 0.1}]}


def zeros(tensors: Weights) -> Weights:
    """What is not to be taken for the model: an average, say."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


FLAT: dict[str, tuple[str, Callable[[Weights], dict[str, Any]]]] = {
    "a state dict": ("step_{}.pt", OrderedDict),
    "Lightning": (
        "epoch=1-step={}.ckpt",
        lambda tensors: {
            "global_step": int(tensors["logit_scale"]),
            "pytorch-lightning_version": "2.5.0",
            "state_dict": OrderedDict(tensors),
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [STATE],
            "hyper_parameters": {"lr": 0.1},
        },
    ),
    "timm": (
        "checkpoint-{}.pth.tar",
        lambda tensors: {
            "arch": "resnet50",
            "state_dict": tensors,
            "optimizer": STATE,
            "args": Namespace(lr=0.1),
            "state_dict_ema": zeros(tensors),
            "metric": 71.5,
        },
    ),
    "fairseq": (
        "checkpoint_{}.pt",
        lambda tensors: {
            "args": Namespace(arch="transformer"),
            "cfg": None,
            "model": tensors,
            "criterion": OrderedDict({"weight": torch.ones(2)}),
            "extra_state": {"metrics": {}, "best": 3.5},
            "last_optimizer_state": STATE,
        },
    ),
    "BasicSR": ("net_g_step_{}.pth", lambda tensors: {"params_ema": zeros(tensors), "params": tensors}),
    "a script": (
        "ckpt-{}.pkl",
        lambda tensors: {
            "net": tensors,
            "optimizer": STATE,
            "scaler": {"_scale": torch.ones(1)},
            "ema": zeros(tensors),
            "rng": torch.ones(9),
        },
    ),
}


@pytest.mark.parametrize("case", FLAT)
def test_single_pickles(tmp_path: Path, case: str) -> None:
    name, saved = FLAT[case]
    run = tmp_path / "run"
    run.mkdir()
    for step in STEPS:
        save_old(saved(weights(step)), run / name.format(step))
    convert(run)
    converted = re.sub(r"(\.[a-z]+)+$", ".safetensors", name)
    assert {path.name for path in run.glob("*.safetensors")} == {converted.format(step) for step in STEPS}
    check_mean(run, weights)


def test_a_transposed_tensor_is_put_in_order(tmp_path: Path) -> None:
    """All pickles of the checkpoint are converted, not only the one that holds it: the others would be passed over."""
    run = tmp_path / "run"
    for step in STEPS:
        (run / f"checkpoint-{step}").mkdir(parents=True)
        names = [f"pytorch_model-0000{place}-of-00002.bin" for place in (1, 2)]
        torch.save({"a": torch.full((2,), float(step))}, run / f"checkpoint-{step}" / names[0])
        torch.save({"t": weights(step)["transposed.weight"]}, run / f"checkpoint-{step}" / names[1])
        index = {"metadata": {}, "weight_map": dict(zip(("a", "t"), names, strict=True))}
        (run / f"checkpoint-{step}" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(run)
    check_mean(run, lambda step: {"a": torch.full((2,), float(step)), "t": weights(step)["transposed.weight"]})


# --- what lies in directories ---


DIRECTORIES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "transformers, with a value head": (
        {"pytorch_model.bin": "model.safetensors", "value_head.bin": "value_head.safetensors"},
        ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model_ema.bin"),
    ),
    "an adapter, with what else was trained": (
        {
            "adapter_model.bin": "adapter_model.safetensors",
            "non_lora_trainables.bin": "non_lora_trainables.safetensors",
        },
        ("rng_state.pth", "training_args.bin"),
    ),
    "a pipeline, with an adapter": (
        {
            "unet/diffusion_pytorch_model.bin": "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/pytorch_model.bin": "text_encoder/model.safetensors",
            "pytorch_lora_weights.bin": "pytorch_lora_weights.safetensors",
        },
        ("unet_ema/diffusion_pytorch_model.bin", "optimizer.bin"),
    ),
    "OLMo": ({"model.pt": "model.safetensors"}, ("optim.pt", "train.pt")),
    "DeepSpeed without ZeRO, in a Trainer's": (
        {"global_step7/mp_rank_00_model_states.pt": "model.safetensors"},
        ("latest", "global_step7/expert_optim_states.pt"),
    ),
}


@pytest.mark.parametrize("case", all_but(("a pipeline, with an adapter", "OLMo"), DIRECTORIES))
def test_directories(tmp_path: Path, case: str) -> None:
    """Every file of the model becomes one, and no file of the trainer's."""
    files, state = DIRECTORIES[case]
    run = tmp_path / "run"
    for step in STEPS:
        for place, name in enumerate((*files, *state)):
            path = run / f"checkpoint-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            saved: object = {f"{place}.{tensor}": value for tensor, value in weights(step).items()}
            saved = {"module": saved, "optimizer": STATE} if "mp_rank" in name else saved
            save_old(saved if name in files else STATE, path)
    convert(run)
    for step in STEPS:
        directory = run / f"checkpoint-{step}"
        found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*.safetensors")}
        assert found.keys() == set(files.values())
        for place, name in enumerate(files.values()):
            assert_equal(load_file(found[name]), {f"{place}.{each}": value for each, value in weights(step).items()})
    assert run_cli("inspect", run).exit_code == 0


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_component_that_is_a_pickle(tmp_path: Path) -> None:
    """Existing safetensors stay unchanged, even with a pickle beside them."""
    run = tmp_path / "run"
    for step in STEPS:
        write_checkpoint(run / f"checkpoint-{step}" / "unet", {"w": torch.ones(2) * step})
        save_old({"w": torch.zeros(2)}, run / f"checkpoint-{step}" / "unet" / "pytorch_model.bin")
        (run / f"checkpoint-{step}" / "vae").mkdir()
        save_old({"v": torch.ones(3) * step}, run / f"checkpoint-{step}" / "vae" / "diffusion_pytorch_model.bin")
    convert(run)
    check_mean(run, lambda step: {"unet/w": torch.ones(2) * step, "vae/v": torch.ones(3) * step})


# --- one command for all ---


@pytest.mark.exhaustive
def test_forty_checkpoints_have_one_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(40):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_old({"model": {"w": torch.full((3,), float(step))}}, run / f"checkpoint-{step}" / "pytorch_model.bin")
    done = run_cli("ema", run)
    assert done.stderr.startswith(
        f"error: 40 checkpoints hold unsupported pickles, such as {run}/checkpoint-0/pytorch_model.bin, "
    )
    assert done.stderr.count("\n") == 3
    for lines in (done.stderr.splitlines(), printed("ema", run), printed("inspect", run)):
        assert command_of(lines).endswith(f" {run}/checkpoint-*/pytorch_model.bin")
    piped = subprocess.run(
        [sys.executable, "-m", "ckavg", "inspect", run], capture_output=True, text=True, env=environment(), check=False
    )
    assert command_of(piped.stdout.splitlines()) in done.stderr
    (problem,) = json.loads(run_cli("inspect", "--json", run).stdout)["problems"]
    shown = done.stderr.removeprefix("error: ").removesuffix("\n")
    assert problem == shown.replace("\nhint: ", "\n").replace("\n  ", "\n")
    convert(run)
    check_mean(run, lambda step: {"w": torch.full((3,), float(step))}, tuple(range(40)))


def test_no_other_directories_are_named(tmp_path: Path) -> None:
    """Patterns are printed where they match nothing but checkpoints; else digits alone, or every name."""
    run = tmp_path / "run"
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-best"):
        (run / name).mkdir(parents=True)
        save_old({"w": torch.ones(2)}, run / name / "pytorch_model.bin")
    assert command_of(printed("ema", run)).endswith(f" {run}/checkpoint-[0-9]*/pytorch_model.bin")
    (run / "checkpoint-30x").mkdir()
    save_old({"w": torch.ones(2)}, run / "checkpoint-30x" / "pytorch_model.bin")
    assert convert(run).endswith(f" {run}/checkpoint-10/pytorch_model.bin {run}/checkpoint-20/pytorch_model.bin")
    assert {path.parent.name for path in run.glob("*/*.safetensors")} == {"checkpoint-10", "checkpoint-20"}


def test_among_checkpoints_that_are_read(tmp_path: Path) -> None:
    """Those in another format are one problem among others, and their command converts them alone."""
    run = tmp_path / "run"
    for step in (10, 20):
        write_checkpoint(run / f"checkpoint-{step}", {"w": torch.ones(2) * step})
    for step in (30, 40, 50):
        (run / f"checkpoint-{step}").mkdir()
        save_old({"w": torch.ones(2) * step}, run / f"checkpoint-{step}" / "pytorch_model.bin")
    (run / "checkpoint-60").mkdir()
    lines = printed("ema", run)
    assert lines[0] == "error: 2 problems:"
    pickle = f"{run}/checkpoint-30/pytorch_model.bin"
    text = " ".join(map(str.strip, lines[1:]))
    assert text.startswith(f"- 3 checkpoints hold unsupported pickles, such as {pickle}, not safetensors. ")
    assert f" {pickle} has the layout that torch wrote before 1.6." in text
    assert in_shell(command_of(lines)).returncode == 0
    (run / "checkpoint-60").rmdir()
    check_mean(run, lambda step: {"w": torch.ones(2) * step}, (10, 20, 30, 40, 50))


def test_the_model_that_the_run_began_with(tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    for directory in (run / "checkpoint-10", run / "checkpoint-20", base):
        directory.mkdir(parents=True)
        save_old({"w": torch.ones(2)}, directory / "pytorch_model.bin")
    command = command_of(printed("ema", run, "--init", base))
    assert in_shell(command).returncode == 0
    assert run_cli("ema", run, "--init", base).exit_code == 0


NAMES = (
    "my run", "it's", 'a "quoted" $HOME `date` \\n', "[a]*?{b,c}", "-rf", "modèle 模型", "a\nb\x1b[31m\u202e", "~",
    "#;&|", os.fsdecode(b"no text \xff"),
)  # fmt: skip


def said_to(tools: Path, command: str, cwd: Path | None = None) -> list[list[str]]:
    """What a command says to `python` and `uv`, whenever it calls them."""
    tools.mkdir(exist_ok=True)
    (tools / "said").write_bytes(b"")
    for tool in ("python", "uv"):
        (tools / tool).write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" "" >> {tools}/said\n')
        (tools / tool).chmod(0o755)
    done = in_shell(f"PATH={tools}:$PATH; {command.replace(sys.executable, 'python')}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    calls = os.fsdecode((tools / "said").read_bytes()).split("\0\0")
    return [call.split("\0") for call in calls[:-1]]


TYPICAL = ((NAMES[1], "7x"), (NAMES[2], ""), (NAMES[4], ""), (NAMES[6], "7x"), (NAMES[9], ""))


@pytest.mark.parametrize("case", all_but(TYPICAL, itertools.product(NAMES, ("", "7x"))), ids=ascii)
def test_names(tmp_path: Path, case: tuple[str, str]) -> None:
    """Of a directory in the current one and of its files; as a pattern, and one by one where that matches more."""
    name, more = case
    run = tmp_path / "here" / name
    for step in (*STEPS, *filter(None, [more])):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / f"{name}.pt").write_bytes(OLD_PICKLE)
    lines = printed("ema", "--", name, cwd=run.parent)
    assert all(line.isprintable() for line in lines)
    (words,) = said_to(tmp_path / "tools", command_of(lines), cwd=run.parent)
    assert [run.parent / word for word in words[2:]] == [run / f"checkpoint-{step}" / f"{name}.pt" for step in STEPS]
    assert not any(word.startswith("-") for word in words[2:])


@pytest.mark.parametrize("place", ["ours", "none", "the user's"])
def test_the_interpreter_is_one_that_has_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """`python` where that is the one that runs ckavg, else its path; a trainer's tools have the user's `python`."""
    if place == "the user's":
        (tmp_path / "python").write_text("#!/bin/sh\n")
        (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent if place == "ours" else tmp_path))
    assert unsupported.interpreter(ours=True) == ("python" if place == "ours" else sys.executable)
    assert unsupported.interpreter(ours=False) == (sys.executable if place == "none" else "python")


# --- what cannot be converted ---


class Custom:
    pass


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (
            {"model": {"w": torch.ones(2)}, "config": Custom()},
            "Unsupported global: GLOBAL tests.checkpoints.test_conversion.Custom",
        ),
        ({"params_ema": {"w": torch.ones(2)}, "optimizer": STATE}, "no weights in "),
    ],
    ids=("a class", "averages and states alone"),
)
def test_what_cannot_be_converted(tmp_path: Path, saved: dict[str, Any], told: str) -> None:
    for step in STEPS:
        save_old(saved, tmp_path / f"step_{step}.pt")
    done = in_shell(command_of(printed("ema", tmp_path)))
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert not [*tmp_path.glob("*.safetensors")]


# --- which part of what was saved is the model ---

W = torch.ones(2)
SHADOW = {"w": torch.zeros(2)}

SHAPES: dict[str, tuple[dict[Any, Any], set[str]]] = {
    "bare": (
        {"a.w": W, "b": W, "optimizer_embedding.w": W, "ema.w": W, "scale": torch.tensor(1.0)},
        {"a.w", "b", "optimizer_embedding.w", "ema.w", "scale"},
    ),
    "with what is no tensor": ({"a.w": W, "a._extra_state": None, "version": 3}, {"a.w"}),
    "DataParallel": ({"module.w": W}, {"module.w"}),
    "model": ({"model": {"w": W}, "optimizer": STATE, "epoch": 1}, {"w"}),
    "state_dict": ({"epoch": 1, "state_dict": {"w": W}}, {"w"}),
    "module": ({"module": {"w": W}}, {"w"}),
    "net beside an optimizer": ({"net": {"w": W}, "optimizer": STATE, "acc": torch.tensor(0.5)}, {"w"}),
    "a name of its own": ({"vocoder": {"w": W}, "loss": torch.tensor(0.5), "optim_g": STATE}, {"w"}),
    "nested": ({"model": {"encoder": {"w": W}, "ema": {"w": W}}}, {"encoder.w", "ema.w"}),
    "nested, one module": ({"model": {"encoder": {"layer": {"w": W}}}}, {"encoder.layer.w"}),
    "nested, a module named model": ({"model": {"model": {"w": W}, "head": {"w": W}}}, {"model.w", "head.w"}),
    "several models": ({"G": {"w": W}, "D": {"w": W}, "g_ema": SHADOW, "d_optim": STATE}, {"G.w", "D.w"}),
    "several models and a tensor": ({"G": {"w": W}, "D": {"w": W}, "mean": W, "loss": W[0]}, {"G.w", "D.w", "mean"}),
    "student and teacher": ({"student": {"w": W}, "teacher": SHADOW}, {"w"}),
    "model and average": ({"model": {"w": W}, "model_avg": SHADOW, "sampler": {"seed": W}}, {"w"}),
    "ema beside the model": ({"ema": SHADOW, "model": {"w": W}}, {"w"}),
    "Composer": ({"state": {"model": {"w": W}, "optimizers": {"Adam": STATE}}, "rng": [{"torch": W}]}, {"w"}),
    "a config beside": ({"model": {"state_dict": {"w": W}, "config": {"dim": 3}}}, {"w"}),
    "numbers for names": ({"model": {0: {"w": W}}}, {"0.w"}),
    "lists": ({"model": {"w": W}, "optimizer": [STATE]}, {"w"}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_what_the_model_is(tmp_path: Path, case: str) -> None:
    """For the converting program, and for the reader."""
    saved, expected = SHAPES[case]
    program: dict[str, Any] = {}
    source = unsupported._WRITE.replace("@TRAINING_STATE", unsupported.TRAINING_STATE)
    exec(source.replace("@MODELS", repr(unsupported.MODELS)), program)
    found = dict(program["flat"](program["weights"](saved)))
    assert found.keys() == expected
    assert all(tensor.any() for tensor in found.values())
    torch.save(saved, tmp_path / "saved.pt")
    header, data = read_pickle(tmp_path / "saved.pt"), (tmp_path / "saved.pt").read_bytes()
    assert header.entries.keys() == expected
    assert all(any(data[entry.offset : entry.offset + entry.nbytes]) for entry in header.entries.values())


# --- the trainers' own tools ---

ZERO_TO_FP32 = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
parser.add_argument("checkpoint_dir", type=pathlib.Path)
parser.add_argument("output_dir", type=pathlib.Path)
parser.add_argument("--safe_serialization", action="store_true")
parser.add_argument("-t", "--tag")
asked = parser.parse_args()
assert asked.safe_serialization
asked.output_dir.mkdir(parents=True, exist_ok=True)
(piece,) = (asked.checkpoint_dir / asked.tag).glob("*_model_states.pt")
shutil.copy(piece, asked.output_dir / "model.safetensors")
"""
"""Takes what DeepSpeed's script takes; the pieces are whole in these tests."""


@pytest.mark.parametrize(
    ("inside", "directory", "converted"),
    [
        ("checkpoint-{0}/global_step{0}", "checkpoint-{0}", "my run"),
        ("global_step{0}", "", "my run-safetensors"),
        ("epoch=0-step={0}.ckpt/checkpoint", "epoch=0-step={0}.ckpt", "my run-safetensors"),
    ],
    ids=["a Trainer's", "by itself", "Lightning's"],
)
def test_deepspeed(tmp_path: Path, inside: str, directory: str, converted: str) -> None:
    run = tmp_path / "my run"
    for step in STEPS:
        folder = run / inside.format(step)
        folder.mkdir(parents=True)
        save_file({"w": torch.ones(2) * step}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        torch.save(STATE, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        (run / directory.format(step) / "zero_to_fp32.py").write_text(ZERO_TO_FP32)
    lines = printed("ema", run)
    assert any(converted in line for line in lines)
    done = in_shell(command_of(lines))
    assert done.returncode == 0, done.stderr
    check_mean(tmp_path / converted, lambda step: {"w": torch.ones(2) * step})


TOOLS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "verl": (
        "global_step_{}",
        ("actor/model_world_size_8_rank_0.pt",),
        "-m verl.model_merger merge --backend fsdp --local_dir RUN/global_step_{}/actor "
        "--target_dir OUT/global_step_{}",
    ),
    "Megatron": (
        "iter_{:07d}",
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        '-c "import sys; from megatron.bridge import AutoBridge as B; '
        "B.from_hf_pretrained('BASE_MODEL').export_ckpt(*sys.argv[1:])\" RUN/iter_{:07d} OUT/iter_{:07d}",
    ),
    "NeMo": (
        "megatron_gpt--step={}.nemo",
        (),
        "scripts/checkpoint_converters/convert_llama_nemo_to_hf.py --input_name_or_path RUN/megatron_gpt--step={}.nemo "
        "--output_path pytorch_model.bin --hf_input_path BASE_MODEL --hf_output_path OUT/megatron_gpt--step={}",
    ),
    "GPT-NeoX": (
        "global_step{}",
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        "tools/ckpts/convert_neox_to_hf.py --input_dir RUN/global_step{} --config_file CONFIG.yml "
        "--output_dir OUT/global_step{}",
    ),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tools_get_each_checkpoint(tmp_path: Path, case: str) -> None:
    """Run for every checkpoint, with its own paths, until one fails."""
    name, files, expected = TOOLS[case]
    run = tmp_path / "it's my run"
    for step in STEPS:
        for path in [run / name.format(step) / file for file in files] or [run / name.format(step)]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not to be unpickled")
    command = command_of(printed("ema", run))
    filled = [shlex.split(expected.format(step, step)) for step in STEPS]
    places = (("RUN", str(run)), ("OUT", f"{run}-safetensors"))
    for old, new in places:
        filled = [[word.replace(old, new) for word in line] for line in filled]
    assert said_to(tmp_path / "tools", command) == filled


def test_the_first_that_fails_ends_it(tmp_path: Path) -> None:
    for step in STEPS:
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    (tmp_path / "zero_to_fp32.py").write_text("import sys\nprint('called')\nsys.exit(3)\n")
    done = in_shell(command_of(printed("ema", tmp_path)))
    assert (done.returncode, done.stdout) == (3, "called\n")
