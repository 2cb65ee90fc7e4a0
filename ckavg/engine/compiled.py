"""Stage *engine*: loops over tiles, compiled for the machine at hand with LLVM; optional (extra `fast`, llvmlite).

Each torch operation walks over the memory once; a compiled loop walks once for all of them, without the interpreter's
lock. It works on vectors of 16 numbers and compiles in 0.1 s for one average: nothing is cached on disk.

It reads files itself, but only from the page cache. Everything else takes the plain path, which prefetches.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from llvmlite import ir


Kind = TypeVar("Kind", bound=Hashable)
Kernel = TypeVar("Kernel")

LANES = 16
"""Numbers in a vector; LLVM cuts it where the machine's are shorter."""

_READ_BYTES = 1 << 20
"""What is read of all checkpoints before it is computed with: it stays in the cache that a core has for itself."""

_SHORTEST_READ = 1 << 12


def piece_of(chunk: int, width: int) -> int:
    """Elements that are read at once of each checkpoint: a chunk, or a part of one.

    Args:
        chunk: elements of a chunk.
        width: bytes of an element of all checkpoints.
    """
    piece = chunk
    while piece > _SHORTEST_READ and piece * width > _READ_BYTES:
        piece //= 2
    return piece


@cache
def read_cached() -> tuple[int, int]:
    """The address of the system's `preadv2`, and the flag with which it reads nothing but what is in the page cache.

    Raises:
        OSError: it has none.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        raise OSError("preadv2 is missing")
    return ctypes.cast(ctypes.CDLL(None).preadv2, ctypes.c_void_p).value or 0, os.RWF_NOWAIT


DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
"""What compiled code reads and writes, as safetensors and torch name it."""

_COMPILING = threading.Lock()


def load(make: Callable[[Kind], Kernel], kind: Kind, is_right: Callable[[Kernel, Kind], bool]) -> Kernel | None:
    """Compile a kernel, once for each kind.

    Args:
        make: compiles it.
        kind: what it is compiled for.
        is_right: whether a sample has the same bytes as on the plain path.

    Returns:
        The kernel; None without llvmlite, or if it cannot be compiled here or gives other bytes.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return None
    with _COMPILING:
        loaded: Kernel | None = _load(make, kind, is_right)
        return loaded


@cache
def _load(make: Callable[[Any], Any], kind: Any, is_right: Callable[[Any, Any], bool]) -> Any:
    try:
        kernel = make(kind)
        return kernel if is_right(kernel, kind) else None
    except Exception:  # an optional speed-up must never be in the way, whatever is wrong with it
        return None


@dataclass(frozen=True, slots=True)
class Reading:
    """Values of a function that reads checkpoints."""

    function: ir.Value
    flags: ir.Value
    handles: ir.Value
    offsets: ir.Value
    checkpoints: ir.Value
    buffer: ir.Value
    vector: ir.Value


class Program:
    """Functions that are compiled together.

    Every type of LLVM has its name: `f32`, `i64`, …, and with a `v` before it that of a vector.
    """

    def __init__(self) -> None:
        from llvmlite import ir

        self._ir = ir
        self.module = ir.Module()
        self.f32, self.f64 = ir.FloatType(), ir.DoubleType()
        self.i1, self.i8, self.i16, self.i32, self.i64 = map(ir.IntType, (1, 8, 16, 32, 64))
        self.vf32, self.vf64, self.vi1, self.vi16, self.vi32 = (
            ir.VectorType(each, LANES) for each in (self.f32, self.f64, self.i1, self.i16, self.i32)
        )
        self.builder = ir.IRBuilder()
        self._engine: Any = None

    def begin(self, name: str, *types: Any, returns: Any = None) -> Sequence[ir.Argument]:
        """Begin a function, and return its arguments. All that is emitted goes to its end."""
        kind = self._ir.FunctionType(self._ir.VoidType() if returns is None else returns, types)
        function = self._ir.Function(self.module, kind, name)
        function.attributes.add("noinline")  # half the time of compiling
        self.builder = self._ir.IRBuilder(function.append_basic_block())
        arguments: Sequence[ir.Argument] = function.args
        return arguments

    @contextmanager
    def loop(self, stop: Any, step: int = 1) -> Iterator[ir.Value]:
        """What is emitted inside runs for 0, `step`, … below `stop`."""
        builder = self.builder
        head, body, done = (builder.append_basic_block() for _ in range(3))
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(self.i64)
        index.add_incoming(self.i64(0), before)
        builder.cbranch(builder.icmp_unsigned("<", index, stop), body, done)
        builder.position_at_end(body)
        yield index
        index.add_incoming(builder.add(index, self.i64(step)), builder.block)
        builder.branch(head)
        builder.position_at_end(done)

    def read(self, where: Reading, start: ir.Value, piece: ir.Value, item: int, failed: Any) -> None:
        """Read elements `start` to `start` + `piece` of each checkpoint to its place in a buffer, if all are in memory;
        otherwise go on at `failed`.
        """
        b = self.builder
        nbytes = b.mul(piece, self.i64(item))
        with self.loop(where.checkpoints) as checkpoint:
            target = b.add(where.buffer, b.mul(checkpoint, nbytes))
            b.store(target, where.vector)
            b.store(nbytes, b.gep(where.vector, [self.i64(1)]))
            offset = b.add(b.load(b.gep(where.offsets, [checkpoint])), b.mul(start, self.i64(item)))
            handle = b.load(b.gep(where.handles, [checkpoint]))
            count = b.call(where.function, [handle, where.vector, self.i32(1), offset, where.flags])
            with b.if_then(b.icmp_signed("!=", count, nbytes), likely=False):
                b.branch(failed)

    def reading(self, function: ir.Value, flags: ir.Value, files: tuple[Any, Any, Any], buffer: ir.Value) -> Reading:
        """How checkpoints are read: with what `read_cached` says, from files and offsets, so many, into a buffer."""
        b, i32, i64 = self.builder, self.i32, self.i64
        kind = self._ir.FunctionType(i64, [i32, i64.as_pointer(), i32, i64, i32])
        called = b.inttoptr(function, kind.as_pointer())
        return Reading(called, b.trunc(flags, i32), *files, buffer, self.slot(i64, 2))

    def slot(self, kind: Any, count: int = 1) -> Any:
        """A pointer to memory of the function, for a value that changes; LLVM makes registers of what is single."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind, count)

    def constant(self, kind: Any, value: float) -> ir.Constant:
        """A vector of one value."""
        return self._ir.Constant(kind, [value] * LANES)

    def vector(self, kind: Any, count: int) -> Any:
        """The type of a vector of so many."""
        return self._ir.VectorType(kind, count)

    def zero(self, kind: Any) -> ir.Constant:
        """A vector of zeros."""
        return self._ir.Constant(kind, [0] * kind.count)

    def sum(self, value: ir.Value) -> ir.Value:
        """The sum of a vector of integers."""
        parts = [self.builder.extract_element(value, self.i32(lane)) for lane in range(value.type.count)]
        total = parts[0]
        for part in parts[1:]:
            total = self.builder.add(total, part)
        return total

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector of one number that is computed."""
        kind = self._ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(self._ir.Constant(kind, self._ir.Undefined), value, self.i32(0))
        zeros = self.constant(self.vi32, 0)
        return self.builder.shuffle_vector(first, self._ir.Constant(kind, self._ir.Undefined), zeros)

    def load(self, pointer: ir.Value, index: ir.Value, kind: Any) -> ir.Value:
        """The vector of elements of `pointer` from `index` on."""
        place = self.builder.bitcast(self.builder.gep(pointer, [index]), kind.as_pointer())
        return self.builder.load(place, align=_ITEM[str(kind.element)])

    def widened(self, stored: ir.Value) -> ir.Value:
        """Stored bits as float32: bfloat16 from vectors of 16 bits, of 32 bits as they are."""
        if stored.type == self.vi16:
            stored = self.builder.shl(self.builder.zext(stored, self.vi32), self.constant(self.vi32, 16))
        return self.builder.bitcast(stored, self.vf32)

    def store(self, value: ir.Value, pointer: ir.Value, index: ir.Value) -> None:
        """Put a vector at the elements of `pointer` from `index` on."""
        kind = value.type
        place = self.builder.bitcast(self.builder.gep(pointer, [index]), kind.as_pointer())
        self.builder.store(value, place, align=_ITEM[str(kind.element)])

    def call_of(self, name: str, *arguments: ir.Value) -> ir.Value:
        """Call a function of this module."""
        return self.builder.call(self.module.get_global(name), arguments)

    def call(self, intrinsic: str, *arguments: ir.Value) -> ir.Value:
        """Call a function of this module, or of LLVM's on vectors."""
        function = self.module.globals.get(intrinsic)
        if function is None:
            kind = self._ir.FunctionType(arguments[0].type, [each.type for each in arguments])
            function = self._ir.Function(self.module, kind, intrinsic)
        return self.builder.call(function, arguments)

    def compile(self, name: str, pointers: int, integers: int) -> Callable[..., int]:
        """The function, ready to be called with so many addresses, then so many integers; it returns an integer."""
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        self.module.triple, self.module.data_layout = machine.triple, str(machine.target_data)
        compiled = binding.parse_assembly(str(self.module))
        passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(compiled, passes)
        self._engine = binding.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()
        types = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
        return ctypes.CFUNCTYPE(ctypes.c_int64, *types)(self._engine.get_function_address(name))


_ITEM = {"i16": 2, "i32": 4, "float": 4, "i64": 8, "double": 8}
