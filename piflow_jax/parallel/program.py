"""Optimised programs as XLA prints them, and a walk through one that counts loop iterations."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence


class UnknownTripCountError(ValueError):
    """A loop's number of iterations does not follow from the program's text."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An operation of an optimised program."""

    name: str
    shape: str  # as printed, a tuple's in brackets
    opcode: str
    operands: tuple[str, ...]
    literal: str  # between the brackets, as printed
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> tuple[str, ...]:
        """Names of computations in an attribute; empty without it."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if match is None:
            return ()
        return tuple(re.findall(r"[\w.\-]+", match[1] if match[1] is not None else match[2]))

    @functools.cached_property
    def op_name(self) -> str:
        """The origin of the operation, with its scopes; may be empty."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        match = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(match[1]) if match else None

    @functools.cached_property
    def index(self) -> int:
        """Index of the element that a `get-tuple-element` takes."""
        return int(re.search(r"\bindex=(\d+)", self.attributes)[1])


class Computation:
    """Operations that run one after the other."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.instructions = {i.name: i for i in instructions}
        self.root = next((i for i in instructions if i.is_root), None)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Users of each operation, by its name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the entry computation."""

    computations: Mapping[str, Computation]
    entry: Computation


_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{\s*$")
_START = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w\-]+)\(")


def parse_program(text: str) -> Program:
    """Reads an optimised program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      The program.

    Raises:
      ValueError: the text is not that of a program.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    instructions: list[Instruction] = []
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            name, instructions = header["name"], []
            entry = name if header["entry"] else entry
        elif line.startswith("}") and name is not None:
            computations[name], name = Computation(instructions), None
        elif name is not None and (start := _START.match(line)):
            instructions.append(_instruction(start, line))
    if entry not in computations:
        raise ValueError("the text has no ENTRY computation; it must be compiled.as_text()")
    return Program(computations, computations[entry])


def _lines(text: str) -> Iterator[str]:
    """Lines of a program; an attribute of a kernel may have line breaks, which are taken out."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def _instruction(start: re.Match, line: str) -> Instruction:
    begin = position = start.end()  # at the shape; a tuple's shape is in brackets
    position = _closing(line, position) if line[position] == "(" else line.index(" ", position)
    opcode = _OPCODE.match(line, position)
    if opcode is None:
        raise ValueError(f"not an instruction of a compiled program: {line.strip()[:200]}")
    end = _closing(line, opcode.end() - 1)
    literal = line[opcode.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(
        start["name"],
        line[begin:position],
        opcode["opcode"],
        operands,
        literal,
        line[end:],
        bool(start["root"]),
    )


def _closing(line: str, position: int) -> int:
    """Position after the bracket that closes the one at `position`."""
    depth = 0
    for bracket in re.finditer(r"[()]", line[position:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return position + bracket.end()
    raise ValueError(f"brackets do not close: {line.strip()[:200]}")


# Operations that pass on the number in their operand.
_HAND_ON = {"copy", "bitcast", "reshape", "convert", "copy-done", "copy-start"}
# Known numbers in the state of a loop, by position in its tuple.
_Known = Mapping[int, int]


class Walk:
    """One pass over a program that adds up costs of operations, with loops as often as they run.

    Args:
      program: the program.
      scopes: names given to `jax.named_scope`.
      traced_trips: by scope, the iterations to count for loops with a length known only at run
        time.
      cost: cost of an operation, by name, given its scope; None where it is the sum over the
        computations that the operation calls.

    Attributes:
      traced: `op_name` of each loop with a length taken from `traced_trips`.
    """

    def __init__(
        self,
        program: Program,
        scopes: Sequence[str],
        traced_trips: Mapping[str, int],
        cost: Callable[[Instruction, str | None], Counter | None],
    ):
        self.traced: list[str] = []
        self._program = program
        self._cost = cost
        self._scopes = frozenset(scopes)
        self._traced_trips = traced_trips

    def run(self) -> Counter:
        """The sums.

        Raises:
          UnknownTripCountError: the length of a loop is neither in the program nor in
            `traced_trips`.
        """
        return self._computation(self._program.entry, None, {})

    def _computation(self, computation: Computation, scope: str | None, known: _Known) -> Counter:
        sums: Counter = Counter()
        for instruction in computation.instructions.values():
            mine = self._scope(instruction, computation, scope)
            if instruction.opcode == "while":
                start = self._start_of(instruction, computation, known)
                body = self._called(instruction, "body")[0]
                trips = self._trips(instruction, body, start, mine)
                # A loop's own name shows its position; its operations may be in an inner scope.
                within = self._named(instruction) or scope
                inner = self._computation(body, within, self._kept(body, start))
                for name, cycles in inner.items():
                    sums[name] += trips * cycles
            elif instruction.opcode == "conditional":
                branches = self._called(
                    instruction, "branch_computations", "true_computation", "false_computation"
                )
                costs = [self._computation(branch, mine, {}) for branch in branches]
                sums += max(costs, key=lambda cost: cost.total())
            elif (cost := self._cost(instruction, mine)) is not None:
                sums += cost
            else:
                for called in self._called(instruction, "calls", "to_apply"):
                    sums += self._computation(called, mine, {})
        return sums

    def _called(self, instruction: Instruction, *attributes: str) -> list[Computation]:
        names = [name for attribute in attributes for name in instruction.called(attribute)]
        return [self._program.computations[name] for name in names]

    # Scopes.

    def _named(self, instruction: Instruction) -> str | None:
        """The innermost scope in an operation's own name."""
        words = re.findall(r"[\w.\-]+", instruction.op_name)
        return next((word for word in reversed(words) if word in self._scopes), None)

    def _scope(
        self, instruction: Instruction, computation: Computation, enclosing: str | None
    ) -> str | None:
        found = self._named(instruction)
        if found is None and instruction.opcode == "fusion":
            inside = Counter(
                name
                for fused in self._called(instruction, "calls")
                for part in fused.instructions.values()
                if (name := self._named(part)) is not None
            )
            found = inside.most_common(1)[0][0] if inside else None
        if found is not None or enclosing is not None:
            return found or enclosing
        return next(self._neighbours(instruction, computation), None)

    def _neighbours(self, instruction: Instruction, computation: Computation) -> Iterator[str]:
        """Scopes of an operation's users, then of its operands."""
        uses = [computation.instructions.get(name) for name in instruction.operands]
        for other in [*computation.users.get(instruction.name, ()), *filter(None, uses)]:
            found = self._named(other)
            if found is not None:
                yield found

    # Loops.

    def _trips(self, loop: Instruction, body: Computation, start: _Known, scope: str | None) -> int:
        stated = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
        if stated:
            return int(stated[1])
        counted = self._counted(loop, body, start)
        if counted is not None:
            return counted
        if scope in self._traced_trips:
            self.traced.append(loop.op_name)
            return self._traced_trips[scope]
        raise UnknownTripCountError(
            f"the iterations of the loop %{loop.name} ({loop.op_name or 'no op_name'}) are not in "
            f"the program, and none were given for the scope {scope or 'other'}"
        )

    def _counted(self, loop: Instruction, body: Computation, start: _Known) -> int | None:
        """Iterations of `while i < limit: i += step` with numbers from the program."""
        known = self._kept(body, start)
        condition = self._called(loop, "condition")[0]
        test = condition.root
        if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = self._position(condition, test.operands[0])
        limit = self._number(condition, test.operands[1], known)
        if counter not in start or limit is None or body.root.opcode != "tuple":
            return None
        advance = body.instructions[self._origin(body, body.root.operands[counter])]
        if advance.opcode != "add":
            return None
        terms = [name for name in advance.operands if self._position(body, name) != counter]
        if len(terms) != 1:
            return None
        step = self._number(body, terms[0], known)
        return -((start[counter] - limit) // step) if step else None

    def _start_of(
        self, loop: Instruction, computation: Computation, known: _Known
    ) -> dict[int, int]:
        """Numbers in the initial tuple of a loop."""
        tuple_name = self._origin(computation, loop.operands[0])
        elements = computation.instructions[tuple_name]
        if elements.opcode != "tuple":
            return {}
        numbers = (self._number(computation, name, known) for name in elements.operands)
        return {i: number for i, number in enumerate(numbers) if number is not None}

    def _kept(self, body: Computation, start: _Known) -> dict[int, int]:
        """Numbers of the state that iterations do not change."""
        return {i: number for i, number in start.items() if self._is_kept(body, i)}

    def _is_kept(self, body: Computation, index: int) -> bool:
        if body.root is None or body.root.opcode != "tuple":
            return False
        return self._position(body, body.root.operands[index]) == index

    def _origin(self, computation: Computation, name: str) -> str:
        """Follows copies to the origin of a value."""
        while computation.instructions[name].opcode in _HAND_ON:
            name = computation.instructions[name].operands[0]
        return name

    def _position(self, computation: Computation, name: str) -> int | None:
        """Index of the value among the elements of the computation's argument."""
        value = computation.instructions[self._origin(computation, name)]
        if value.opcode != "get-tuple-element":
            return None
        source = computation.instructions[value.operands[0]]
        return value.index if source.opcode == "parameter" else None

    def _number(self, computation: Computation, name: str, known: _Known) -> int | None:
        """The integer value, if the program contains it."""
        value = computation.instructions[self._origin(computation, name)]
        if value.opcode == "constant":
            return int(value.literal) if re.fullmatch(r"-?\d+", value.literal.strip()) else None
        if value.opcode != "get-tuple-element":
            return None
        source = computation.instructions[self._origin(computation, value.operands[0])]
        if source.opcode == "parameter":
            return known.get(value.index)
        if source.opcode == "tuple":
            return self._number(computation, source.operands[value.index], known)
        if source.opcode == "while" and self._is_kept(self._called(source, "body")[0], value.index):
            before = computation.instructions[self._origin(computation, source.operands[0])]
            if before.opcode == "tuple":
                return self._number(computation, before.operands[value.index], known)
        return None
