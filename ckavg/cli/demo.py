"""`ckavg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckavg.average import average
from ckavg.cli.failures import failures
from ckavg.cli.options import Json, Verbose
from ckavg.cli.progress import show_steps
from ckavg.engine.ranks import Ranks
from ckavg.errors import OutputExistsError, SettingError, WriteError
from ckavg.result.record import Averaged
from ckavg.schemes import BEMA, EMA, PEMA
from ckavg.sources import open_run

if TYPE_CHECKING:
    from ckavg.demo.train import TrainedRun

DEFAULT_DIRECTORY = Path("ckavg-demo")


def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the checkpoints go.", show_default=str(DEFAULT_DIRECTORY))
    ] = DEFAULT_DIRECTORY,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoints of an earlier demo in DIR.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a small model, save its checkpoints, average them, and compare.

    Takes about a minute on two cores and 60 MB of disk; needs no network and no GPU. The model learns Python's own
    manual, byte by byte; its checkpoints are saved as the Hugging Face Trainer saves them.
    """
    with failures(verbose=verbose):
        if Ranks.of_environment().world > 1:
            raise SettingError("demo: this is work for one process.", hint="Start it without torchrun.")
        trained = _train(directory, force=force)
        run = open_run(directory)
        results = [average(run, scheme, force=True) for scheme in (EMA(), PEMA(), BEMA())]
        _compare(trained, run.last.path, results, as_json=as_json)


def _train(directory: Path, *, force: bool) -> TrainedRun:
    from ckavg.demo.train import remove_earlier, train

    try:
        if force:
            remove_earlier(directory)
        with show_steps("training a small language model") as on_progress:
            return train(directory, on_progress=on_progress)
    except FileExistsError as error:
        raise OutputExistsError(str(error), hint="--force replaces the checkpoints of an earlier demo.") from error
    except OSError as error:
        raise WriteError(f"{directory} cannot be written: {error.strerror}.") from error


def _compare(trained: TrainedRun, last: Path, results: list[Averaged], *, as_json: bool) -> None:
    from ckavg.demo.evaluate import held_out_loss
    from ckavg.report import demo as report

    losses = {"last checkpoint": held_out_loss(last)}
    losses |= {result.outputs[-1].name: held_out_loss(result.directory) for result in results}
    report.print_comparison(trained.directory, losses, results, as_json=as_json)
