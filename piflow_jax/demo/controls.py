"""Controls of the page, and what of the values that a call may send they take."""

import dataclasses
import math
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """A control of the page, and what of the values that a call may send it takes.

    Attributes:
      key: the argument that its value becomes.
      name: its label.
      low: the smallest value.
      high: the largest.
      value: where it stands at first.
      kind: a `slider` and a `radio` take the nearest of their values, a `number` and a `list` take
        no value between.
      step: between values.
      choices: names and values of a `list` or a `radio`.
      info: a line below the label.
    """

    key: str
    name: str
    value: float
    low: float = 0
    high: float = 0
    kind: Literal["slider", "radio", "number", "list"] = "slider"
    step: float = 1
    choices: tuple[tuple[str, int], ...] = ()
    info: str | None = None

    def __post_init__(self) -> None:
        """Takes the range from the choices."""
        if self.choices:
            values = [value for _, value in self.choices]
            object.__setattr__(self, "low", min(values))
            object.__setattr__(self, "high", max(values))

    def component(self) -> Any:
        """The control on the page."""
        import gradio

        common = {"value": self.value, "label": self.name, "info": self.info}
        if self.kind == "list":
            return gradio.Dropdown(list(self.choices), **common)
        if self.kind == "radio":
            return gradio.Radio(list(self.choices), **common)
        if self.kind == "number":
            return gradio.Number(precision=0, minimum=self.low, maximum=self.high, **common)
        return gradio.Slider(self.low, self.high, step=self.step, buttons=[], **common)

    def read(self, sent: Any) -> float:
        """A value of the control for what a call sent.

        Args:
          sent: anything that JSON can be.

        Returns:
          The value.

        Raises:
          ValueError: there is none; names the control.
        """
        number = isinstance(sent, int | float) and not isinstance(sent, bool)
        if not number or not abs(sent) < math.inf:
            raise ValueError(f"{self.name} must be a number, got {str(sent)[:40]!r}")
        if self.kind == "radio":
            return min((value for _, value in self.choices), key=lambda value: abs(value - sent))
        exact = self.kind in ("number", "list")
        if exact and not (self.low <= sent <= self.high and sent == int(sent)):
            raise ValueError(
                f"{self.name} must be a whole number from {self.low} to {self.high}, got {sent}"
            )
        nearest = self._nearest(sent)
        # The place of the first value may lie beside it.
        return self.value if nearest == self._nearest(self.value) else nearest

    def _nearest(self, sent: float) -> float:
        steps = round((min(max(sent, self.low), self.high) - self.low) / self.step)
        return min(round(self.low + steps * self.step, 6), self.high)
