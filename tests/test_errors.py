"""Every kind of error, raised by what a user does, and what it is made of."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ckavg
from ckavg import errors
from ckavg.averaging.held_out import held_out_loss
from ckavg.averaging.pipeline import do_part
from ckavg.engine.context import Context
from ckavg.engine.distributed import Ranks
from tests.runs import save_old, write_checkpoint, write_run

STEPS = (0, 10, 20)
MODEL = "checkpoint-20/model.safetensors"


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"w": torch.full((4, 4), float(value)), "b": torch.arange(4.0) + value}


def averaged(run: Path) -> ckavg.Averaged:
    return ckavg.average(ckavg.open_run(run), ckavg.EMA())


def _no_checkpoints(run: Path) -> None:
    ckavg.open_run(run / "nowhere")


def _too_few(run: Path) -> None:
    ckavg.open_run(run, last=1)


def _unsupported(run: Path) -> None:
    (run / MODEL).unlink()
    save_old(weights(), run / "checkpoint-20" / "pytorch_model.bin")
    ckavg.open_run(run)


def _duplicate(run: Path) -> None:
    write_checkpoint(run / "step_20", weights())
    ckavg.open_run(run)


def _mixed_order(run: Path) -> None:
    write_checkpoint(run / "epoch_3", weights())
    ckavg.open_run(run)


def _mismatch(run: Path) -> None:
    save_file({"w": torch.ones(2)}, run / MODEL)
    ckavg.open_run(run)


def _missing_shard(run: Path) -> None:
    (run / MODEL).rename(run / "checkpoint-20" / "model-00001-of-00002.safetensors")
    ckavg.open_run(run)


def _truncated(run: Path) -> None:
    (run / MODEL).write_bytes((run / MODEL).read_bytes()[:-1])
    ckavg.open_run(run)


def _corrupt(run: Path) -> None:
    (run / MODEL).write_bytes(b"\xff" * 100)
    ckavg.open_run(run)


def _changed(run: Path) -> None:
    opened = ckavg.open_run(run)
    (run / MODEL).touch()
    ckavg.average(opened, ckavg.EMA())


def _nonfinite(run: Path) -> None:
    save_file(weights(torch.nan), run / MODEL)
    averaged(run)


def _record(run: Path) -> None:
    ckavg.verify_result(run)


def _read(run: Path) -> None:
    opened = ckavg.open_run(run)
    (run / MODEL).unlink()
    ckavg.average(opened, ckavg.EMA())


def _setting(run: Path) -> None:
    ckavg.EMA(gamma=-1.0)


def _exists(run: Path) -> None:
    result = averaged(run).directory
    ckavg.average(ckavg.open_run(run), ckavg.Mean(), out=result)


def _write(run: Path) -> None:
    (run / "averaged").write_text("a file")
    averaged(run)


def _output(run: Path) -> None:
    ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=run)


def _ranks(run: Path) -> None:
    Ranks.from_environment()


def _missing_parts(run: Path) -> None:
    plan = ckavg.plan_average(ckavg.open_run(run), ckavg.PEMA())
    do_part(plan, Context(ranks=Ranks(1, 2, mode="part")))


def _hub(run: Path) -> None:
    ckavg.push(averaged(run).directory, "owner/name")  # the tests are offline


def _evaluation(run: Path) -> None:
    held_out_loss(run, run / "checkpoint-10" / "config.json")  # a run is no model


def _combined(run: Path) -> None:
    for step in (10, 20):
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    ckavg.open_run(run)


CASES: dict[type[errors.CkavgError], Callable[[Path], None]] = {
    errors.NoCheckpointsError: _no_checkpoints,
    errors.TooFewCheckpointsError: _too_few,
    errors.UnsupportedFormatError: _unsupported,
    errors.DuplicateStepError: _duplicate,
    errors.MixedOrderError: _mixed_order,
    errors.MismatchError: _mismatch,
    errors.MissingShardError: _missing_shard,
    errors.TruncatedShardError: _truncated,
    errors.CorruptFileError: _corrupt,
    errors.ChangedError: _changed,
    errors.NonFiniteError: _nonfinite,
    errors.RecordError: _record,
    errors.ReadError: _read,
    errors.SettingError: _setting,
    errors.OutputError: _output,
    errors.OutputExistsError: _exists,
    errors.WriteError: _write,
    errors.RanksError: _ranks,
    errors.MissingPartsError: _missing_parts,
    errors.HubError: _hub,
    errors.EvaluationError: _evaluation,
    errors.CombinedError: _combined,
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: str(kind.__name__))
def test_raised(kind: type[errors.CkavgError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [weights(step) for step in STEPS], STEPS)
    if kind is errors.RanksError:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(name, "many")
    with pytest.raises(kind) as met:
        CASES[kind](run)
    error = met.value
    assert type(error) is kind
    assert error.message.endswith(".") or kind is errors.CombinedError
    assert error.hint or kind in (errors.SettingError, errors.CombinedError)
    again = pickle.loads(pickle.dumps(error))  # as it goes from one process to another
    assert (type(again), str(again)) == (kind, str(error))


def test_there_are_no_others() -> None:
    def below(kind: type[errors.CkavgError]) -> set[type[errors.CkavgError]]:
        ours = [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]  # tests have some, too
        return {kind}.union(*(below(each) for each in ours))

    roots = {errors.CkavgError, errors.RunError, errors.CheckpointError}
    assert below(errors.CkavgError) == roots | CASES.keys()
    drawn = re.findall(r"^[│├└─ ]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert {*drawn} == {kind.__name__ for kind in below(errors.CkavgError)}
