"""Data that a program compiled for TPUs moves between devices, read from its text.

The count is the data that a device sends if a collective over `n` devices runs as a ring. That is
`(n - 1) / n` of the result of an all-gather and of the argument of a reduce-scatter or an
all-to-all, twice that for an all-reduce, and all of a permutation's argument. Between slices the
compiler has replaced collectives by transfers between hosts; these are counted in full.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from piflow_jax.parallel.program import Instruction, Program, Walk, parse_program

BETWEEN_SLICES = "between slices"
"""The name of data sent by hosts."""

_BITS = {"pred": 8}
_START = 'custom_call_target="AsyncCollectiveStart"'


def collective_bytes(
    text: str, scopes: Sequence[str] = (), traced_trips: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Adds up what each device sends in one run of a program.

    Args:
      text: the optimised program, `compiled.as_text()`.
      scopes: see `Walk`.
      traced_trips: see `Walk`.

    Returns:
      Bytes by kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`,
      `collective-permute`, and `BETWEEN_SLICES`.

    Raises:
      UnknownTripCountError: the length of a loop is neither in the program nor in `traced_trips`.
      ValueError: the text is not that of a program, or names a group in an unknown notation.
    """
    program = parse_program(text)
    skipped, scattered = _continuations(program), _scattered(program)

    def cost(instruction: Instruction, scope: str | None) -> Counter | None:
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "send" and "is_host_transfer=true" in instruction.attributes:
            return Counter({BETWEEN_SLICES: _shapes(instruction.shape)[0]})
        if kind not in _SENT:
            return None
        if instruction.name in skipped:
            return Counter()
        size = _result_bytes(instruction)
        group = 1 if kind == "collective-permute" else _group_size(instruction.attributes)
        if kind == "reduce-scatter":
            size *= group
        if instruction.name in scattered:
            kind = "reduce-scatter"
        return Counter({kind: round(_SENT[kind](size, group))})

    return dict(Walk(program, scopes, traced_trips or {}, cost).run())


def _part(size: int, group: int) -> float:
    return size * (group - 1) / group


_SENT = {
    "all-gather": _part,
    "reduce-scatter": _part,
    "all-to-all": _part,
    "all-reduce": lambda size, group: 2 * _part(size, group),
    "collective-permute": lambda size, group: size,
}


def _collectives(program: Program):
    for name, computation in program.computations.items():
        for instruction in computation.instructions.values():
            if instruction.opcode.removesuffix("-start") in _SENT:
                yield name, computation, instruction


def _continuations(program: Program) -> set[str]:
    """Instances that are not transfers of their own.

    A transfer that overlaps with arithmetic appears in every computation that it passes through,
    always with the same channel. It is counted where it starts.
    """
    starts: dict[str, set[str]] = {}
    instances: dict[str, set[str]] = {}
    for _, computation, instruction in _collectives(program):
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if channel is None:
            continue
        instances.setdefault(channel[1], set()).add(instruction.name)
        if any(_START in other.attributes for other in computation.instructions.values()):
            starts.setdefault(channel[1], set()).add(instruction.name)
    return {
        name
        for channel, names in instances.items()
        if channel in starts
        for name in names - starts[channel]
    }


def _scattered(program: Program) -> set[str]:
    """All-reduces after which every device keeps only a part: reduce-scatters in the hardware."""
    return {
        instruction.name
        for name, _, instruction in _collectives(program)
        if name.startswith("all-reduce-scatter")
    }


def _result_bytes(instruction: Instruction) -> int:
    shapes = _shapes(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # Arguments, results, and possibly the hardware's counters.
        shapes = shapes[len(instruction.operands) : 2 * len(instruction.operands)]
    return sum(shapes)


@functools.cache
def _shapes(shape: str) -> list[int]:
    """Bytes of each array in a printed shape."""
    return [
        math.prod(int(n) for n in sizes.split(",") if n) * _bits(dtype) // 8
        for dtype, sizes in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape)
    ]


def _bits(dtype: str) -> int:
    width = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS.get(dtype) or int(width[1])


def _group_size(attributes: str) -> int:
    groups = re.search(
        r"replica_groups=(\{\{([\d,]+)\}|\[\d+,(\d+)\]"
        r"|mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\})",
        attributes,
    )
    if groups is None:
        raise ValueError(f"no group of devices that is known here: {attributes[:200]}")
    if groups[2]:
        return len(groups[2].split(","))
    if groups[3]:
        return int(groups[3])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[4]))
    # A part of an axis is printed with the number of devices left and its size: 'data':(2)4.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[5])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
