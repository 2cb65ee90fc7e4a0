"""Running statistics get a convex average, for any scheme and name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.run import running_statistics
from ckavg.output.weight_files import sha256
from ckavg.schemes import Scheme
from tests.cli.runner import run_cli
from tests.runs import write_run
from tests.trainers import batch_norm

STEPS = tuple(range(0, 110, 10))
SIGNED: list[Scheme] = [
    ckavg.BEMA(),
    ckavg.BEMA(eta=0.0),
    ckavg.BEMA(burn_in=15),
    ckavg.OUEMA(),
    ckavg.DEMA(),
    ckavg.DEMA(kappa=0.1),
]
STATISTICS = {
    *("bn.running_mean", "bn.running_var", "in.running_std", "keras.moving_mean", "keras.moving_variance"),
    *("obs.mean", "obs.var", "obs.count", "rsl._mean", "rsl._std", "reward.std", "norm.buffer_state.std"),
    *("vq.cluster_size", "vq.embed", "vq.embed_avg", "vq2._ema_cluster_size", "vq2._ema_w", "loss.grad_var"),
    *("vae.latents_mean", "vae.latents_std", "bn.num_batches_tracked", "running_mean", "flax/bn/var", "flax/bn/mean"),
}
WEIGHTS = {
    *("bn.weight", "bn.bias", "pi.log_std", "pi.logstd", "vae.fc_logvar", "head.mean", "mean.weight", "std.weight"),
    *("q_proj.weight", "embed.weight", "variance.proj.bias", "ema_model.layer.weight", "attention.min", "log_var"),
}


def test_names() -> None:
    assert running_statistics(STATISTICS | WEIGHTS) == STATISTICS


def run_of(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Variances that fall to a hundredth: extrapolated, they are negative."""
    return [
        {
            "fc.weight": torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).mul(1 + step / 50).to(dtype),
            "bn.running_var": torch.full((8,), 4.0 * 0.9**step + 0.01).to(dtype),
            "bn.running_mean": torch.full((8,), step * 1e-2).to(dtype),
            "bn.num_batches_tracked": torch.tensor(step),
            "obs.var": torch.tensor([4.0 * 0.8**step + 1e-3, 1.0]).to(dtype),
            "obs.count": torch.tensor(float(step)).to(dtype),
        }
        for step in STEPS
    ]


def convex(scheme: Scheme, values: list[Tensor]) -> Tensor:
    """The recursion of E in float64, from the scheme's own β."""
    coefficients = scheme.coefficients(ckavg.schemes.Timeline(STEPS))
    average = values[coefficients.start].double()
    for beta, value in zip(coefficients.betas, values, strict=True):
        average = average if beta is None else (1 - beta) * average + beta * value.double()
    return average


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_what_was_read(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoints = run_of(dtype)
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    for number, scheme in enumerate(SIGNED):
        done = ckavg.average(run, scheme, out=tmp_path / str(number))
        result = load_file(done.directory / "model.safetensors")
        assert done.uncorrected == ("bn.running_mean", "bn.running_var", "obs.count", "obs.var")
        assert sum("Running statistics, so averaged without the correction" in each for each in done.warnings) == 1
        for name in done.uncorrected:
            values = torch.stack([each[name] for each in checkpoints])
            assert (values.amin(0) <= result[name]).all()
            assert (result[name] <= values.amax(0)).all()
            precision = max(torch.finfo(dtype).eps, 1e-14)
            torch.testing.assert_close(
                result[name].double(), convex(scheme, list(values)), rtol=precision, atol=0, check_dtype=False
            )
        assert result["bn.num_batches_tracked"] == STEPS[-1]
        assert (result["fc.weight"].abs() > 0).all()
        assert ckavg.verify_result(done.directory, replay=True).problems == ()


def test_schemes_that_are_convex_say_nothing(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path / "run", run_of(torch.float32), STEPS))
    for scheme in (ckavg.EMA(), ckavg.PEMA(), ckavg.Mean(), ckavg.BEMA(eta=float("inf"))):
        done = ckavg.average(run, scheme)
        assert done.uncorrected == ()
        assert not any("statistics" in each for each in done.warnings)


def test_snapshots(tmp_path: Path) -> None:
    run = ckavg.open_run(write_run(tmp_path / "run", run_of(torch.float32), STEPS))
    done = ckavg.average(run, ckavg.BEMA(), snapshot_every=30)
    for place in (done.directory, *(done.directory / each.name for each in done.outputs[:-1])):
        assert (load_file(place / "model.safetensors")["obs.var"] > 0).all()
    assert ckavg.verify_result(done.directory, replay=True).problems == ()


@pytest.mark.parametrize("verb", ["bema", "ouema", "dema"])
def test_a_model_that_outputs_numbers(tmp_path: Path, verb: str) -> None:
    batch_norm(tmp_path)
    dry = run_cli(verb, tmp_path, "--dry-run")
    assert "Running statistics" in dry.stderr
    done = run_cli(verb, tmp_path, "--json")
    record = json.loads(done.stdout)
    assert record["uncorrected"] == ["bn.running_mean", "bn.running_var"]
    weights = load_file(Path(record["outputs"][0]["directory"]) / "model.safetensors")
    norm = torch.nn.BatchNorm1d(8).eval()
    norm.load_state_dict({name.removeprefix("bn."): each for name, each in weights.items() if name[:3] == "bn."})
    assert torch.isfinite(norm(torch.randn(4, 8))).all()


def test_a_result_with_the_correction_is_noticed(tmp_path: Path) -> None:
    """Like old results, whose records name no running statistics."""
    checkpoints = run_of(torch.float32)
    done = ckavg.average(ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS)), ckavg.BEMA(eta=0.0))
    path, weights = done.directory / "model.safetensors", load_file(done.directory / "model.safetensors")
    weights["obs.var"] += checkpoints[-1]["obs.var"] - checkpoints[0]["obs.var"]
    save_file(weights, path, {"format": "pt"})
    record = json.loads((done.directory / "ckavg.json").read_bytes())
    del record["uncorrected"]
    record["outputs"][0]["sha256"]["model.safetensors"] = sha256(path.read_bytes())
    (done.directory / "ckavg.json").write_text(json.dumps(record))
    first, second = ckavg.verify_result(done.directory, replay=True).problems
    assert first.startswith("uncorrected names nothing; the running statistics of the result are bn.running_mean")
    assert "'obs.var'" in second
