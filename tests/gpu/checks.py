"""What a GPU must do: the same as the CPU of that machine, but for the order of the roundings.

Each check takes an empty directory and a device. With the CPU itself as the device they check one another.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import ckavg
from ckavg.averaging.replay import Average, replay
from ckavg.checkpoints.run import DTYPE_NAMES
from ckavg.engine.blocks import BLOCK, CHUNK, TILE
from ckavg.engine.context import Context
from ckavg.engine.devices import tuned
from ckavg.engine.reader import Files
from ckavg.engine.tiles import TORCH_DTYPES, TileReader
from ckavg.path.estimate import estimate
from ckavg.path.measure import measure
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Last, Mean, MomentumEMA, Scheme, Timeline
from tests import reference
from tests.gpu.agreement import (
    Dropped,
    assert_close,
    assert_same_path,
    formed,
    large_run,
    loaded,
    refusal,
    small_run,
    terms_of,
    timeline_of,
)
from tests.runs import random_run, write_run

Check = Callable[[Path, str], None]

SCHEMES: tuple[Scheme, ...] = (
    PEMA(),
    PEMA(gamma=0.6, scope="tensor"),
    EMA(),
    EMA(gamma=0.9),
    EMA(gamma=0.0),
    MomentumEMA(momentum=0.99),
    BEMA(),
    BEMA(burn_in=6),
    BEMA(kappa=0.0),
    OUEMA(),
    DEMA(),
    Mean(),
    Mean(decay="linear"),
    Mean(decay="minus-sqrt"),
    Last(),
)
SWEEP: tuple[Scheme, ...] = (*(PEMA(gamma=power) for power in (0.05, 0.1, 0.15)), BEMA(), BEMA(), EMA(), DEMA(), Mean())

_MOST_BYTES = 4_000_000_000


def check_averages(directory: Path, device: str, *, dtype: torch.dtype, wide: bool = False) -> None:
    """Every scheme, all of them from one reading, by several threads."""
    run = small_run(directory, dtype)
    path, terms = measure(run), terms_of(run)
    context = Context(device=device, threads=3)
    got = formed(run, SCHEMES, context, wide=wide, path=path)
    want = formed(run, SCHEMES, Context(threads=1), wide=wide, path=path)
    accumulated = torch.float64 if wide or dtype == torch.float64 else torch.float32
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, terms, accumulated)


def check_outputs(directory: Path, device: str) -> None:
    """Every output dtype, from either accumulation dtype."""
    run = small_run(directory, torch.float32)
    path, terms = measure(run), terms_of(run)
    for dtype in TORCH_DTYPES:
        for wide in (False, True):
            both = [
                formed(run, (BEMA(),), Context(device=on), wide=wide, dtype=dtype, path=path) for on in (device, "cpu")
            ]
            assert_close(both[0][0], both[1][0], terms, torch.float64 if wide else torch.float32)


def check_path(directory: Path, device: str, *, dtype: torch.dtype) -> None:
    """ℓ to 1e-9: of a tensor of millions of elements, and coarser of one whose float32 sums have fewer to even out."""
    tolerance = 1e-13 if dtype == torch.float64 else 1e-9
    run = large_run(directory / "large", dtype)
    assert_same_path(measure(run, context=Context(device=device, tile=BLOCK)), measure(run), tolerance)
    run = small_run(directory / "small", dtype, steps=range(40))
    assert_same_path(measure(run, context=Context(device=device)), measure(run), 10 * tolerance)


def check_tiles(directory: Path, device: str, *, dtype: torch.dtype) -> None:
    """Neither tiles nor threads change a byte of what a device computes."""
    run = large_run(directory, dtype)
    path, schemes = measure(run), (PEMA(), OUEMA())
    plain = Context(device=device, threads=1, tile=CHUNK)
    tensors, averages = measure(run, context=plain).tensors, formed(run, schemes, plain, path=path)
    for tile, threads in ((TILE, 2), (BLOCK >> 1, 8), (BLOCK, 4)):
        tuned = Context(device=device, threads=threads, tile=tile)
        assert measure(run, context=tuned).tensors == tensors
        for one, other in zip(formed(run, schemes, tuned, path=path), averages, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)


def check_nonfinite(directory: Path, device: str) -> None:
    """NaN and infinity are refused in the words of the CPU, even where a scheme forgets them."""
    for place, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        weights = random_run(place, 4, torch.bfloat16)
        weights[1 + place % 2]["tiles"][2, -1] = value
        run = ckavg.open_run(write_run(directory / str(place), weights, range(4)))
        healthy = Timeline(run.steps, (0.0, 0.1, 0.2, 0.3))
        for scheme in (EMA(), BEMA(), Mean(), EMA(gamma=0.0), PEMA()):
            average = Average(
                scheme.coefficients(healthy),
                {name: entry.dtype for name, entry in run.tensors.items()},
                {3: Dropped()},
            )
            said = [refusal(partial(replay, run, [average], context=Context(device=on))) for on in (device, "cpu")]
            assert said[0] == said[1]
            assert f"step {1 + place % 2}: tensor 'tiles' holds NaN or infinity (1 of" in said[0]
        said = [refusal(partial(measure, run, context=Context(device=on))) for on in (device, "cpu")]
        assert said[0] == said[1]


def check_constants(directory: Path, device: str) -> None:
    """The same infinities, and −0, stay what they are."""
    row = torch.tensor([-torch.inf, torch.inf, -0.0, 0.0, 1.0] * 5000)
    for dtype in (torch.bfloat16, torch.float64):
        weights = [{"w": row.to(dtype), "v": torch.arange(9.0) * step} for step in range(4)]
        run = ckavg.open_run(write_run(directory / str(dtype), weights, range(4)))
        path = measure(run, context=Context(device=device))
        assert_same_path(path, measure(run), 1e-6)
        for each in formed(run, (EMA(), BEMA(), Mean(), EMA(gamma=0.0)), Context(device=device), path=path):
            assert torch.equal(each["w"].view(torch.uint8), row.to(dtype).view(torch.uint8))


def check_overflow(directory: Path, device: str) -> None:
    """Averages that do not fit are refused; what overflows on the way is not."""
    weights = [{"w": torch.tensor([0.0, 1.0] * 600) * 3e38 * sign} for sign in (1.0, -1.0)]
    run = ckavg.open_run(write_run(directory / "far", weights, (0, 1)))
    context = Context(device=device)
    path = measure(run, context=context)
    np.testing.assert_allclose(path.tensors["w"].distances, [600 * 2 * 3e38], rtol=1e-6)
    for wide, accumulated in ((False, torch.float32), (True, torch.float64)):
        assert_close(
            formed(run, (EMA(),), context, wide=wide, path=path)[0],
            formed(run, (EMA(),), Context(), wide=wide, path=path)[0],
            terms_of(run),
            accumulated,
        )
    # Finite weights whose sum is not, in a scheme that forgets, so that every checkpoint is looked at.
    large = [{"w": torch.full((2000,), 3e38)} for _ in range(2)]
    run = ckavg.open_run(write_run(directory / "large", large, (0, 1)))
    forgetful = (EMA(gamma=0.0),)
    assert torch.equal(formed(run, forgetful, context)[0]["w"], large[1]["w"])
    assert "does not fit F16" in refusal(partial(formed, run, forgetful, context, dtype="F16"))


def check_mixed_dtypes(directory: Path, device: str) -> None:
    """An anchor of a narrower or a wider dtype than the checkpoints."""
    for place, (of_anchor, of_run) in enumerate(
        ((torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float16))
    ):
        weights = random_run(place, 4, of_run)
        base = {name: each.to(of_anchor) if each.is_floating_point() else each for name, each in weights[0].items()}
        write_run(directory / f"base-{place}", [base], (0,))
        source = write_run(directory / f"run-{place}", weights[1:], (10, 20, 30))
        run = ckavg.open_run(source, init=directory / f"base-{place}" / "checkpoint-0")
        path = measure(run)
        assert_same_path(measure(run, context=Context(device=device)), path, 1e-8)
        wide = torch.float64 in (of_anchor, of_run)
        got, want = (formed(run, (PEMA(), BEMA()), Context(device=on), path=path) for on in (device, "cpu"))
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, terms_of(run), torch.float64 if wide else torch.float32)


def check_sample(directory: Path, device: str) -> None:
    """An estimated path is that of the CPU to the last bit."""
    run = large_run(directory, torch.bfloat16)
    got, want = (estimate(run, 0.01, context=Context(device=on)) for on in (device, "cpu"))
    assert got.tensors == want.tensors


def check_whole(directory: Path, device: str) -> None:
    """From checkpoints to a checkpoint, through the public functions, with snapshots on the way."""
    for dtype in TORCH_DTYPES.values():
        root = directory / str(dtype)
        # Two copies of a run: what is measured of one is kept, and would be taken for the other.
        run, same = (small_run(root / name, dtype, steps=(0, 10, 20, 30, 40)) for name in ("run", "same"))
        results = [
            ckavg.average(run, PEMA(), device=device, snapshot_every=20),
            ckavg.average(same, PEMA(), device="cpu", snapshot_every=20),
        ]
        assert results[0].path_length is not None
        assert results[1].path_length is not None
        np.testing.assert_allclose(results[0].path_length, results[1].path_length, rtol=1e-8)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        for one, other in zip(results[0].outputs, results[1].outputs, strict=True):
            got, want = (loaded(output.directory) for output in (one, other))
            whole = {name for name, tensor in want.items() if not tensor.is_floating_point()}
            assert all(torch.equal(got[name], want[name]) for name in whole)
            floating = want.keys() - whole
            assert_close(
                {name: got[name] for name in floating},
                {name: want[name] for name in floating},
                terms_of(run),
                accumulated,
            )


def check_buffers(directory: Path, device: str) -> None:
    """With the arithmetic far behind the reading, no buffer is filled again before it is free."""
    run = large_run(directory, torch.bfloat16, numel=32 * CHUNK)
    stored = [reference.load_floats(Path(checkpoint.path))["large"] for checkpoint in run.checkpoints]
    with Files(threads=1) as files:
        reader = TileReader(run.checkpoints, files, tile=CHUNK)
        reader.compute_on(device)
        outs, wanted = [], []
        for turn in range(32):
            if device != "cpu" and turn % 5 == 0:
                torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # cycles: about 10 ms
            for index, whole in enumerate(stored):
                outs.append(torch.empty(CHUNK, device=device))
                reader.load(index, "large", turn * CHUNK, outs[-1])
                wanted.append(whole[turn * CHUNK : (turn + 1) * CHUNK])
        for out, want in zip(outs, wanted, strict=True):
            np.testing.assert_array_equal(out.cpu().double().numpy(), want)


def check_memory(directory: Path, device: str) -> None:
    """A sweep of 8 in float64 by as many threads as there are: bounded, whatever the size of a tensor."""
    run = large_run(directory, torch.float64, numel=BLOCK if device == "cpu" else 9 * BLOCK)
    context = tuned(Context(device=device), averages=len(SWEEP))
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    path = measure(run, context=context)
    dtypes = dict.fromkeys(run.tensors, "BF16")
    timeline = timeline_of(run, path)
    averages = [Average(scheme.coefficients(timeline), dtypes, {3: Dropped()}) for scheme in SWEEP]
    replay(run, averages, context=context)
    if device != "cpu":
        taken = torch.cuda.max_memory_reserved(device)
        assert taken <= _MOST_BYTES, f"{taken / 1e9:.2f} GB"


def check_auto(directory: Path, device: str) -> None:
    """A small run does not wake a GPU."""
    source = write_run(directory, random_run(0, 3, torch.float32), range(3))
    code = "import sys, torch, ckavg; ckavg.average(ckavg.open_run(sys.argv[1]), ckavg.PEMA()); "
    code += "sys.exit(torch.cuda.is_initialized())"
    subprocess.run([sys.executable, "-c", code, str(source)], check=True, cwd=Path(__file__).parents[2])


def _named() -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for code, dtype in TORCH_DTYPES.items():
        name = DTYPE_NAMES[code]
        checks[f"averages-{name}"] = partial(check_averages, dtype=dtype)
        checks[f"path-{name}"] = partial(check_path, dtype=dtype)
        checks[f"tiles-{name}"] = partial(check_tiles, dtype=dtype)
    checks["averages-wide"] = partial(check_averages, dtype=torch.bfloat16, wide=True)
    others = (
        check_outputs,
        check_nonfinite,
        check_overflow,
        check_mixed_dtypes,
        check_sample,
        check_whole,
        check_buffers,
        check_memory,
        check_auto,
    )
    return checks | {check.__name__.removeprefix("check_"): check for check in others}


CHECKS = _named()
