"""Counts the work of a compiled program on one device from XLA's text; XLA's own analysis counts a loop's body once.

`count` sums over a whole program, `operations` describes each of its instructions, to pair them with a trace.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: of its results.
      result_bytes: of all its results.
      times: how often it runs.
      loops: in how many nested loops.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    result_bytes: int
    times: float
    loops: int


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a program on one device.

    Attributes:
      flops: of matrix products; a multiplication and an addition count as two.
      collectives: all collective instructions.
    """

    flops: float
    collectives: tuple[Collective, ...]

    @property
    def collective_bytes(self) -> float:
        """Bytes of the results of all collectives on the device."""
        return sum(one.result_bytes * one.times for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    computation: str
    name: str
    shape: str
    operation: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one instruction does in one execution, with everything that it calls.

    Attributes:
      kinds: names of XLA's operations in it.
      products: sizes of its matrix products, "batch x rows x contracted x columns" without sizes of 1.
      flops: of its matrix products.
      scope: the path of named scopes that it comes from; empty if XLA made it.
    """

    kinds: frozenset[str]
    products: tuple[str, ...]
    flops: int
    scope: str


def operations(text: str) -> dict[str, Operation]:
    """Describes the instructions of `compiled.as_text()` by name, loops and conditionals excluded."""
    computations, _ = _parse(text)
    shapes = {(one.computation, one.name): one.shape for body in computations.values() for one in body}
    found = {}
    for one in (one for body in computations.values() for one in body):
        if one.operation in ("while", "conditional"):
            continue
        inner = [part for part, _, _ in _executed({**computations, "": [one]}, "", 1.0, 0)]
        dots = [part for part in inner if part.operation == "dot"]
        scope = _SCOPE.search(one.rest)
        found[one.name] = Operation(
            frozenset(part.operation for part in inner),
            tuple(_product(dot, shapes) for dot in dots),
            sum(_dot_flops(dot, shapes) for dot in dots),
            scope[1] if scope else "",
        )
    return found


def count(text: str) -> Work:
    """Counts the work in `compiled.as_text()`, assuming that the branches of a conditional run equally often.

    Raises:
      ValueError: there is a loop with an unknown number of iterations, or no entry computation.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("no entry computation; pass compiled.as_text()")
    flops, collectives = 0.0, []
    shapes = {(one.computation, one.name): one.shape for body in computations.values() for one in body}
    for one, times, loops in _executed(computations, entry, 1.0, 0):
        if one.operation == "dot":
            flops += times * _dot_flops(one, shapes)
        kind = one.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in _SHAPE.findall(one.shape))
            collectives.append(Collective(kind, sizes, _bytes(one.shape), times, loops))
    return Work(flops, tuple(collectives))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry, name, body = None, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[1]
            body = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif body is not None and (found := _INSTRUCTION.match(line)):
            body.append(_Instruction(name, *found.groups()))
    return computations, entry


def _executed(
    computations: dict[str, list[_Instruction]], name: str, times: float, loops: int
) -> Iterator[tuple[_Instruction, float, int]]:
    """Yields every instruction that a computation runs, how often, and inside how many loops."""
    for one in computations[name]:
        yield one, times, loops
        called, share, depth = _CALLED.findall(one.rest), times, loops
        if one.operation == "while":
            trips = _TRIPS.search(one.rest)
            if trips is None:
                raise ValueError(f"XLA does not know how often {one.name} runs")
            share, depth = times * int(trips[1]), loops + 1
        elif one.operation == "conditional":
            branches = _BRANCHES.search(one.rest)
            called = re.findall(r"[\w.\-]+", branches[1]) if branches else called
            share = times / len(called)
        for inner in called:
            yield from _executed(computations, inner, share, depth)


def _dot_flops(one: _Instruction, shapes: dict[tuple[str, str], str]) -> int:
    operand = re.search(r"%([\w.\-]+)", one.rest)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    assert operand and contracted
    sizes = _sizes(shapes[one.computation, operand[1]])
    return 2 * math.prod(_sizes(one.shape)) * math.prod(sizes[int(i)] for i in contracted[1].split(",") if i)


def _product(one: _Instruction, shapes: dict[tuple[str, str], str]) -> str:
    operand = re.search(r"%([\w.\-]+)", one.rest)
    assert operand
    left, result = _sizes(shapes[one.computation, operand[1]]), _sizes(one.shape)

    def size(name: str) -> int:
        found = re.search(rf"{name}=\{{([\d,]*)\}}", one.rest)
        return math.prod(left[int(i)] for i in found[1].split(",") if i) if found else 1

    batch, contracted = size("lhs_batch_dims"), size("lhs_contracting_dims")
    rows = math.prod(left) // (batch * contracted)
    sizes = (batch, rows, contracted, math.prod(result) // (batch * rows))
    return " x ".join(str(size) for size in sizes if size > 1)


def _sizes(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    assert found
    return [int(size) for size in found[2].split(",") if size]


def _bytes(shape: str) -> int:
    sizes = _SHAPE.findall(shape)
    return sum(_BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in sizes)
