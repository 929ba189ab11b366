"""LoRA files of a configuration or of a call, added to official weights (see `with_loras`)."""

from collections.abc import Mapping
from typing import Any

from piflow_jax.arguments import prefixed
from piflow_jax.runs.workdir import user_path
from piflow_jax.systems.network import Network


def fine_tuned(
    weights: Mapping[str, Any],
    network: Network,
    form: str,
    loras: Mapping[str, float],
    *,
    of_student: bool = False,
) -> Mapping[str, Any]:
    """Official weights with LoRA files added to them, see `with_loras`.

    Args:
      weights: from `open_weights`.
      network: the network that reads them.
      form: the layout of the weights.
      loras: strengths by path, from `lora_strengths`.
      of_student: the weights are the base of a student, which has an output head and a last
        modulation of its own.

    Returns:
      The weights; the same object if there are no LoRA files.

    Raises:
      FileNotFoundError: a file is not there.
      ImportError: a file is PyTorch's, and PyTorch is not installed.
      ValueError: a file is damaged, or does not fit the weights; the message lists what.
    """
    from piflow_jax.convert import open_weights, with_loras

    if not loras:
        return weights
    opened = []
    for path, strength in loras.items():
        with prefixed(path):
            opened.append((open_weights(user_path(path, of_weights=True)), strength))
    return with_loras(weights, form, opened, network.module if of_student else None)
