"""Headers that were damaged or made to do harm. The safetensors library is the judge of what may be read."""

from __future__ import annotations

import contextlib
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from tests.exhaustive import few_or_all
from tests.hostile.contract import (
    MODEL,
    REPEATABLE,
    STEPS,
    check_mean,
    check_refusal,
    mean_of,
    write_small_run,
)
from tests.hostile.values import render, spoilt

SOUND = {
    "__metadata__": {"format": "pt"},
    "ids": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    "w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [32, 80]},
}
DATA = bytes(80)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 9)) == 0:  # not spoilt at all, but as few programs write it
        order = draw(st.permutations(list(SOUND)))
        told = draw(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))))
        text = render({name: SOUND[name] for name in order} | {"__metadata__": told}).encode()
        return struct.pack("<Q", len(text)) + text + DATA
    text = draw(spoilt(SOUND))
    if draw(st.booleans()):
        text += b" " * (-len(text) % 8)
    length = draw(
        st.just(len(text)) | st.just(len(text)) | st.just(len(text)) | st.integers(0, 2**64 - 1) | st.integers(0, 400)
    )
    data = draw(st.sampled_from([DATA] * 6 + [DATA[:-1], DATA + b"\0", b"", DATA * 2]))
    return struct.pack("<Q", length) + text + data


def library_reads(file: Path) -> dict[str, tuple[torch.dtype, torch.Size]] | None:
    """What the safetensors library finds, None where it refuses."""
    with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return None


@pytest.mark.parametrize("examples", few_or_all(40, 400))
def test_headers(tmp_path: Path, examples: int) -> None:
    run = write_small_run(tmp_path / "run")
    file = run / f"checkpoint-{STEPS[-1]}" / MODEL
    expected = library_reads(file)
    seen: dict[bytes, str] = {}

    @settings(REPEATABLE, max_examples=examples)
    @given(files())
    def check(damaged: bytes) -> None:
        file.write_bytes(damaged)
        result = mean_of(run)
        if result.exit_code:
            check_refusal(result, run, f"checkpoint-{STEPS[-1]}/{MODEL}", f"step {STEPS[-1]}")
            if "in the header of the weights, " in result.stderr:
                seen[damaged] = "an entry that the others lack"  # and that may change what the tensors mean
            else:
                seen[damaged] = "refused" if library_reads(file) != expected else "refused here alone"
            return
        assert library_reads(file) == expected
        check_mean(run, {str(step): [run / f"checkpoint-{step}" / MODEL] for step in STEPS}, run / "averaged" / "mean")
        seen[damaged] = "read"

    check()
    sys.stdout.write(f"{len(seen)} distinct examples\n")  # shown with -rP
    told = Counter(seen.values())
    assert told["refused"] >= examples * 3 // 4
    assert told["read"] >= examples // 20
    assert told["refused here alone"] <= 5, [text for text, what in seen.items() if what == "refused here alone"]
