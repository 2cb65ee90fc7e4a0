"""`ckavg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckavg.averaging.pipeline import average
from ckavg.averaging.sources import open_run
from ckavg.cli.errors import failures
from ckavg.cli.options import Json, Verbose, folder
from ckavg.cli.tables import Table
from ckavg.cli.text import Output, print_json, say
from ckavg.engine.distributed import Ranks
from ckavg.errors import SettingError
from ckavg.output.commands import shell_word
from ckavg.output.record import Record
from ckavg.schemes import BEMA, EMA, PEMA
from ckavg.storage.address import AddressPath, is_meant_for_address

DEFAULT_DIRECTORY = Path("ckavg-demo")


def demo(
    directory: Annotated[
        Path, folder("DIR", "Where the checkpoints go.", show_default=str(DEFAULT_DIRECTORY))
    ] = DEFAULT_DIRECTORY,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoints of an earlier demo in DIR.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a small model, save its checkpoints, average them, and compare.

    Takes about a minute on one core and 60 MB of disk; needs no network and no GPU. The model learns Python's own
    manual, byte by byte; its checkpoints are saved as the Hugging Face Trainer saves them.
    """
    with failures(verbose=verbose):
        if Ranks.from_environment().world > 1:
            raise SettingError("demo: this is work for one process.", hint="Start it without torchrun.")
        if is_meant_for_address(directory):
            raise SettingError(f"demo: {AddressPath(directory)} is no directory of this machine.", hint="Name one.")
        from ckavg.demo import held_out_loss, remove_earlier, train

        if force:
            remove_earlier(directory)
        train(directory, on_progress=_say_tenths)
        run = open_run(directory)
        say("averaging the checkpoints, and computing the loss of each average")
        results = [average(run, scheme, force=True) for scheme in (EMA(), PEMA(), BEMA())]
        losses = {"last checkpoint": held_out_loss(Path(run.last.path))}
        losses |= {result.outputs[-1].name: held_out_loss(result.directory) for result in results}
        if as_json:
            print_json({"held_out_loss": losses, "averages": [result.to_dict() for result in results]})
        else:
            print_comparison(directory, losses, results)


def _say_tenths(done: int, total: int, loss: float) -> None:
    """Say how far the training has come, at every tenth of its steps."""
    if done * 10 // total > (done - 1) * 10 // total:
        say(f"training a small language model: step {done} of {total}, loss {loss:.3f}")


def print_comparison(run: Path, losses: dict[str, float], results: list[Record]) -> None:
    """Print held-out losses, nats per byte, side by side; the last checkpoint's is the first."""
    out, steps = Output(), results[0].steps
    last, best = next(iter(losses.values())), min(losses.values())
    table = Table("", "held-out loss", "against the last checkpoint", left=("",))
    for name, loss in losses.items():
        change = "" if loss is last else f"{100 * (loss / last - 1):+.2f} %"
        table.add_row(name, f"{loss:.4f}", change, style="good" if loss == best else "")
    title = f"{len(steps)} checkpoints of one training run in {run}, steps {steps[0]} to {steps[-1]}"
    out.line(title, style="bold", wrap=True)
    out.line("Loss on text that no training saw, in nats per byte: lower is better.", wrap=True)
    out.line()
    out.table(table)
    out.line()
    out.fact("results", results[0].directory.parent, style="path")
    out.fact("next", f"ckavg inspect {shell_word(str(run))}", style="command")
    out.fact("", f"ckavg pema {shell_word(str(run))} --gamma 0.2", style="command")
