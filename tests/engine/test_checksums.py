"""The checksums in the record, against sums of whole files by another library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.engine.blocks import BLOCK, CHUNK
from tests.runs import random_run, write_run

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def checksum(directory: Path) -> str:
    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        if not tensor.is_floating_point():
            continue
        data, width = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), CHUNK * tensor.itemsize
        for start in range(0, tensor.numel(), BLOCK):
            block = data[start * tensor.itemsize : (start + BLOCK) * tensor.itemsize]
            sums = [
                np.frombuffer(block[place : place + width].ljust(width, b"\0"), "<u8").sum(dtype=np.uint64)
                for place in range(0, len(block), width)
            ]
            digest = hashlib.sha256(np.array(sums, "<u8").tobytes()).hexdigest()[:32]
            whole.update(json.dumps([name, CODES[tensor.dtype], list(tensor.shape), start, digest]).encode())
    return whole.hexdigest()


@pytest.mark.parametrize("dtype", CODES)
def test_against_numpy(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = random_run(3, 3, dtype)
    for number, each in enumerate(weights):
        each["blocks"] = torch.randn(BLOCK + CHUNK + 7, generator=torch.Generator().manual_seed(number)).to(dtype)
    source = write_run(tmp_path / "run", weights, (0, 10, 20), shards=(1, 2))
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA())
    assert [each.checksum for each in result.inputs] == [
        checksum(source / f"checkpoint-{step}") for step in (0, 10, 20)
    ]
    digests = result.outputs[0].sha256
    assert digests.keys() == set(result.outputs[0].files) - {"ckavg.json"}
    for name, digest in digests.items():
        assert hashlib.sha256((result.directory / name).read_bytes()).hexdigest() == digest


def test_what_is_not_read_has_none(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run", random_run(3, 3, torch.float32), (0, 10, 20))
    result = ckavg.average(ckavg.open_run(source), ckavg.BEMA(burn_in=10))
    assert [each.checksum is None for each in result.inputs] == [True, False, False]
