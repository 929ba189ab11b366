"""The time that a program compiled for TPUs spends in each part, as estimated by the compiler.

XLA's TPU compiler writes the cycles that it expects for each operation into the optimised program.
This module sums them by `jax.named_scope`, with loops counted as often as they run. The compiler
chose its tilings by these estimates; they are not measurements. Collectives and other transfers
that overlap with the arithmetic have no estimate and are not in the sums.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from piflow_jax.parallel.program import Walk, parse_program

OTHER = "other"
"""The name of operations outside all scopes."""


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program, on each device.

    Attributes:
      by_scope: cycles by scope: all requested scopes and `other`.
      traced: `op_name` of each loop with a length known only at run time.
    """

    by_scope: Mapping[str, int]
    traced: tuple[str, ...]

    @property
    def total(self) -> int:
        """Cycles of the whole program."""
        return sum(self.by_scope.values())

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the total by scope; all 0 for a program without estimates."""
        return {scope: n / max(self.total, 1) for scope, n in self.by_scope.items()}


def estimated_cycles(
    text: str, scopes: Sequence[str], traced_trips: Mapping[str, int] | None = None
) -> Cycles:
    """Sums the compiler's estimates by named scope.

    An operation belongs to the innermost of the scopes in its `op_name`; `transpose(jvp(scope))`
    also belongs to the scope. An operation without a scope (a copy or a conversion of the
    compiler's own) takes it from the first of these that has one: the operations fused in it, its
    loop, its users, its operands.

    Args:
      text: the optimised program, `compiled.as_text()`.
      scopes: names given to `jax.named_scope`.
      traced_trips: by scope, the iterations to count for loops with a length known only at run
        time.

    Returns:
      The sums.

    Raises:
      UnknownTripCountError: the length of a loop is neither in the program nor in `traced_trips`.
      ValueError: the text is not that of a program.
    """

    def cost(instruction, scope):
        cycles = instruction.cycles
        return None if cycles is None else Counter({scope or OTHER: cycles})

    walk = Walk(parse_program(text), scopes, traced_trips or {}, cost)
    sums = walk.run()
    return Cycles({scope: sums[scope] for scope in (*scopes, OTHER)}, tuple(walk.traced))
