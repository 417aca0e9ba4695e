"""What a pickle would import and how it nests, read off its operations; nothing of it is executed."""

from __future__ import annotations

import logging
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, which protocol 2 still writes
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

log = logging.getLogger(__name__)

MOST_DEPTH = 100  # of tuples within tuples; those of weights are some five deep
MOST_SHARED = 1_000_000  # leaves of a tuple above the operations that there are


class Scan(NamedTuple):
    """What a pickle asks for."""

    names: list[str]  # globals, dotted, in their order
    is_knotted: bool  # holds a tuple that takes forever, or the whole stack, to hash

    def __add__(self, other: Any) -> Scan:
        """Both, one behind the other."""
        return Scan([*self.names, *other.names], self.is_knotted or other.is_knotted)


def scan_pickle(file: IO[bytes]) -> Scan:
    """Look through the next pickle of a file; a damaged one gives what comes before the damage."""
    names: list[str] = []
    try:
        for name in _walk(file):
            if name is None:
                return Scan(names, True)
            names.append(name)
    except Exception as error:  # whatever the parser stumbles over: torch then refuses the file itself
        log.debug("pickle ends early: %s", error)
    return Scan(names, False)


def _walk(file: IO[bytes]) -> Iterator[str | None]:
    """Yield each global, and None at a knot.

    Protocol 4 takes both parts of a name from the stack, so strings are followed.
    """
    texts: list[str] = []
    memo: dict[int, str] = {}
    knots = _Knots()
    for opcode, argument, _ in pickletools.genops(file):
        if knots.tied_by(opcode, argument):
            yield None
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif opcode.name == "MEMOIZE" or opcode.name.endswith("PUT"):
            memo[len(memo) if argument is None else argument] = texts[-1] if texts else ""
        elif opcode.name.endswith("GET"):
            texts.append(memo.get(int(argument or 0), ""))
        elif isinstance(argument, str):
            texts.append(argument)


class _Size(NamedTuple):
    """Of a tuple written out: how deep, and how many leaves. Anything else is a leaf."""

    depth: int = 0
    leaves: int = 1


class _Knots:
    """The stack of an unpickler with sizes in the place of objects.

    Python hashes a tuple by going through all of it, as deep as it is, and remembers nothing: forty
    operations make one of 2**40 leaves, and half a million one that overflows the stack of the process.
    """

    def __init__(self) -> None:
        self.stack: list[_Size | None] = []  # None is a mark
        self.memo: dict[int, _Size] = {}
        self.operations = 0
        self.is_lost = False  # behind an operation that no unpickler survives

    def tied_by(self, opcode: pickletools.OpcodeInfo, argument: Any) -> bool:
        """Follow an operation; tell whether it makes a knot."""
        self.operations += 1
        try:
            made = None if self.is_lost else self._follow(opcode, argument)
        except IndexError:
            self.is_lost, made = True, None
        return made is not None and (made.depth > MOST_DEPTH or made.leaves > MOST_SHARED + self.operations)

    def _follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> _Size | None:
        """Do to the sizes what the operation does to objects; return the size of a tuple that it makes."""
        if opcode.name == "MARK":
            self.stack.append(None)
        elif opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            top = self.stack[-1]
            self.memo[len(self.memo) if argument is None else argument] = top or _Size()
        elif opcode.name.endswith("GET"):
            self.stack.append(self.memo.get(argument, _Size()))
        else:
            parts = self._popped(opcode)
            made = _Size()
            if opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                depth = max((part.depth for part in parts), default=0)
                made = _Size(depth + 1, sum(part.leaves for part in parts))
            self.stack += [made] * len(opcode.stack_after)
            return made
        return None

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[_Size]:
        """Take off what an operation takes: down to the last mark if it goes by one, and what is under it."""
        before = [thing.name for thing in opcode.stack_before]
        parts: list[_Size] = []
        if "mark" in before:
            while (top := self.stack.pop()) is not None:
                parts.append(top)
            before = before[: before.index("mark")]
        for _ in before:
            top = self.stack.pop()
            if top is None:
                raise IndexError("a mark in the place of an object")
            parts.append(top)
        return parts
