"""Stage *report*: what the demo shows."""

from __future__ import annotations

from pathlib import Path

from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.result.record import Averaged


def print_comparison(run: Path, losses: dict[str, float], results: list[Averaged], *, as_json: bool) -> None:
    """Print the held-out loss of the last checkpoint and of each average, side by side.

    Args:
        run: where the checkpoints are.
        losses: nats per byte on the held-out text, by name; the last checkpoint's first.
        results: the averages.
        as_json: one JSON object instead of a table.
    """
    if as_json:
        print_json({"held_out_loss": losses, "averages": [result.to_dict() for result in results]})
        return
    console = stdout_console()
    last, best = next(iter(losses.values())), min(losses.values())
    table = plain_table("", "held-out loss", "against the last checkpoint", left=("",))
    for name, loss in losses.items():
        change = "" if loss is last else f"{100 * (loss / last - 1):+.2f} %"
        table.add_row(quoted(name), f"{loss:.4f}", change, style="bold" if loss == best else "")
    steps = results[0].steps
    console.print(
        quoted(f"{len(steps)} checkpoints of one training run in {run}, steps {steps[0]} to {steps[-1]}"), style="bold"
    )
    console.print("Loss on text that no training saw, in nats per byte: lower is better.\n")
    console.print(table)
    console.print()
    console.print(quoted(f"The averages are in {results[0].directory.parent}."), soft_wrap=True)
    console.print(
        quoted(f"Next: ckavg inspect {run}, or try another power: ckavg pema {run} --gamma 0.2"), soft_wrap=True
    )
