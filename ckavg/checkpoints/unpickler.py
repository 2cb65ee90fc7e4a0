"""Stage *discover*: what a pickle describes, read by a stack machine of our own, which makes plain values alone.

A pickle is a program. Python's own unpicklers run it: they import by name, call what they find, set attributes and
allocate whatever a few bytes ask for. Here no name is looked up but in a table that the caller gives. Whatever else a
pickle would make is kept as a description of it (`Opaque`), so that the settings, enums and callbacks which trainers
save beside weights are no obstacle, and do nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

MOST_OPCODES = 4_000_000
"""Of one pickle. A tensor takes some 35. What a hostile one makes Python build stays below a gigabyte, in seconds."""

_MOST_DIGITS = 1000
_MOST_INTEGER_BYTES = 255


class Global:
    """A name that a pickle takes from a module, and that is not looked up.

    Attributes:
        name: module and name, such as `collections.Counter`.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Opaque:
    """An object that a pickle describes, and that is not made.

    Attributes:
        name: of what would make it, `argparse.Namespace`.
        args: the arguments that it would be made of.
        state: its attributes, mostly a dict of them; None without any.
        items: its items by key, where it would be a mapping; what would be appended to it is dropped.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] | None = None


Persistent = Callable[[Any], Any]
"""What an identifier stands for, which a pickle has in the place of an object that is kept elsewhere."""


def unpickled(
    data: bytes, *, known: Mapping[tuple[str, str], Any], persistent: Persistent, most: int = MOST_OPCODES
) -> Any:
    """The value that a pickle describes: dicts, lists, tuples, texts, numbers, bytes, and what `known` makes.

    Ordered, default and counting dicts become dicts, and sets lists or tuples. Names that are not `known`
    become `Global`, and what is called by them `Opaque`; so do keys of dicts that are neither text nor number, such as
    tuples. Nothing is copied, and nothing recurses. But values may be shared or nested without end, and a list may hold
    itself: whoever goes through them must count.

    Args:
        data: the pickle, of protocol 0 to 5, and nothing behind it.
        known: values by module and name. Those that can be called are called with the arguments that the pickle gives,
            positional ones alone, and must believe none of them. They are the only ones that are ever called.
        persistent: is given each persistent identifier, which may be any value, and gives what it stands for.
        most: how many opcodes are obeyed.

    Raises:
        ValueError: it is no pickle, is cut off, is longer than `most`, has a number of unreasonable size, calls what is
            no class or function, needs buffers beside it, or gives a known callable wrong arguments.
    """
    machine = _Machine(data, {**_CONTAINERS, **known}, persistent, most)
    try:
        return machine.run()
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"byte {machine.at:,} of the pickle makes no sense") from error


def _dict(*args: Any) -> dict[Any, Any]:
    """What `OrderedDict`, `defaultdict` or `Counter` are made of: a dict, or pairs, or a factory first."""
    made: dict[Any, Any] = {}
    for source in args:
        if isinstance(source, dict):
            made |= source
        elif isinstance(source, list | tuple):
            made |= {_key(key): value for key, value in source}
    return made


def _list(values: Any = ()) -> list[Any]:
    """What a set is made of."""
    if type(values) not in (list, tuple):
        raise ValueError("the pickle makes a set of what is no list")
    return [*values]


_CONTAINERS: Mapping[tuple[str, str], Any] = {
    **{("collections", name): _dict for name in ("OrderedDict", "defaultdict", "Counter")},
    **{(module, name): _list for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}
_HASHED = frozenset({str, bytes, float, bool, type(None), Global, Opaque})
_LARGEST_KEY = 2**60


def _key(value: Any) -> Any:
    """A value as the key of a dict. Hashes of nested tuples may take for ever, or overflow the stack; those of tuples
    and large numbers can be made alike, so that a dict of them takes hours.
    """
    kind = type(value)
    if kind in _HASHED or (kind is int and -_LARGEST_KEY < value < _LARGEST_KEY):
        return value
    return Opaque(kind.__name__, (value,))


class _Machine:
    """The stack, the memo and the place in the pickle. A mark sets the stack aside and begins another."""

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
        """Obey the opcodes up to the one that ends the pickle."""
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
        """The next so many bytes."""
        start = self.at
        self.at = end = start + size
        if end > len(self.data):
            raise ValueError("the pickle is cut off")
        return self.data[start:end]

    def number(self, size: int) -> int:
        """The next so many bytes as a number."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        """What is left of a line of text."""
        return self.take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1]

    def decimal(self) -> int:
        """What is left of a line, as a number."""
        digits = self.line().removesuffix(b"L")
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a number in the pickle has {len(digits):,} digits")
        return int(digits)

    def pop_mark(self) -> list[Any]:
        """All values since the mark, which is taken away."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def find(self, module: Any, name: Any) -> Any:
        """What a name stands for: of the table, or a description of it."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name in the pickle is no text")
        if (module, name) in self.known:
            return self.known[module, name]
        if (module, name) not in self.names:
            self.names[module, name] = Global(f"{module}.{name}")
        return self.names[module, name]

    def call(self, function: Any, args: Any) -> Any:
        """What a known function returns, or a description of what another would."""
        if type(args) is not tuple:
            raise ValueError("arguments in the pickle are no tuple")
        if type(function) in (Global, Opaque):
            return Opaque(function.name, args)
        if id(function) in self.callables:
            self.copied += sum(len(each) for each in args if isinstance(each, (dict, list, tuple)))
            if self.copied > self.most:  # a few bytes can have a large list copied again and again
                raise ValueError(f"the pickle makes more than {self.most:,} items of lists and dicts")
            return function(*args)
        raise ValueError(f"the pickle calls a {type(function).__name__}")

    def set_items(self, values: list[Any]) -> None:
        """Keys and values, in turn, of the mapping on top of the stack."""
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict or len(values) % 2:
            raise ValueError(f"the pickle sets items of a {type(target).__name__}")
        for place in range(0, len(values), 2):
            target[_key(values[place])] = values[place + 1]

    def append(self, values: list[Any]) -> None:
        """To the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target += values
        elif type(target) is not Opaque:
            raise ValueError(f"the pickle appends to a {type(target).__name__}")


# --- opcodes ---

_Opcode = Callable[[_Machine], object]
_STOP = ord(".")


def _unknown(machine: _Machine) -> None:
    raise ValueError(f"byte {machine.at - 1:,} is no opcode of a pickle")


def _pushes(value: Callable[[_Machine], Any]) -> _Opcode:
    """The opcode that pushes this value."""

    def push(machine: _Machine) -> None:
        pushed = value(machine)  # first: it may take values, and the stack with them
        machine.stack.append(pushed)

    return push


def _counted(size: int, value: Callable[[bytes], Any]) -> _Opcode:
    """The opcode that pushes bytes, behind their count in so many bytes."""

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
    """The opcode that keeps what is on top of the stack, under a number of so many bytes."""

    def put(machine: _Machine) -> None:
        machine.memo[machine.number(size)] = machine.stack[-1]

    return put


def _recalled(size: int) -> _Opcode:
    """The opcode that pushes what was kept under a number of so many bytes."""

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
    """The opcode that makes a tuple of so many values."""

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
    """A class by its number in a registry, which is not looked at."""
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
    """An object's attributes, which of anything but a description are dropped."""
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
"""Every opcode but those that end a pickle, or need buffers beside it."""

_OPCODES = tuple(_NAMED.get(bytes([code]), _unknown) for code in range(256))
