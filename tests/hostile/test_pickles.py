"""Pickles that would run something, take memory or time, or lie: one error, or what is honest in them; never executed.

The payloads are of the kinds that the test suites of fickling and picklescan hold, as they are written in opcodes.
"""

from __future__ import annotations

import itertools
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckavg.checkpoints import pickles
from ckavg.checkpoints.headers import Header
from ckavg.checkpoints.pickles import UnreadPickleError, read_pickle
from ckavg.checkpoints.unpickler import Global, Opaque, unpickled
from ckavg.errors import CheckpointError, CorruptFileError, TruncatedShardError
from tests.exhaustive import few_or_all

MARKER = "to be replaced"
AS_TEXT = b"X" + struct.pack("<I", len(MARKER)) + MARKER.encode()
WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16()}
MOST_SECONDS = 60
"""Far more than any of them takes; less than the least that would be a denial of service."""


def opcodes(value: object) -> bytes:
    """What pushes a plain value, and leaves the memo alone."""
    framed = pickle.dumps(value, 2)[2:-1]
    return framed if not isinstance(value, str) else b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def arguments(values: tuple[object, ...]) -> bytes:
    return b"(" + b"".join(opcodes(value) for value in values) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    """The same by texts that are taken from the memo."""
    put = b"".join(opcodes(text) + b"r" + struct.pack("<I", 900 + at) + b"0" for at, text in enumerate((module, name)))
    return put + b"j" + struct.pack("<I", 900) + b"j" + struct.pack("<I", 901) + b"\x93"


FORMS: dict[str, Callable[[str, str, tuple[object, ...]], bytes]] = {
    "REDUCE": lambda module, name, args: named(module, name) + arguments(args) + b"R",
    "STACK_GLOBAL": lambda module, name, args: stacked(module, name) + arguments(args) + b"R",
    "INST": lambda module, name, args: b"(" + b"".join(map(opcodes, args)) + f"i{module}\n{name}\n".encode(),
    "OBJ": lambda module, name, args: b"(" + named(module, name) + b"".join(map(opcodes, args)) + b"o",
    "NEWOBJ": lambda module, name, args: named(module, name) + arguments(args) + b"\x81",
    "NEWOBJ_EX": lambda module, name, args: named(module, name) + arguments(args) + opcodes({"shell": True}) + b"\x92",
    "BUILD": lambda module, name, args: named(module, name) + b")R" + opcodes({"__setstate__": args}) + b"b",
    "BUILD of the name": lambda module, name, args: named(module, name) + b"N" + opcodes({"x": args}) + b"\x86b",
    "twice": lambda module, name, args: named(module, name) + arguments(args) + b"R" + arguments(args) + b"R",
    "a dict's item": lambda module, name, args: b"}" + opcodes("x") + named(module, name) + arguments(args) + b"Rs",
    "a list's item": lambda module, name, args: b"](" + named(module, name) + arguments(args) + b"Re",
    "popped": lambda module, name, args: named(module, name) + arguments(args) + b"R0N",
    "a key": lambda module, name, args: b"}" + named(module, name) + arguments(args) + b"RNs",
    "an identifier": lambda module, name, args: named(module, name) + arguments(args) + b"RQ",
}

SHELL = (
    "os.system", "posix.system", "nt.system", "os.popen", "os.execvp", "os.posix_spawn", "pty.spawn",
    "commands.getoutput", "subprocess.call", "subprocess.run", "subprocess.Popen", "subprocess.check_output",
    "subprocess.getoutput", "_posixsubprocess.fork_exec", "asyncio.create_subprocess_shell",
    "uuid._get_command_stdout", "_osx_support._read_output", "_aix_support._read_cmd_output",
    "imaplib.IMAP4_stream", "_pyrepl.pager.pipe_pager", "pydoc.pipepager", "pydoc.tempfilepager",
    "test.support.script_helper.assert_python_ok", "ensurepip._run_pip", "pip.main", "pip._internal.main",
    "venv.create", "webbrowser.open", "torch.utils.collect_env.run", "torch.utils.collect_env.run_and_read_all",
    "multiprocessing.process.Process", "shutil.rmtree", "os.remove",
)  # fmt: skip
CODE = (
    "builtins.eval", "builtins.exec", "builtins.compile", "__builtin__.eval", "__builtin__.exec",
    "__builtin__.apply", "__builtin__.execfile", "builtins.__import__", "builtins.getattr", "builtins.open",
    "builtins.globals", "__main__.x", "code.InteractiveInterpreter.runcode", "codeop.compile_command",
    "timeit.timeit", "timeit.main", "bdb.Bdb.run", "pdb.run", "doctest.debug_script", "trace.Trace.run",
    "trace.Trace.runctx", "profile.run", "profile.Profile.runctx", "cProfile.run", "cProfile.runctx",
    "runpy.run_path", "runpy._run_code", "idlelib.run.Executive.runcode",
    "idlelib.pyshell.ModifiedInterpreter.runcode", "idlelib.autocomplete.AutoComplete.get_entity",
    "idlelib.calltip.get_entity", "idlelib.debugobj.ObjectTreeItem.SetText",
    "lib2to3.pgen2.grammar.Grammar.loads", "numpy.testing._private.utils.runstring",
    "numpy.f2py.crackfortran.getlincoef", "numpy.load", "torch.utils.bottleneck.__main__.run_cprofile",
    "torch._dynamo.guards.GuardBuilder.get", "torch.jit.unsupported_tensor_ops.execWrapper",
    "torch.utils.data.datapipes.utils.decoder.basichandlers",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    "torch._inductor.codecache.compile_file", "torch.load", "torch.serialization.load", "torch.hub.load",
    "torch.storage._load_from_bytes", "torch.jit.load", "pickle.loads", "_pickle.loads", "pickle.Unpickler",
    "marshal.loads", "dill.loads", "joblib.load", "yaml.unsafe_load", "cloudpickle.cloudpickle._make_function",
    "cloudpickle.cloudpickle.subimport", "types.FunctionType", "types.CodeType", "ctypes.CDLL",
    "importlib.import_module", "pkgutil.resolve_name", "pydoc.locate", "site.main", "operator.attrgetter",
    "operator.methodcaller", "_operator.methodcaller", "functools.partial", "functools.reduce",
    "copyreg._reconstructor", "copyreg.add_extension", "collections.Counter", "logging.FileHandler",
    "_io.FileIO", "io.open", "pathlib.Path.write_text", "distutils.file_util.write_file", "sqlite3.connect",
    "linecache.getline", "socket.create_connection", "requests.api.get", "aiohttp.client.ClientSession",
    "httplib.HTTPSConnection", "http.client.HTTPSConnection", "urllib.request.urlopen",
    "ssl.get_server_certificate", "sys.exit", "os._exit", "signal.raise_signal", "antigravity.geohash",
    "this.s", "unknown.os", "42.os", "_rebuild_tensor.unknown",
)  # fmt: skip
NAMES = {name: (*name.rsplit(".", 1),) for name in (*SHELL, *CODE)}


def payloads(canary: Path) -> dict[str, bytes]:
    """By name and form: what would make a file, or do other harm, where it were executed."""
    found: dict[str, bytes] = {}
    for name, (module, attribute) in NAMES.items():
        args = (f"touch {canary}",) if name in SHELL else (f"__import__('os').system('touch {canary}')",)
        found |= {f"{name}, {form}": write(module, attribute, args) for form, write in FORMS.items()}
    nested = pickle.dumps(0)[:-2] + FORMS["REDUCE"]("os", "system", (f"touch {canary}",)) + b"."
    found["nested"] = FORMS["REDUCE"]("pickle", "loads", (nested,))
    found["chained"] = (
        named("builtins", "getattr") + named("builtins", "__import__") + arguments(("os",)) + b"R"
        + opcodes("system") + b"\x86R" + arguments((f"touch {canary}",)) + b"R"
    )  # fmt: skip
    return found


def archive(
    path: Path, data: bytes, files: dict[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED
) -> Path:
    """A zip archive as torch writes it, but for the places of its files."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", **(files or {}), "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", content)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of a state dict and something beside it, and the storages."""
    path = tmp_path_factory.mktemp("honest") / "honest.pt"
    torch.save({"model": WEIGHTS, "extra": MARKER}, path)
    with zipfile.ZipFile(path) as file:
        contents = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    assert AS_TEXT in contents["data.pkl"]
    return contents["data.pkl"], {name: data for name, data in contents.items() if name.startswith("data/")}


def outcome(path: Path) -> Header | Exception:
    """What comes of reading it, in time."""
    begun = time.monotonic()
    try:
        return read_pickle(path)
    except (CheckpointError, UnreadPickleError) as error:
        return error
    finally:
        assert time.monotonic() - begun < MOST_SECONDS


def assert_weights(path: Path, found: Header | Exception) -> None:
    assert isinstance(found, Header), found
    data = path.read_bytes()
    assert found.entries.keys() == WEIGHTS.keys()
    for name, entry in found.entries.items():
        assert data[entry.offset : entry.offset + entry.nbytes] == WEIGHTS[name].view(torch.uint8).numpy().tobytes()


def test_the_canary_would_die(tmp_path: Path) -> None:
    """Python's own unpickler executes payloads of every form that it knows."""
    for form in ("REDUCE", "STACK_GLOBAL", "INST", "OBJ", "a dict's item", "a list's item", "popped"):
        canary = tmp_path / form.replace(" ", "_").replace("'", "")
        pickle.loads(b"\x80\x02" + FORMS[form]("os", "system", (f"touch {canary}",)) + b".")
        assert canary.exists(), form


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_executed(tmp_path: Path, honest: tuple[bytes, dict[str, bytes]], form: str) -> None:
    """By itself it is no checkpoint; beside honest weights, they are read."""
    pickled, files = honest
    canary = tmp_path / "canary"
    before = set(sys.modules)
    for name, payload in payloads(canary).items():
        if not name.endswith(f", {form}") and not (form == "REDUCE" and ", " not in name):
            continue
        alone = outcome(archive(tmp_path / "alone.pt", b"\x80\x02" + payload + b"."))
        assert isinstance(alone, CorruptFileError) or (isinstance(alone, Header) and not alone.entries), name
        beside = archive(tmp_path / "beside.pt", pickled.replace(AS_TEXT, payload), files)
        found = outcome(beside)
        if not (isinstance(found, CorruptFileError) and name.startswith("collections.Counter")):  # is made, of a text
            assert_weights(beside, found)
        assert not canary.exists(), name
    assert set(sys.modules) == before


def test_nothing_known_is_changed_by_a_state(tmp_path: Path) -> None:
    """The state that a pickle gives to what is known of torch goes nowhere."""
    known = named("torch._utils", "_rebuild_tensor_v2")
    data = known + b"N" + opcodes({"__defaults__": (1, 2), "__dict__": {}, "x": 3}) + b"\x86b0" + known
    before = dict(vars(pickles._typed)), pickles._typed.__defaults__
    path = archive(tmp_path / "a.pt", b"\x80\x02" + data + opcodes({"y": 1}) + b"b.")
    assert isinstance(outcome(path), Header)
    assert (dict(vars(pickles._typed)), pickles._typed.__defaults__) == before


# --- time and memory ---

LAUGHS = b")" + b"2\x86" * 200
"""A tuple of two tuples, each of two, 200 deep: to hash it would take longer than there is time."""


def in_dict(key: bytes, value: bytes = b"N") -> bytes:
    return b"}" + key + value + b"s"


BOMBS: dict[str, Callable[[], bytes]] = {
    "a long number": lambda: b"\x8b" + struct.pack("<I", 1 << 24) + b"\1" * (1 << 24),
    "a number of many digits": lambda: b"I" + b"9" * (1 << 22) + b"\n",
    "a number of many digits, for the memo": lambda: b"Np" + b"9" * (1 << 22) + b"\n",
    "a float of many digits": lambda: b"F" + b"9" * (1 << 24) + b"\n",
    "a length beyond the end": lambda: b"\x8d" + struct.pack("<Q", 1 << 62),
    "a length below zero": lambda: b"T\xff\xff\xff\xff",
    "a key that takes for ever": lambda: in_dict(LAUGHS),
    "a set that takes for ever": lambda: b"\x8f(" + LAUGHS + b"\x90",
    "a frozen set that takes for ever": lambda: in_dict(b"(" + LAUGHS + b"\x91"),
    "a key that overflows the stack": lambda: in_dict(b")" + b"\x85" * 3_000_000),
    "nested lists": lambda: b"(" * 3_900_000,
    "nested dicts": lambda: b"}" + opcodes("a") + b"}" + (opcodes("a") + b"}") * 900_000 + b"s" * 900_001,
    "keys with one hash": lambda: (
        b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(400_000)) + b"u"
    ),
    "keys with nearly one hash": lambda: (
        b"}(" + b"".join(b"\x8a\x08" + (n << 40).to_bytes(8, "little") + b"N" for n in range(400_000)) + b"u"
    ),
    "a far index": lambda: b"Nr\xff\xff\xff\xff",
    "many copies": lambda: b"N" + b"2" * 5_000_000,
    "many dicts": lambda: b"}" * 5_000_000,
    "many dicts within the limit": lambda: b"}" * 3_900_000,
    "much kept": lambda: b"N" + b"\x94" * 3_900_000,
    "a dict in itself": lambda: b"}q\1" + opcodes("model") + b"h\1s",
    "a model in itself": lambda: b"}" + opcodes("model") + b"}q\1" + opcodes("a") + b"h\1ss",
    "many tensors": lambda: (
        b"("
        + opcodes("storage")
        + named("torch", "FloatStorage")
        + opcodes("0")
        + b"NK\1tQq\1"
        + named("torch._utils", "_rebuild_tensor_v2")
        + b"(h\1K\0))tRq\2}("
        + b"".join(opcodes(f"{n}.w") + b"h\2" for n in range(300_000))
        + b"u"
    ),
    "a dict copied again and again": lambda: (
        b"}q\1("
        + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(400_000))
        + b"u0"
        + named("collections", "OrderedDict")
        + b"q\2"
        + b"0h\2h\1\x85R" * 400_000
    ),
    "models in models": lambda: (
        b"}q\1" + b"".join(opcodes("x") + b"h\1s" + b"0}q\1" + opcodes("y") + b"h\1s" for _ in range(20_000))
    ),
}
PEAK_OF = """
import sys
from pathlib import Path
from ckavg.checkpoints.pickles import UnreadPickleError, read_pickle
from ckavg.errors import CkavgError
try:
    print(len(read_pickle(Path(sys.argv[1])).entries))
except (CkavgError, UnreadPickleError) as error:
    print(str(error).splitlines()[0])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
MOST_PEAK = 700_000
"""KiB, as for the headers of safetensors."""


@pytest.mark.parametrize("name", BOMBS)
def test_time_and_memory_are_bounded(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "bomb.pt", b"\x80\x02" + BOMBS[name]() + b".")
    command = [sys.executable, "-c", PEAK_OF, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    told, peak = done.stdout.splitlines()
    assert told == "0" or "cannot be read" in told
    assert int(peak) < MOST_PEAK


@pytest.mark.parametrize("shared", ["dicts", "tensors"])
def test_a_model_that_is_shared_without_end(
    tmp_path: Path, honest: tuple[bytes, dict[str, bytes]], shared: str
) -> None:
    """Forty dicts that hold the next one twice, with a tensor or none at the end, are a billion names."""
    pickled, files = honest
    tensor = pickled[pickled.index(b"ctorch._utils") : pickled.index(b"R", pickled.index(b"Rq") + 3) + 1]
    inner = b"}" + (opcodes("t") + tensor + b"s" if shared == "tensors" else b"")
    for level in range(40):
        inner += b"r" + struct.pack("<I", 500 + level) + b"0}"
        inner += b"".join(opcodes(key) + b"j" + struct.pack("<I", 500 + level) + b"s" for key in "ab")
    path = archive(tmp_path / "a.pt", b"\x80\x02}" + opcodes("model") + inner + b"s.", files)
    found = outcome(path)
    assert isinstance(found, CorruptFileError) if shared == "tensors" else not getattr(found, "entries", None)


# --- what is no pickle of torch ---

BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "no end": b"N",
    "an empty stack": b".",
    "too few values": b"\x87.",
    "no mark": b"Nt.",
    "nothing kept": b"h\5.",
    "protocol 6": b"\x80\6N.",
    "buffers beside it": b"\x97.",
    "an opcode that is none": b"\xff.",
    "more behind it": b"N.N.",
    "a name that is a number": b"K\1K\2\x93.",
    "an extension": b"\x82\1)R.",
    "a far extension": b"\x84\xff\xff\xff\xff.",
    "calls a text": opcodes("a") + b")R.",
    "calls a number": b"K\1)\x81.",
    "arguments that are none": named("os", "system") + b"NR.",
    "items of a tuple": b")(NNu.",
    "a list's items of a dict": b"}(Ne.",
    "an odd number of items": b"}(Nu.",
    "no text": b"X\1\0\0\0\xff.",
    "an identifier as text": b"Pos.system\n.",
    "a storage that is none": b"(" + opcodes("storage") + b"N}NNtQ.",
    "a tensor of nothing": named("torch._utils", "_rebuild_tensor_v2") + b")R.",
    "a tensor of no storage": named("torch._utils", "_rebuild_tensor_v2") + b"(NK\0))\x89NtR.",
    "a size of a number": named("torch", "Size") + b"K\1\x85R.",
    "a dict of a number": named("collections", "OrderedDict") + b"K\1\x85R.",
    "a dict of unequal pairs": named("collections", "OrderedDict") + b"]K\1\x85a\x85R.",
    "a parameter of nothing": named("torch._utils", "_rebuild_parameter") + b")R.",
    "arguments by name": named("torch", "Size") + b")" + opcodes({"a": 1}) + b"\x92.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_makes_no_sense_is_one_error(tmp_path: Path, name: str) -> None:
    found = outcome(archive(tmp_path / "a.pt", BROKEN[name]))
    assert isinstance(found, CorruptFileError) or (isinstance(found, Header) and not found.entries)
    if name not in ("an extension", "a far extension", "an identifier as text", "a dict of a number", "too few values"):
        assert isinstance(found, CorruptFileError)


def tensor_of(shape: str, stride: str, *, offset: int = 0, key: str = "0", dtype: bytes = b"") -> bytes:
    """A state dict of one tensor whose storage has 24 bytes."""
    storage = b"(" + opcodes("storage") + (dtype or named("torch", "FloatStorage")) + opcodes(key) + opcodes("cpu")
    numbers = [b"(" + b"".join(map(opcodes, eval(each))) + b"t" for each in (shape, stride)]
    tensor = (
        named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\6tQ" + opcodes(offset) + b"".join(numbers)
    )
    return b"\x80\x02}" + opcodes("w") + tensor + b"\x89}tRs."


LIES: dict[str, bytes] = {
    "beyond its storage": tensor_of("(7,)", "(1,)"),
    "from beyond its storage": tensor_of("(1,)", "(1,)", offset=6),
    "from far beyond": tensor_of("(1,)", "(1,)", offset=2**62),
    "from before": tensor_of("(1,)", "(1,)", offset=-1),
    "of negative size": tensor_of("(-6,)", "(1,)"),
    "of endless size": tensor_of("(2**40, 2**40)", "(2**40, 1)"),
    "of many dimensions": tensor_of("(1,) * 65", "(1,) * 65"),
    "of sizes that are none": tensor_of("('a',)", "(1,)"),
    "of true sizes": tensor_of("(True,)", "(1,)"),
    "with too few strides": tensor_of("(2, 3)", "(1,)"),
    "in no storage": tensor_of("(6,)", "(1,)", key="1"),
    "in a storage elsewhere": tensor_of("(6,)", "(1,)", key="../data.pkl"),
}
NOT_READ: dict[str, bytes] = {
    "transposed": tensor_of("(3, 2)", "(1, 3)"),
    "expanded": tensor_of("(6, 9)", "(1, 0)"),
    "of another storage": tensor_of("(6,)", "(1,)", dtype=named("torch", "QInt8Storage")),
    "of a dtype by name": tensor_of("(6,)", "(1,)", dtype=named("os", "system")),
}


@pytest.mark.parametrize("name", [*LIES, *NOT_READ])
def test_tensors_are_within_their_storage(tmp_path: Path, name: str) -> None:
    files = {"data/0": bytes(24)}
    good = outcome(archive(tmp_path / "good.pt", tensor_of("(2, 3)", "(3, 1)"), files))
    assert isinstance(good, Header)
    assert good.entries["w"].shape == (2, 3)
    found = outcome(archive(tmp_path / "a.pt", LIES.get(name) or NOT_READ[name], files))
    assert isinstance(found, CorruptFileError if name in LIES else UnreadPickleError)


# --- archives ---


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def test_archives_that_say_two_things(tmp_path: Path, honest: tuple[bytes, dict[str, bytes]]) -> None:
    """Such as readers disagree about: each is one error, or is read as its directory says."""
    pickled, files = honest
    plain = archive(tmp_path / "plain.pt", pickled, files)
    assert_weights(plain, outcome(plain))
    data = plain.read_bytes()
    first, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    second = data.index(b"PK\1\2", first + 1)
    twice, prefixes = tmp_path / "twice.pt", tmp_path / "prefixes.pt"
    with zipfile.ZipFile(twice, "w") as file:
        file.writestr("archive/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", pickled)
    with zipfile.ZipFile(prefixes, "w") as file:
        for prefix in ("archive", "other"):
            file.writestr(f"{prefix}/data.pkl", pickled)
    cases = {
        "two pickles": twice.read_bytes(),
        "two archives": prefixes.read_bytes(),
        "compressed": archive(tmp_path / "a.pt", pickled, files, method=zipfile.ZIP_DEFLATED).read_bytes(),
        "compressed, says the directory": patched(data, first + 10, "<H", 8),
        "encrypted": patched(data, first + 8, "<H", 1),
        "another name in front": patched(data, 30, "<H", 0x4141),
        "another method in front": patched(data, 8, "<H", 8),
        "something in front": b"MZ" * 32 + data,
        "something in front that is an archive": b"PK\3\4" + data,
        "something behind": data + b"more",
        "a comment": patched(data, end + 20, "<H", 4) + b"more",
        "an end in a comment": patched(data, end + 20, "<H", 22) + b"PK\5\6" + bytes(18),
        "on two disks": patched(data, end + 4, "<H", 1),
        "more files than there are": patched(data, end + 8, "<2H", 99, 99),
        "a directory elsewhere": patched(data, end + 16, "<I", 0),
        "a directory beyond the end": patched(data, end + 16, "<I", 1 << 31),
        "a directory before the beginning": patched(data, end + 12, "<2I", 1 << 31, 5),
        "files that overlap": patched(data, second + 42, "<I", 0),
        "a file beyond the end": patched(data, second + 42, "<I", 1 << 30),
        "a file that is too long": patched(data, first + 20, "<2I", 1 << 20, 1 << 20),
        "large sizes that are not told": patched(data, first + 20, "<2I", 0xFFFF_FFFF, 0xFFFF_FFFF),
        "another directory": data[:first] + b"XX" + data[first + 2 :],
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "a tar archive": b"sys_info\0" + bytes(600),
        "a program": b"\x7fELF" + bytes(100),
        "safetensors": struct.pack("<Q", 2) + b"{}",
        "a plain pickle": pickle.dumps({"a": 1}, 4),
        "TorchScript": archive(tmp_path / "a.pt", pickled, files | {"constants.pkl": b"N."}).read_bytes(),
        "another order of bytes": archive(tmp_path / "a.pt", pickled, files | {"byteorder": b"big"}).read_bytes(),
        "no pickle": archive(tmp_path / "a.pt", b"").read_bytes().replace(b"data.pkl", b"data.pk1"),
    }
    for name, content in cases.items():
        path = tmp_path / "case.pt"
        path.write_bytes(content)
        found = outcome(path)
        if name == "a comment":
            assert_weights(path, found)
        else:
            assert isinstance(found, CheckpointError | UnreadPickleError), (name, found)
    wrong_checksum = tmp_path / "checksum.pt"
    wrong_checksum.write_bytes(patched(patched(data, first + 16, "<I", 7), 14, "<I", 7))
    assert_weights(wrong_checksum, outcome(wrong_checksum))  # torch writes such, where it is told to compute none


@pytest.mark.parametrize("count", few_or_all(150, 3000))
def test_a_file_that_is_still_written_is_incomplete(tmp_path: Path, count: int) -> None:
    torch.save({"model": WEIGHTS}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(data), max(1, len(data) // count)):
        (tmp_path / "b.pt").write_bytes(data[:length])
        found = outcome(tmp_path / "b.pt")
        assert isinstance(found, CheckpointError)
        assert isinstance(found, TruncatedShardError) or 0 < length < 4, length


# --- anything ---


@pytest.mark.parametrize("count", few_or_all(600, 20_000))
def test_any_change_of_a_byte_is_read_or_refused(
    tmp_path: Path, honest: tuple[bytes, dict[str, bytes]], count: int
) -> None:
    pickled, files = honest
    chance = random.Random(0)
    for _ in range(count):
        data = bytearray(pickled)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        outcome(archive(tmp_path / "a.pt", bytes(data), files))
    whole = archive(tmp_path / "whole.pt", pickled, files).read_bytes()
    for _ in range(count):
        data = bytearray(whole)
        data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / "a.pt").write_bytes(data)
        outcome(tmp_path / "a.pt")


@pytest.mark.parametrize("count", few_or_all(20_000, 1_000_000))
def test_any_opcodes_are_read_or_refused(count: int) -> None:
    """Values of any kind on the stack, in any order; what is made is plain."""
    chance = random.Random(1)
    pieces = [
        *(bytes([code]) for code in range(128)),
        *(opcodes(value) for value in (1, -5, 2**70, "a", "os", b"b", 1.5, None, True, (1, "a"), [1], {"a": 1})),
        *(named(*name) for name in itertools.islice(NAMES.values(), 9)),
        *(named(*name) for name in pickles._KNOWN),
        *(b"\x80\x02 ( ) ] } t l d o R b 0 2 1 a e s u \x81 \x85 \x86 \x87 \x93 \x94 \x90 \x91 \x92 Q".split() * 4),
    ]
    plain = {
        dict,
        list,
        tuple,
        str,
        int,
        float,
        bool,
        bytes,
        type(None),
        Global,
        Opaque,
        pickles._Tensor,
        pickles._Storage,
    }
    read = 0
    for _ in range(count):
        data = b"".join(chance.choices(pieces, k=chance.randint(1, 14))) + b"."
        try:
            found = unpickled(data, known=pickles._KNOWN, persistent=pickles._storage)
        except ValueError:
            continue
        read += 1
        assert type(found) in plain or found in pickles._KNOWN.values() or callable(found)
    assert read > 500
