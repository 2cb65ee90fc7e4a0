"""Study: factors or products of low-rank adapters; `python -m benchmarks.evidence.adapters [DIR]`.

PEFT trains LoRA adapters of SmolLM2-135M on Shakespeare, in float32 and at constant rates. Each run is averaged by its
factors, by its products, and by its products cut to the rank of the run. PEFT loads the results, which are evaluated on
held-out plays. With `DIR`, runs are kept there, and not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import ckavg
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.tables import Difference, Table, publish, write_record
from benchmarks.finetune import (
    TO_TRAIN,
    RefusedError,
    load_original,
    refuse_missing,
    windows_to_judge,
    windows_to_train,
)

SCHEMES: Mapping[str, ckavg.Scheme] = {"mean": ckavg.Mean(), "PEMA": ckavg.PEMA()}
LAST = "last"
FACTORS, PRODUCT, TRUNCATED = "factors", "product", "product, R = r"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: the rank of its adapters, α being twice that, and its learning rate."""

    rank: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Its name in tables and directories."""
        return f"rank {self.rank}, rate {self.learning_rate:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs have in common.

    Attributes:
        steps: optimizer steps of a run.
        every: steps between checkpoints, and before the first.
        warm_up: steps over which the rate rises.
        batch: windows a step, of 128 tokens each.
        seed: of the order in which the text is read, and of A.
        windows: number of held-out windows.
        cells: the runs.
    """

    steps: int = 64
    every: int = 8
    warm_up: int = 4
    batch: int = 2
    seed: int = 0
    windows: int = 24
    cells: tuple[Cell, ...] = field(default=tuple(Cell(rank, rate) for rate in (5e-4, 2e-3) for rank in (8, 16)))


def train(directory: Path, cell: Cell, setting: Setting) -> None:
    """Write `directory`/checkpoint-N, adapters as PEFT saves them, unless they exist."""
    if (directory / f"checkpoint-{setting.steps}").exists():
        return
    import peft

    torch.manual_seed(setting.seed)
    model, tokenizer = load_original()
    config = peft.LoraConfig(r=cell.rank, lora_alpha=2 * cell.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.float(), config)
    windows = torch.tensor(windows_to_train(tokenizer))
    order = torch.randperm(len(windows))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=cell.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / setting.warm_up))
    for step in range(1, setting.steps + 1):
        batch = windows[order[(step - 1) * setting.batch : step * setting.batch]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % setting.every == 0:
            model.save_pretrained(directory / f"checkpoint-{step}")


@dataclass(slots=True)
class Outcome:
    """The outcome of a run: held-out losses of each window in nats per token, and the energy that cut products lose.

    Both are by scheme and by what is averaged, except `last`.
    """

    cell: Cell
    losses: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    discarded: dict[tuple[str, str], float] = field(default_factory=dict)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)


def carry_out_cell(cell: Cell, setting: Setting, directory: Path) -> Outcome:
    """Train, average and judge one run below a directory."""
    outcome, run = Outcome(cell), directory / cell.name
    train(run, cell, setting)
    model, tokenizer = load_original()
    base, windows = model.float().eval(), torch.tensor(windows_to_judge(tokenizer, setting.windows))
    outcome.losses[LAST, ""] = losses_of(base, run / f"checkpoint-{setting.steps}", windows)
    kinds = {FACTORS: ("factors", None), PRODUCT: ("product", None), TRUNCATED: ("product", cell.rank)}
    for name, scheme in SCHEMES.items():
        for kind, (lora, rank) in kinds.items():
            out = run / "averaged" / f"{name}, {kind}"
            record = ckavg.average(ckavg.open_run(run), scheme, out=out, lora=lora, rank=rank, force=True)
            outcome.losses[name, kind] = losses_of(base, out, windows)
            outcome.ranks[name, kind] = json.loads((out / "adapter_config.json").read_text())["r"]
            outcome.discarded[name, kind] = record.output.discarded_energy or 0.0
    return outcome


def losses_of(base: Any, adapter: Path, windows: torch.Tensor) -> list[float]:
    """The mean loss of each window with an adapter, as PEFT loads it; `base` is as before afterwards."""
    import peft

    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        losses = [
            cross_entropy(model(input_ids=each[None]).logits[0, :-1], each[1:]).item()  # one at a time: no padding
            for each in windows
        ]
    model.unload()
    return losses


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """All losses, and their differences from the last checkpoint and from the averaged factors, window by window."""
    rows: list[tuple[str | int | float | None, ...]] = []
    for outcome in outcomes:
        last = outcome.losses[LAST, ""]
        rows.append((outcome.cell.name, LAST, "", outcome.cell.rank, statistics.fmean(last), None, None, None))
        for (scheme, kind), losses in outcome.losses.items():
            if scheme == LAST:
                continue
            lost = 100 * outcome.discarded[scheme, kind] if kind == TRUNCATED else None
            against: list[str | None] = [_less(losses, last)]
            against.append(_less(losses, outcome.losses[scheme, FACTORS]) if kind != FACTORS else None)
            rank = outcome.ranks[scheme, kind]
            rows.append((outcome.cell.name, scheme, kind, rank, statistics.fmean(losses), *against, lost))
    columns = ("run", "scheme", "averaged", "rank", "loss", "less last", "less factors", "energy cut off, %")
    return Table("adapters", columns, tuple(rows))


def _less(losses: Sequence[float], others: Sequence[float]) -> str:
    return Difference.of([one - other for one, other in zip(losses, others, strict=True)]).marked


def main(arguments: Sequence[str] = ()) -> int:
    """Run it, then write the table and the settings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.adapters", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help="where runs are kept; default: nowhere")
    options, setting = parser.parse_args(arguments), Setting()
    try:
        refuse_missing((*TO_TRAIN, "peft"))
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch, single_threaded() as pool:
        work = partial(carry_out_cell, setting=setting, directory=options.directory or Path(scratch))
        found = list(pool.map(work, setting.cells))
    publish([table_of(found)])
    write_record("adapters", dataclasses.asdict(setting))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
