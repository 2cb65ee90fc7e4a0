"""Stage *discover*: read a pickle with a stack machine of our own, which makes only plain values.

A pickle is a program. Python's unpicklers run it: they import by name, call what they find, set attributes and allocate
as much as a few bytes ask for. Here names are looked up only in a table from the caller. Any other object is kept as a
description (`Opaque`), so that settings, enums and callbacks that trainers save beside weights can be skipped without
running anything.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

MOST_OPCODES = 4_000_000
"""Limit for one pickle; a tensor takes about 35. A hostile pickle stays below a gigabyte and some seconds."""

_MOST_DIGITS = 1000
_MOST_INTEGER_BYTES = 255


class Global:
    """A name in a module that a pickle refers to; it is not looked up.

    Attributes:
        name: module and name, such as `collections.Counter`.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Opaque:
    """An object that a pickle describes, but that is not created.

    Attributes:
        name: its constructor, such as `argparse.Namespace`.
        args: the arguments of the constructor.
        state: its attributes, usually a dict; None without any.
        items: its items by key, for a mapping; appended values are dropped.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] | None = None


Persistent = Callable[[Any], Any]
"""Returns the object of a persistent id, which a pickle uses for an object stored outside it."""


def unpickled(
    data: bytes, *, known: Mapping[tuple[str, str], Any], persistent: Persistent, most: int = MOST_OPCODES
) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, texts, numbers, bytes, and the values of `known`.

    Ordered, default and counting dicts become dicts; sets become lists or tuples. Names that are not `known` become
    `Global`, and calls of them `Opaque`; so do keys of dicts that are neither text nor number, such as tuples. Nothing
    is copied, and nothing recurses. But values may be shared or nested without end, and a list may contain itself:
    code that walks them must set a limit.

    Args:
        data: the pickle, of protocol 0 to 5, without anything after it.
        known: values by module and name. Callables among them are called with the positional arguments of the pickle,
            which they must check. Nothing else is ever called.
        persistent: called with each persistent id, which may be any value.
        most: the largest number of opcodes.

    Raises:
        ValueError: it is not a pickle, is cut off, is longer than `most`, has a number of unreasonable size, calls
            something other than a class or function, needs out-of-band buffers, or gives a known callable wrong
            arguments.
    """
    machine = _Machine(data, {**_CONTAINERS, **known}, persistent, most)
    try:
        return machine.run()
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"byte {machine.at:,} of the pickle is not valid") from error


def _dict(*args: Any) -> dict[Any, Any]:
    """A dict from the arguments of `OrderedDict`, `defaultdict` or `Counter`: a dict, pairs, or a factory first."""
    made: dict[Any, Any] = {}
    for source in args:
        if isinstance(source, dict):
            made |= source
        elif isinstance(source, list | tuple):
            made |= {_key(key): value for key, value in source}
    return made


def _list(values: Any = ()) -> list[Any]:
    """A list from the argument of a set."""
    if type(values) not in (list, tuple):
        raise ValueError("the pickle makes a set from something other than a list")
    return [*values]


_CONTAINERS: Mapping[tuple[str, str], Any] = {
    **{("collections", name): _dict for name in ("OrderedDict", "defaultdict", "Counter")},
    **{(module, name): _list for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}
_HASHED = frozenset({str, bytes, float, bool, type(None), Global, Opaque})
_LARGEST_KEY = 2**60


def _key(value: Any) -> Any:
    """A value as the key of a dict. Hashing nested tuples may take forever or overflow the stack; and tuples or large
    numbers can be chosen to collide, so that a dict of them takes hours.
    """
    kind = type(value)
    if kind in _HASHED or (kind is int and -_LARGEST_KEY < value < _LARGEST_KEY):
        return value
    return Opaque(kind.__name__, (value,))


class _Machine:
    """The stack, the memo and the position in the pickle. A mark sets the stack aside and begins another."""

    __slots__ = ("at", "callables", "copied", "data", "known", "marked", "memo", "most", "names", "persistent", "stack")

    def __init__(self, data: bytes, known: Mapping[tuple[str, str], Any], persistent: Persistent, most: int) -> None:
        self.data, self.at = data, 0
        self.most, self.copied = most, 0
        self.known, self.persistent = known, persistent
        self.callables = {id(value) for value in known.values() if callable(value)}
        self.names: dict[tuple[str, str], Global] = {}
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute the opcodes up to the one that ends the pickle."""
        data, table = self.data, _OPCODES
        for _ in range(self.most):
            opcode = data[self.at]
            self.at += 1
            if opcode == _STOP:
                break
            table[opcode](self)
        else:
            raise ValueError(f"the pickle has more than {self.most:,} opcodes")
        if self.at != len(data):
            raise ValueError(f"{len(data) - self.at:,} bytes follow the pickle")
        return self.stack.pop()

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        start = self.at
        self.at = end = start + size
        if end > len(self.data):
            raise ValueError("the pickle is cut off")
        return self.data[start:end]

    def number(self, size: int) -> int:
        """The next `size` bytes as a number."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        """The rest of a line of text."""
        return self.take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1]

    def decimal(self) -> int:
        """The rest of a line, as a number."""
        digits = self.line().removesuffix(b"L")
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a number in the pickle has {len(digits):,} digits")
        return int(digits)

    def pop_mark(self) -> list[Any]:
        """All values since the mark; the mark is removed."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def find(self, module: Any, name: Any) -> Any:
        """The value of a name from the table, or a description of it."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name in the pickle is not a string")
        if (module, name) in self.known:
            return self.known[module, name]
        if (module, name) not in self.names:
            self.names[module, name] = Global(f"{module}.{name}")
        return self.names[module, name]

    def call(self, function: Any, args: Any) -> Any:
        """The value of a known function, or a description of any other call."""
        if type(args) is not tuple:
            raise ValueError("arguments in the pickle are not a tuple")
        if type(function) in (Global, Opaque):
            return Opaque(function.name, args)
        if id(function) in self.callables:
            self.copied += sum(len(each) for each in args if isinstance(each, (dict, list, tuple)))
            if self.copied > self.most:  # a few bytes can copy a large list again and again
                raise ValueError(f"the pickle makes more than {self.most:,} items of lists and dicts")
            return function(*args)
        raise ValueError(f"the pickle calls a {type(function).__name__}")

    def set_items(self, values: list[Any]) -> None:
        """Set alternating keys and values in the mapping on top of the stack."""
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict or len(values) % 2:
            raise ValueError(f"the pickle sets items of a {type(target).__name__}")
        for place in range(0, len(values), 2):
            target[_key(values[place])] = values[place + 1]

    def append(self, values: list[Any]) -> None:
        """Append to the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target += values
        elif type(target) is not Opaque:
            raise ValueError(f"the pickle appends to a {type(target).__name__}")


# --- opcodes ---

_Opcode = Callable[[_Machine], object]
_STOP = ord(".")


def _unknown(machine: _Machine) -> None:
    raise ValueError(f"byte {machine.at - 1:,} is not an opcode")


def _pushes(value: Callable[[_Machine], Any]) -> _Opcode:
    """The opcode that pushes this value."""

    def push(machine: _Machine) -> None:
        pushed = value(machine)  # first: it may replace the stack
        machine.stack.append(pushed)

    return push


def _counted(size: int, value: Callable[[bytes], Any]) -> _Opcode:
    """The opcode that pushes bytes; their count precedes them in `size` bytes."""

    def push(machine: _Machine) -> None:
        count = (
            machine.data[machine.at]
            if size == 1
            else int.from_bytes(machine.data[machine.at : machine.at + size], "little")
        )
        machine.at += size
        machine.stack.append(value(machine.take(count)))

    return push


def _packed(form: str) -> _Opcode:
    """The opcode that pushes a number of fixed size."""
    layout = struct.Struct(form)
    return _pushes(lambda machine: layout.unpack(machine.take(layout.size))[0])


def _memoized(size: int) -> _Opcode:
    """The opcode that memoizes the top of the stack under a number of `size` bytes."""

    def put(machine: _Machine) -> None:
        machine.memo[machine.number(size)] = machine.stack[-1]

    return put


def _recalled(size: int) -> _Opcode:
    """The opcode that pushes the memoized value of a number of `size` bytes."""

    def get(machine: _Machine) -> None:
        machine.stack.append(machine.memo[machine.number(size)])

    return get


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(data: bytes) -> str:
    return data.decode("latin-1")


def _integer(data: bytes) -> int:
    if len(data) > _MOST_INTEGER_BYTES:
        raise ValueError(f"a number in the pickle has {len(data):,} bytes")
    return int.from_bytes(data, "little", signed=True)


def _tuple(size: int) -> _Opcode:
    """The opcode that makes a tuple of `size` values."""

    def make(machine: _Machine) -> None:
        machine.stack[-size:] = [tuple(machine.stack[-size:])]

    return make


def _take_dict(machine: _Machine) -> dict[Any, Any]:
    values = machine.pop_mark()
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def _global(machine: _Machine) -> Any:
    return machine.find(_text(machine.line()), _text(machine.line()))


def _stack_global(machine: _Machine) -> Any:
    name = machine.stack.pop()
    return machine.find(machine.stack.pop(), name)


def _extension(size: int) -> _Opcode:
    """A class by its number in a registry, which is not looked up."""
    return _pushes(lambda machine: machine.find("copyreg", f"extension {machine.number(size)}"))


def _reduce(machine: _Machine) -> Any:
    args = machine.stack.pop()
    return machine.call(machine.stack.pop(), args)


def _new_with_keywords(machine: _Machine) -> Any:
    keywords, args = machine.stack.pop(), machine.stack.pop()
    made = machine.call(machine.stack.pop(), args)
    if keywords and type(made) is not Opaque:
        raise ValueError("the pickle gives arguments by name")
    return made


def _instance(machine: _Machine) -> Any:
    function = _global(machine)
    return machine.call(function, tuple(machine.pop_mark()))


def _object(machine: _Machine) -> Any:
    function, *args = machine.pop_mark()
    return machine.call(function, tuple(args))


def _build(machine: _Machine) -> None:
    """Set the attributes of a description; those of any other value are dropped."""
    state = machine.stack.pop()
    if type(machine.stack[-1]) is Opaque:
        machine.stack[-1].state = state


def _mark(machine: _Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _protocol(machine: _Machine) -> None:
    if (protocol := machine.number(1)) > 5:
        raise ValueError(f"the pickle is of protocol {protocol}, which is newer than 5")


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


_NAMED: Mapping[bytes, _Opcode] = {
    b"\x80": _protocol,
    b"\x95": lambda machine: machine.take(8),  # a frame: how much to read at once
    b"(": _mark,
    b"0": _pop,
    b"1": lambda machine: machine.pop_mark(),
    b"2": _pushes(lambda machine: machine.stack[-1]),
    # numbers, texts and bytes
    b"N": _pushes(lambda machine: None),
    b"\x88": _pushes(lambda machine: True),
    b"\x89": _pushes(lambda machine: False),
    b"K": _packed("<B"),
    b"M": _packed("<H"),
    b"J": _packed("<i"),
    b"G": _packed(">d"),
    b"I": _pushes(_Machine.decimal),
    b"L": _pushes(_Machine.decimal),
    b"F": _pushes(lambda machine: float(machine.line())),
    b"\x8a": _counted(1, _integer),
    b"\x8b": _counted(4, _integer),
    b"\x8c": _counted(1, _text),
    b"X": _counted(4, _text),
    b"\x8d": _counted(8, _text),
    b"V": _pushes(lambda machine: machine.line().decode("raw-unicode-escape")),
    b"U": _counted(1, _old_text),
    b"T": _counted(4, _old_text),
    b"S": _pushes(lambda machine: _old_text(machine.line()[1:-1])),
    b"C": _counted(1, bytes),
    b"B": _counted(4, bytes),
    b"\x8e": _counted(8, bytes),
    b"\x96": _counted(8, bytes),
    # containers; a set is a list, and a frozen one a tuple, so that nothing is hashed
    b")": _pushes(lambda machine: ()),
    b"t": _pushes(lambda machine: tuple(machine.pop_mark())),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"]": _pushes(lambda machine: []),
    b"l": _pushes(lambda machine: machine.pop_mark()),
    b"\x8f": _pushes(lambda machine: []),
    b"\x91": _pushes(lambda machine: tuple(machine.pop_mark())),
    b"}": _pushes(lambda machine: {}),
    b"d": _pushes(_take_dict),
    b"a": lambda machine: machine.append([machine.stack.pop()]),
    b"e": lambda machine: machine.append(machine.pop_mark()),
    b"\x90": lambda machine: machine.append(machine.pop_mark()),
    b"s": _set_item,
    b"u": lambda machine: machine.set_items(machine.pop_mark()),
    # the memo
    b"p": lambda machine: machine.memo.__setitem__(machine.decimal(), machine.stack[-1]),
    b"q": _memoized(1),
    b"r": _memoized(4),
    b"\x94": lambda machine: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    b"g": _pushes(lambda machine: machine.memo[machine.decimal()]),
    b"h": _recalled(1),
    b"j": _recalled(4),
    # names, and what is made by them
    b"c": _pushes(_global),
    b"\x93": _pushes(_stack_global),
    b"\x82": _extension(1),
    b"\x83": _extension(2),
    b"\x84": _extension(4),
    b"R": _pushes(_reduce),
    b"\x81": _pushes(_reduce),
    b"\x92": _pushes(_new_with_keywords),
    b"i": _pushes(_instance),
    b"o": _pushes(_object),
    b"b": _build,
    b"P": _pushes(lambda machine: machine.persistent(_text(machine.line()))),
    b"Q": _pushes(lambda machine: machine.persistent(machine.stack.pop())),
}
"""All opcodes except those that end a pickle or need out-of-band buffers."""

_OPCODES = tuple(_NAMED.get(bytes([code]), _unknown) for code in range(256))
