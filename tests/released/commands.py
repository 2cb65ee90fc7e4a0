"""Small runs, the same on every machine, and the commands whose outcomes are held still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.runs import write_checkpoint, write_run
from tests.trainers import PT, note, put

Shapes = Mapping[str, tuple[int, ...]]

LLAMA: Shapes = {
    "model.embed_tokens.weight": (96, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (3, 30_011),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.norm.weight": (64,),
}
LARGER: Shapes = {f"model.layers.{place}.mlp.up_proj.weight": (512, 512) for place in range(4)}
ADAPTER: Shapes = {
    f"base_model.model.model.layers.{place}.self_attn.q_proj.lora_{half}.weight": shape
    for place in range(2)
    for half, shape in (("A", (4, 64)), ("B", (64, 4)))
}
MIXED: Shapes = {
    "half.weight": (33, 129),
    "double.weight": (7, 5),
    "bn.running_var": (9,),
    "scalar": (),
    "empty.weight": (0, 4),
}
DTYPES = {"half.weight": torch.float16, "double.weight": torch.float64}
FIXED = {"position_ids": torch.arange(10), "mask": torch.tensor([True, False])}
"""Tensors that are not averaged."""

COMMANDS: dict[str, list[str]] = {
    "schemes": [
        "pema plain",
        "pema plain --json --gamma 0.3 --out out/pema-json",
        "pema plain --scope tensor --quiet",
        "pema plain --pairing next --clock updates --path-exclude *norm* --zero-sigma eps --quiet",
        "pema plain --sample 0.5 --quiet --out out/pema-sample",
        "pema plain --snapshot-every 200 --quiet --out out/pema-snapshots",
        "pema plain --dtype float32 --quiet --out out/pema-float32",
        "pema plain --dtype float16 --every 200 --init base --quiet --out out/pema-every",
        "bema plain --init base --init-step 50",
        "bema plain --eta inf --kappa 0.4 --multiplier 2 --lag 5 --burn-in 150 --quiet",
        "bema plain --form author --no-bias-correction --json --out out/bema-author",
        "ema plain",
        "ema plain --gamma 0.5 --tau 10 --json --out out/ema-json --accumulate float64",
        "ema plain --momentum 0.99 --batch-scale 4 --quiet",
        "ema plain --momentum 0.7 --momentum-per update --snapshot-every 100 --quiet --out out/momentum",
        "ouema plain --init base",
        "dema plain --kappa 0.6",
        "mean plain --last 3",
        "mean plain --decay minus-sqrt --from-step 200 --to-step 400 --quiet --out out/mean-decay",
        "mean plain --decay cosine --steps 100,300,500 --json --out out/mean-cosine",
        "mean plain --skip-step 300 --copy *.txt --card card.md --quiet --out out/mean-copy",
    ],
    "sweep and path": [
        "path plain --csv path.csv --plot path.svg",
        "path plain --json",
        "path plain --sample 0.25 --json --last 4",
        "pema plain --dry-run",
        "pema plain --dry-run --json --snapshot-every 200 --init base",
        "sweep plain pema:gamma=0.1,0.2 mean --dry-run",
        "sweep plain pema:gamma=0.1,0.2 mean",
        "sweep plain ema:gamma=0.9 last --json --out out --eval-goal max --eval 'wc -c < {dir}/model.safetensors'",
    ],
    "inspect and verify": [
        "inspect plain",
        "inspect plain --json",
        "inspect plain --deep",
        "inspect plain --deep --json",
        "inspect sharded --json",
        "inspect adapter",
        "inspect mixed --deep --json",
        "inspect missing",
        "inspect missing --json",
        "inspect nan --deep",
        "pema plain --quiet",
        "verify plain/averaged/pema-gamma0.15",
        "verify plain/averaged/pema-gamma0.15 --json",
        "pema plain --json",
        "ls plain --json",
        "diff plain/averaged/pema-gamma0.15 plain/checkpoint-500 --json",
        "verify plain/averaged/pema-gamma0.15 --replay --seed 1",
        "verify plain/averaged/pema-gamma0.15 --replay --seed 1 --json",
        "flip plain/averaged/pema-gamma0.15/model.safetensors",
        "verify plain/averaged/pema-gamma0.15",
        "verify plain/averaged/pema-gamma0.15 --json",
        "pema plain --quiet --force",
        "flip plain/checkpoint-300/model.safetensors",
        "verify plain/averaged/pema-gamma0.15 --replay --seed 1 --json",
    ],
    "other runs": [
        "pema sharded --json",
        "bema sharded --dtype bfloat16 --snapshot-every 20 --quiet",
        "verify sharded/averaged/pema-gamma0.15 --replay --seed 1",
        "pema adapter --json",
        "mean adapter --quiet",
        "verify adapter/averaged/pema-gamma0.15 --replay --seed 1 --json",
        "pema mixed --json",
        "bema mixed --quiet",
        "dema mixed --dtype float32 --quiet",
        "pema nan --allow-nonfinite --json",
        "ema missing --skip-incomplete --json",
    ],
    "refused": [
        "pema missing",
        "pema nan",
        "pema nowhere",
        "ema empty",
        "ema plain --gamma -1",
        "ema plain --gamma x",
        "pema plain --gamma nan",
        "mean plain --unknown",
        "mean plain --last 0",
        "mean plain --steps 100,250",
        "mean plain --copy *.bin",
        "sweep plain pema:gama=1",
        "pema plain --out base",
        "bema plain --quiet",
        "bema plain",
        "bema plain --dtype float32",
        "verify plain",
        "verify nowhere",
        "push plain lab/out",
    ],
    "remote": [
        "inspect hf://lab/run --revisions step* --json",
        "pema hf://lab/run --revisions step* --max-disk 1MB --dry-run --json --out out/bounded",
        "pema hf://lab/run --revisions step* --max-disk 1MB --json --out out/bounded",
        "pema hf://lab/run --revisions step*",
        "pema hf://lab/run --revisions step* --quiet",
        "verify averaged/pema-gamma0.15 --replay --seed 1",
        "verify averaged/pema-gamma0.15 --replay --seed 1 --fetch --json",
        "ema hf://lab/run --revisions none*",
        "inspect s3://runs/sharded --json",
        "pema s3://runs/sharded --json --out out/s3",
        "mean s3://runs/sharded --max-disk 1MB --last 2 --quiet --out out/s3-mean",
        "mean s3://runs/sharded --max-disk 1MB --last 2 --quiet --out out/s3-mean",
        "mean s3://runs/nowhere",
        "push averaged/pema-gamma0.15 lab/pushed --json",
        "mean plain --push-to-hub lab/second --public --json",
    ],
    "interrupted": [
        "kill path sharded",
        "pema sharded --quiet",
        "kill replay again",
        "pema again --quiet",
    ],
    "demo": ["demo small --json", "demo small"],
}
"""By scenario, which has a directory of its own, the commands in order. Three words are not ckavg's: `kill PASS RUN`
averages and is killed in that pass, `flip FILE` changes a byte, and the training of `demo` is cut short.
"""


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [−0.5, 0.5), float64, of a generator that numpy has promised never to change."""
    return torch.from_numpy(np.asarray(np.random.RandomState(seed).random_sample(shape) - 0.5))


def weights(shapes: Shapes, place: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of one checkpoint: each takes one more step of a random walk; a norm stays, a variance is around 1."""
    found: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = 0.1 * uniform(number, shape) + ("running_var" in name)
        for step in range(1, place + 1):
            values = values + 0.02 * uniform(100 * step + number, shape)
        found[name] = (torch.ones(shape) if "norm" in name else values).to(DTYPES.get(name, dtype))
    return found


def write_trained(root: Path, shapes: Shapes, steps: Sequence[int], dtype: torch.dtype, *, shards: int = 1) -> None:
    """A run as the Trainer leaves it."""
    write_run(root, [weights(shapes, place, dtype) | FIXED for place in range(len(steps))], steps, shards=(shards,))
    for step in steps:
        (root / f"checkpoint-{step}/notes.txt").write_text(f"step {step}")
        log = [{"step": each, "loss": 3 - each / 1000} for each in steps if each <= step]
        note(root / f"checkpoint-{step}/trainer_state.json", {"global_step": step, "log_history": log})


def write_inputs(root: Path) -> None:
    """All runs that the commands name, in one directory."""
    write_trained(root / "plain", LLAMA, (100, 200, 300, 400, 500), torch.bfloat16)
    write_trained(root / "sharded", LARGER, (0, 10, 20, 30), torch.float32, shards=3)
    write_trained(root / "again", LARGER, (0, 10, 20, 30), torch.float32, shards=3)
    write_trained(root / "mixed", MIXED, (10, 20, 30), torch.float32)
    write_trained(root / "missing", LLAMA, (10, 20, 30), torch.float32, shards=2)
    (root / "missing/checkpoint-20/model-00002-of-00002.safetensors").unlink()
    write_trained(root / "nan", MIXED, (10, 20), torch.float32)
    diverged = weights(MIXED, 2, torch.float32)
    diverged["bn.running_var"][3] = torch.nan
    write_checkpoint(root / "nan/checkpoint-30", diverged | FIXED, step=30)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    for place, step in enumerate((10, 20, 30)):
        here = root / f"adapter/checkpoint-{step}"
        put(here / "adapter_model.safetensors", weights(ADAPTER, place, torch.float32), PT)
        note(here / "adapter_config.json", config)
        note(here / "trainer_state.json", {"global_step": step})
    put(root / "base/model.safetensors", weights(LLAMA, 7, torch.bfloat16), PT)
    (root / "empty").mkdir()
    (root / "card.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nA text of my own.\n")


def flip(path: Path) -> None:
    """Change one byte of the weights, and nothing else."""
    data = bytearray(path.read_bytes())
    data[-500] ^= 0x40
    path.write_bytes(data)
