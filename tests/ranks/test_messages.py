"""What processes tell each other, to the last bit; and that nothing else comes of bytes, whoever has sent them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckavg
from ckavg import errors
from ckavg.averaging.replay import BlockResult
from ckavg.engine import messages
from ckavg.engine.messages import ELSEWHERE, FAILED, HEAD, VALUE, packed, unpacked
from ckavg.errors import CkavgError, CombinedError, RanksError, SettingError
from ckavg.output.record import Evaluation
from ckavg.path.cache import CachedPath
from ckavg.path.estimate import _Sums
from ckavg.path.measure import _Partial
from ckavg.path.plan import plan_path
from tests.runs import random_run, write_run


def sent(value: Any) -> Any:
    """A value as it arrives."""
    message = packed(VALUE, value)
    kind, length = HEAD.unpack(message[: HEAD.size])
    assert (kind, length) == (VALUE, len(message) - HEAD.size)
    return unpacked(message[HEAD.size :])


def bits(value: Any) -> Any:
    """A value with its floats as what they are made of, such that it can be compared; a NaN is a NaN."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, list | tuple):
        return type(value), [bits(each) for each in value]
    if isinstance(value, dict):
        return [(bits(key), bits(each)) for key, each in value.items()]
    return type(value), value


texts = st.text(st.characters(exclude_categories=()))  # lone surrogates, too: names that are no text
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.builds(Path, texts.filter(lambda t: "\0" not in t))
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers() | texts | st.tuples(st.integers(), texts), inner)
    ),
)


@given(value=values)
def test_plain_values(value: Any) -> None:
    assert bits(sent(value)) == bits(value)


def test_floats_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=generator)
    numbers = [*patterns.view(torch.float64).tolist(), 0.0, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf]
    assert bits(sent(numbers)) == bits(numbers)


def test_what_passes_and_records_are_made_of(tmp_path: Path) -> None:
    run = ckavg.open_run(
        write_run(tmp_path / "run", random_run(seed=1, count=4, dtype=torch.bfloat16), (0, 10, 20, 30), shards=(1, 2))
    )
    before = plan_path(run, exclude=["no*"])
    result = ckavg.average(run, ckavg.PEMA(), snapshot_every=20)
    for value in (
        before,
        plan_path(run),
        CachedPath.empty(run),
        result,
        dataclasses.replace(result, evaluation=Evaluation("cat {dir}/x", 0.1)),
        {7: BlockResult("ab", (0, 3), (1, 0))},
        [(_Partial((0.1, math.inf), -0.0, 5e-324),)],
    ):
        assert sent(value) == value
    assert plan_path(run).cached.sigmas  # or little was compared
    sums = _Sums(16, torch.rand(3, 5, dtype=torch.float64), torch.tensor([[math.inf, -0.0]] * 3, dtype=torch.float64))
    got = sent(sums)
    assert got.length == 16
    for there, here in ((got.distances, sums.distances), (got.shifted, sums.shifted)):
        assert there.dtype == torch.float64
        assert torch.equal(there.view(torch.int64), here.view(torch.int64))


def test_classes_are_where_they_are_looked_for() -> None:
    for name, module in messages._CLASSES.items():
        assert dataclasses.is_dataclass(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), torch.zeros(1), SettingError, print, 1j])
def test_nothing_else_is_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="is not among what processes tell each other"):
        packed(VALUE, [value])


def test_what_is_too_large_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST", 1000)
    assert sent([0.5] * 800) == [0.5] * 800
    too_large: list[object] = [[0.5] * 1100, "x" * 40_000, [[]] * 1000]
    for large in too_large:
        with pytest.raises(RanksError, match="is too large"):
            packed(VALUE, large)


# --- errors ---


def every_error() -> list[CkavgError]:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CkavgError)]
    plain: list[CkavgError] = [kind("what", hint="do") for kind in kinds if kind is not CombinedError]
    return [*plain, CombinedError([plain[0], SettingError("two\nlines", hint="and a hint")])]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_our_errors_arrive_as_what_they_are(error: CkavgError) -> None:
    error.add_note("What was measured is kept.")
    try:
        raise error
    except CkavgError as raised:
        got = sent(raised)
    assert (type(got), got.message, got.hint, str(got)) == (type(error), error.message, error.hint, str(error))
    kept, trace = got.__notes__
    assert kept == "What was measured is kept."
    assert trace.startswith(ELSEWHERE + "Traceback (most recent call last)")
    assert "in test_our_errors_arrive" in trace
    if isinstance(error, CombinedError):
        assert [(type(each), each.message, each.hint) for each in got.errors] == [
            (type(each), each.message, each.hint) for each in error.errors
        ]
    for copy in (pickle.loads(pickle.dumps(error)),):  # as multiprocessing sends them
        assert (type(copy), str(copy), copy.hint) == (type(error), str(error), error.hint)


class _OfNobodyElseError(CkavgError):
    pass


class _SpeechlessError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (MemoryError(), MemoryError, ""),
        (SystemExit(130), SystemExit, "130"),
        (SystemExit("why"), SystemExit, "1"),
        (SystemExit(), SystemExit, "0"),
        (OSError(28, "No space", "a"), OSError, "[Errno 28] No space: 'a'"),
        (OSError(28, "No space"), OSError, "[Errno 28] No space"),
        (FileNotFoundError(2, "No such file", Path("a")), FileNotFoundError, "[Errno 2] No such file: 'a'"),
        (TimeoutError("late"), OSError, "late"),
        (ZeroDivisionError("division by zero"), RuntimeError, "ZeroDivisionError: division by zero"),
        (KeyError("a"), RuntimeError, "KeyError: 'a'"),
        (_OfNobodyElseError("what", hint="do"), RuntimeError, "_OfNobodyElseError: what"),
        (_SpeechlessError(), RuntimeError, "_SpeechlessError: "),
    ],
)
def test_other_exceptions(error: BaseException, kind: type[BaseException], text: str) -> None:
    got = sent(error)
    assert (type(got), str(got).partition("\n")[0]) == (kind, text)
    assert got.__notes__[-1].startswith(ELSEWHERE)


@pytest.mark.parametrize(
    "name", ["functools", "Any", "listed", "raise_all", "__builtins__", "Exception", "eval", "", "os"]
)
def test_no_other_name_makes_an_error_of_its_own(name: str) -> None:
    got = unpacked(json.dumps({"error": [name, ["id"], "", []]}).encode())
    assert (type(got), str(got)) == (RuntimeError, f"{name}: id")


def test_no_error_commands_a_terminal() -> None:
    """The text of an exception from outside is printed as it is, and so are notes."""
    got = unpacked(json.dumps({"error": ["X", ["\x1b]0;title\x07a\nb"], "", ["\x1b[2J"]]}).encode())
    assert str(got) == "X: \\x1b]0;title\\x07a\nb"
    assert got.__notes__ == ["\\x1b[2J"]


# --- what somebody else may send ---


HOSTILE = {
    "pickle": pickle.dumps(print),
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "function": b'{"system": "true"}',
    "builtin": b'{"eval": "1"}',
    "module": b'{"os.system": [["command", "true"]]}',
    "class by its module": b'{"ckavg.output.record.Seconds": [["path", 0]]}',
    "other class": b'{"Checkpoint": []}',
    "dunder": b'{"__import__": "os"}',
    "two names": b'{"tuple": [], "dict": []}',
    "no name": b"{}",
    "other fields": b'{"BlockResult": [["digests", 1], ["command", 2]]}',
    "no fields": b'{"BlockResult": 7}',
    "list as a key": b'{"dict": [[[1], 2]]}',
    "no path": b'{"Path": 7}',
    "no tensor": b'{"Tensor": [[1], [1, 2]]}',
    "no error": b'{"error": []}',
    "note": b'{"error": ["CkavgError", ["a"], "", [7]]}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"tuple":[' * 100_000,
    "long number": b"9" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_comes_of_what_is_no_message(name: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
        unpacked(HOSTILE[name])


def test_nothing_between_processes_can_unpickle() -> None:
    for module in Path(messages.__file__).parent.glob("*.py"):
        for word in ("pickle", "marshal", "shelve", "eval(", "exec(", "torch.load("):
            assert word not in module.read_text(), (module, word)


def test_failed_is_no_value() -> None:
    assert packed(FAILED, SettingError("no"))[:1] == FAILED != VALUE
