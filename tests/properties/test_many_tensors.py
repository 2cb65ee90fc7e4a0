"""What is done at once for many tensors comes to what is done for each, or anew, in the plain way."""

from __future__ import annotations

import hashlib
import json
import string
import struct
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ckavg.checkpoints.adapters import hold_factors
from ckavg.checkpoints.fingerprints import with_tensors
from ckavg.checkpoints.run import ITEM_BYTES, Checkpoint, Run, Selection, Shard, TensorInfo
from ckavg.output.weight_files import plan_weights
from ckavg.path.table import PathLength, TensorLengths, TensorPath, TensorPaths
from ckavg.storage.journal import as_line, parsed_line
from ckavg.storage.table import load_table, save_table

NAMES = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('."\\/\x00\x1f\u2028é')), max_size=6)
KINDS = st.sampled_from(["F64", "F32", "BF16", "I64", "BOOL"])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def checkpoint(kinds: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], step: int = 1) -> Checkpoint:
    entries = {name: TensorInfo(*kind, shard=0, offset=place) for place, (name, kind) in enumerate(kinds.items())}
    path = Path("run") / f"checkpoint-{step}"
    shard = Shard(path / "model.safetensors", 0, metadata=metadata)
    return Checkpoint(step, path, "model", (shard,), (), entries, ())


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.tuples(KINDS, SHAPES), min_size=1),
    st.dictionaries(NAMES, NAMES, max_size=2),
)
def test_the_header_of_a_result_is_json_as_the_library_writes_it(
    kinds: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    like = checkpoint(kinds, metadata)
    declared: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, entry in sorted(like.entries.items(), key=lambda item: (-item[1].item_bytes, item[1].offset)):
        begin, end = end, end + entry.numel * ITEM_BYTES[entry.dtype]
        declared[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(declared, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    (planned,) = plan_weights(like).shards
    assert planned.header == struct.pack("<Q", len(text)) + text
    assert planned.nbytes == len(planned.header) + end


@given(st.lists(st.text(st.sampled_from("lora_AB.x"), max_size=9)))
def test_factors_are_told_by_any_part_of_any_name(names: list[str]) -> None:
    prefixes = ("lora_", "x")
    assert hold_factors(names, prefixes) == any(part.startswith(prefixes) for name in names for part in name.split("."))


NUMBERS = st.floats(0, 1e6) | st.sampled_from([float("nan"), float("inf")])


@given(st.dictionaries(st.text(string.ascii_letters, max_size=3), st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=6))
def test_paths_of_tensors_formed_when_asked_for(measured: dict[str, tuple[float, float, float]]) -> None:
    tensors = {name: TensorPath(4, sigma, (first, second)) for name, (sigma, first, second) in measured.items()}
    path = PathLength((0, 1, 2), TensorPaths.of(tensors), "exclude", 0)
    plain = {name: path.tensor_lengths(name) for name in path.counted}
    lazy = TensorLengths(path)
    assert dict(lazy) == plain == lazy
    assert [lazy.get(name) for name in measured] == [plain.get(name) for name in measured]
    assert "absent" not in lazy


@given(st.lists(st.integers(0, 1), min_size=2, max_size=6))
def test_what_headers_declare_is_never_that_of_another_table(tables: list[int]) -> None:
    both = [checkpoint({"w": ("F32", (2,))}, {}), checkpoint({"w": ("F32", (3,))}, {})]
    run = Run(Path("run"), Selection(), tuple(both[number] for number in tables), ())
    own = {number: json.dumps([["w", "F32", [2 + number], 0, 0]]) for number in (0, 1)}
    assert [b"".join(text).decode() for _, text in with_tensors(run)] == [f", {own[number][1:]}" for number in tables]


VALUES = st.dictionaries(NAMES, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES, max_size=4)


@settings(deadline=None)
@given(VALUES)
def test_a_table_is_its_values_and_then_their_checksum(values: dict[str, object]) -> None:
    table = {"format": 2, **values} | {"format": 2}
    table.pop("sha256", None)
    plain = json.dumps(table, separators=(",", ":")).encode()
    stated = {**table, "sha256": hashlib.sha256(plain).hexdigest()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "table.json")
        save_table(file, table)
        assert file.read_bytes() == json.dumps(stated, separators=(",", ":")).encode()
        assert load_table(file, 2, most_bytes=1 << 20) == json.loads(plain)


@given(VALUES)
def test_a_line_of_a_journal_is_compact_json(values: dict[str, object]) -> None:
    line = as_line(values)
    assert line.partition(b" ")[2] == json.dumps(values, separators=(",", ":")).encode() + b"\n"
    assert parsed_line(line.rstrip(b"\n")) == values
