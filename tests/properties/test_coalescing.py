"""Small tensors give to the bit what each gives alone, however they lie in the files and whatever they hold."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ckavg
from ckavg.averaging.replay import Average, Replayed, replay
from ckavg.engine import coalescing
from ckavg.engine.blocks import BLOCK, CHUNK, Block
from ckavg.engine.coalescing import Group, by_dtype, cut_groups
from ckavg.engine.context import Context
from ckavg.engine.distributed import PassJournal
from ckavg.errors import CkavgError
from ckavg.output.weight_files import WeightFiles, plan_weights
from ckavg.path.measure import measure
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, Mean, Scheme, Timeline
from tests.writers import Kept

STEPS = (0, 5, 6, 30)
CODES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn},
}
SIZES = st.sampled_from(
    [0, 1, 2, 3, 7, 125, 128, 129, 255, 512, 1000, 1023, 1024, 1025, 4095, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]
)
FLOATING = st.sampled_from(["F32", "F32", "F32", "BF16", "BF16", "F16", "F64"])
OTHER = st.sampled_from(["I64", "U8", "BOOL", "F8_E4M3"])
SPECIAL = st.sampled_from(["", "", "", "", "negative zero", "nan", "inf", "same inf", "huge", "tiny", "constant"])
SCHEMES: tuple[Scheme, ...] = (Mean(), EMA(), EMA(gamma=0.0), BEMA(), OUEMA(), DEMA())


@contextmanager
def each_alone() -> Iterator[None]:
    """The plain path: no tensor is small enough to be joined to others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalescing, "SMALL", 0)
        yield


def write(directory: Path, step: int, tensors: Mapping[str, tuple[str, Tensor]], order: Sequence[str]) -> None:
    """One checkpoint whose file holds its tensors in this order."""
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    declared, data = {}, b""
    for name in order:
        code, tensor = tensors[name]
        stored = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        declared[name] = {
            "dtype": code,
            "shape": [len(tensor)] if len(tensor) else [0, 4],
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    text = json.dumps(declared).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


@st.composite
def runs(draw: st.DrawFn) -> Callable[[Path], ckavg.Run]:
    """Some checkpoints of tensors of any kind; many of them are alike, so that there are groups."""
    common = st.tuples(st.just(draw(FLOATING)), st.sampled_from([draw(SIZES), draw(SIZES)]), st.just(""))
    kind = st.one_of(common, common, st.tuples(FLOATING, SIZES, SPECIAL), st.tuples(OTHER, SIZES, st.just("")))
    kinds = [*draw(st.lists(kind, min_size=2, max_size=14)), ("F32", 100, "")]
    names = [f"t{number}" for number in range(len(kinds))]
    orders = [draw(st.permutations(names)) if draw(st.booleans()) else names for _ in STEPS]
    changed = draw(st.sampled_from([None, None, None, "F32", "BF16"]))
    seed = draw(st.integers(0, 1000))

    def build(path: Path) -> ckavg.Run:
        generator = torch.Generator().manual_seed(seed)
        first = [torch.randn(size, generator=generator) for _, size, _ in kinds]
        for place, (step, order) in enumerate(zip(STEPS, orders, strict=True)):
            tensors = {}
            for name, (code, size, special), anchor in zip(names, kinds, first, strict=True):
                theta = anchor + 0.1 * place * torch.randn(size, generator=generator)
                own = changed if changed and place == 0 and code in ("F32", "BF16") else code
                tensors[name] = own, as_stored(anchor if special == "constant" else theta, own, special, place)
            write(path / ("base" if changed and not place else f"checkpoint-{step}"), step, tensors, order)
        return ckavg.open_run(path, init=path / "base" if changed else None)

    return build


def as_stored(theta: Tensor, code: str, special: str, place: int) -> Tensor:
    """A tensor of a dtype, with something special in its middle."""
    dtype = CODES[code]
    if code == "F8_E4M3":
        return torch.zeros(len(theta)).to(dtype)  # copied, where it is the same everywhere
    if not dtype.is_floating_point:
        return (8 * theta).to(torch.int64).to(dtype)
    stored = 1e-200 * theta.double() if special == "tiny" and code == "F64" else theta.to(dtype)
    value = {
        "negative zero": -0.0,
        "nan": float("nan") if place == 2 else None,
        "inf": float("inf") if place == 2 else None,
        "same inf": float("-inf"),
        "huge": torch.finfo(dtype).max * (1 if place % 2 else -1),
    }.get(special)
    if value is not None and len(stored):
        stored[len(stored) // 2] = value
    return stored


def outcome(work: Callable[[], Any]) -> Any:
    """What comes of it; of an error, what it says."""
    try:
        return work()
    except CkavgError as error:
        return type(error), str(error)


def measured(run: ckavg.Run, context: Context, *, allow_nonfinite: bool) -> str:
    return repr(outcome(lambda: measure(run, context=context, allow_nonfinite=allow_nonfinite).tensors))


def averaged(
    run: ckavg.Run, schemes: Sequence[Scheme], context: Context, *, by_tensor: bool = False, **options: Any
) -> Any:
    """What pass 2 tells, and the bytes that each average consists of, after the last checkpoint and one before it."""
    sizes = {name: entry.numel * 8 for name, entry in run.tensors.items()}
    wanted, writers = [], []
    for place, scheme in enumerate(schemes):
        coefficients = scheme.coefficients(Timeline(run.steps))
        if by_tensor:
            own = {name: tuple(b and b / 2 for b in coefficients.betas) for name in list(run.tensors)[::3]}
            coefficients = replace(coefficients, tensor_betas=own, uncorrected=tuple(list(run.tensors)[::4]))
        code = ("source", "F32", "BF16", "F64", "F16")[place % 5]
        dtypes = {name: entry.dtype if code == "source" else code for name, entry in run.tensors.items()}
        writers.append([Kept(sizes), Kept(sizes)])
        wanted.append(Average(coefficients, dtypes, dict(zip((2, 3), writers[-1], strict=True))))

    def work() -> tuple[Replayed, list[list[dict[str, bytearray]]]]:
        told = replay(run, wanted, context=context, **options)
        return told, [[each.tensors for each in pair] for pair in writers]

    return outcome(work)


@settings(max_examples=25)
@given(
    build=runs(),
    tile=st.sampled_from([CHUNK, CHUNK * 4, BLOCK]),
    threads=st.integers(1, 3),
    schemes=st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=6),
    by_tensor=st.booleans(),
    wide=st.booleans(),
    allow_nonfinite=st.booleans(),
)
def test_tensors_joined_are_what_they_are_alone(
    build: Callable[[Path], ckavg.Run],
    tile: int,
    threads: int,
    schemes: Sequence[Scheme],
    by_tensor: bool,
    wide: bool,
    allow_nonfinite: bool,
) -> None:
    joined, plain = Context(threads=threads, tile=tile), Context(threads=1)
    with tempfile.TemporaryDirectory() as directory:
        run = build(Path(directory))
        options = {"by_tensor": by_tensor, "wide": wide, "allow_nonfinite": allow_nonfinite}
        with each_alone():
            path = measured(run, plain, allow_nonfinite=allow_nonfinite)
            result = averaged(run, schemes, plain, **options)
        if threads > 1 and isinstance(result[0], type):  # of several errors, any thread's may come first
            assert averaged(run, schemes, joined, **options)[0] is result[0]
            return
        assert measured(run, replace(joined, threads=1), allow_nonfinite=allow_nonfinite) == path
        assert averaged(run, schemes, joined, **options) == result


@settings(max_examples=15)
@given(build=runs(), done=st.sets(st.integers(0, 20)), seed=st.integers(0, 100))
def test_what_is_done_already_is_not_done_again(build: Callable[[Path], ckavg.Run], done: set[int], seed: int) -> None:
    """What is left of a group is another group, and gives the same."""
    found: dict[str, dict[int, Any]] = {}

    def noting(name: str, *_: object) -> PassJournal[Any]:
        return PassJournal({}, (), found.setdefault(name, {}).update)

    def continuing(name: str, *_: object) -> PassJournal[Any]:
        kept = {place: result for place, result in found[name].items() if place in done}
        return PassJournal(kept, kept.keys(), lambda _: None)

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)
        run = build(Path(directory))
        whole = averaged(run, [EMA()], Context(threads=2), allow_nonfinite=True, journals=noting)
        if isinstance(whole[0], type):
            return
        rest = averaged(run, [EMA()], Context(threads=2), allow_nonfinite=True, journals=continuing)
        assert replace(rest[0], bytes_read=0) == replace(whole[0], bytes_read=0)
        for (one,), (other,) in zip(zip(whole[1][0]), zip(rest[1][0]), strict=True):
            assert {name: one[name] for name in other} == other


def test_groups_hold_what_fits_and_is_alike() -> None:
    blocks = [Block(name, 0, size) for name, size in (("a", 9), ("b", 9), ("c", 70_000), ("d", 5), ("e", 5), ("f", 6))]
    assert cut_groups(blocks, lambda block: block.name < "f" or None) == [2, 3, 5, 6]
    many = [Block(str(number), 0, 125) for number in range(3000)]
    assert cut_groups(many, lambda _: 1) == [1024, 2048, 3000]
    assert cut_groups(many, lambda _: 1, tile=CHUNK)[0] == CHUNK // 128
    assert cut_groups(many, lambda _: 1, threads=8)[:2] == [366, 732]
    assert cut_groups([], lambda _: 1) == []


@settings(max_examples=30)
@given(build=runs(), tile=st.sampled_from([CHUNK, CHUNK * 4]))
def test_every_tensor_has_a_slot_of_its_own(build: Callable[[Path], ckavg.Run], tile: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = build(Path(directory))
    blocks = [Block(name, 0, each.numel) for name, each in run.tensors.items() if each.is_floating and each.numel]
    key, start = by_dtype(run.checkpoints), 0
    for end in cut_groups(blocks, key, tile=tile):
        own, start = blocks[start:end], end
        assert len({key(block) for block in own}) == 1
        for group in (Group(own), Group.padded(own)[0]) if len(own) > 1 else ():
            assert group.size <= tile
            ends = (group.starts + group.sizes)[:-1]
            assert (ends <= group.starts[1:]).all()


def test_bytes_are_written_side_by_side_or_not(tmp_path: Path) -> None:
    """What is handed on together is in the file as if it came one by one."""
    tensors = {f"t{number}": ("F32", torch.randn(size)) for number, size in enumerate((3, 1, 0, 8, 5))}
    for step in (0, 1):
        write(tmp_path / f"checkpoint-{step}", step, tensors, list(tensors))
    shards = plan_weights(ckavg.open_run(tmp_path).last).shards
    data = {name: memoryview(tensor.numpy().tobytes()) for name, (_, tensor) in tensors.items()}
    for where, names in ("one", ["t3", "t0", "t1"]), ("other", ["t0", "t1", "t3"]):
        with WeightFiles(tmp_path / where, shards) as files:
            files.put_whole({name: data[name] for name in names})
            files.put_whole({"t4": data["t4"]})
    one, other = ((tmp_path / where / "model.safetensors").read_bytes() for where in ("one", "other"))
    assert one == other
    assert one.endswith(b"".join(data.values()))
