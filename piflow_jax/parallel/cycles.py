"""Where a program compiled for TPUs spends its time, by the compiler's own estimates.

XLA's TPU compiler notes in the optimised program how many cycles it expects of each operation. Here
they are summed by `jax.named_scope`, loops counted as often as they run. The estimates are those by
which the compiler chose its tilings; they are no measurement. Collectives and other transfers
that overlap with the arithmetic have no estimate and are not in the sums.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from piflow_jax.parallel.program import Walk, parse_program

__all__ = ["OTHER", "Cycles", "estimated_cycles"]

OTHER = "other"
"""The name of what belongs to no scope."""


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program, on each device.

    Attributes:
      by_scope: cycles by scope, all scopes asked for and `other`.
      traced: `op_name` of each loop whose length is known only when it runs.
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

    An operation belongs to the innermost of the scopes in its `op_name`; `transpose(jvp(scope))` is
    in the scope too. One that has none (a copy or a conversion of the compiler's own) belongs to
    what is fused in it, else to the loop that it runs in, else to what uses it, else to what it
    uses.

    Args:
      text: the optimised program, `compiled.as_text()`.
      scopes: names given to `jax.named_scope`.
      traced_trips: by scope, iterations to count for its loops of a length that is known only when
        they run.

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
