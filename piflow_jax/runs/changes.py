"""Settings of a run that goes on: which may change, and which did."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from piflow_jax.runs.steps import CheckpointError

if TYPE_CHECKING:
    from piflow_jax.runs.loop import Stage

# The key of a checkpoint's settings that lists those which changed on the way to it.
CHANGES = "changes"


def changed_settings(
    saved: Mapping[str, Any], stage: "Stage", path: os.PathLike, step: int
) -> list[dict[str, Any]]:
    """Refuses settings that a run may not change; returns those that it changes.

    Args:
      saved: the settings of the checkpoint.
      stage: what is to be run.
      path: the checkpoint, for the message.
      step: the checkpoint's step.

    Returns:
      Of each key that has another value in the steps that are left: `key`, `step`, `was` and `to`.

    Raises:
      CheckpointError: the checkpoint is beyond the stage's end, or other settings differ.
    """
    saved = stage.updated(saved)
    wanted = {key: _jsonable(value) for key, value in stage.config.items()}
    free = {*stage.extensible, CHANGES}
    if step < stage.steps:
        free.update(stage.tunable)
    for identity, keys in stage.identified.items():
        free.update(keys if identity in saved else [identity])
    keys = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))

    def difference(key: str) -> str:
        was, now = saved.get(key), wanted.get(key)
        if key in stage.identified:  # no key of the configuration, which nobody could set back
            what = f"this {key.split('.')[0]} is not the one that the {stage.name} was trained with"
            return f"  {key}: {what}; the checkpoint has {was!r}, here is {now!r}"
        return f"  config.{key}: the checkpoint has {was!r}, asked for {now!r}"

    different = [difference(key) for key in keys if key not in free]
    if different:
        raise CheckpointError(
            "\n".join(
                [
                    f"the checkpoint {path} was made with other settings:",
                    *different,
                    "Take these settings back, or pass another --workdir.",
                ]
            )
        )
    if step > stage.steps:
        lengths = [key for key in stage.extensible if key.split(".")[-1] == "steps"]
        raise CheckpointError(
            f"{path} is at step {step}, beyond the {stage.steps} that were asked for. Raise "
            f"{' and '.join(f'config.{key}' for key in lengths) or 'the number of steps'} to {step}"
            " or more, or pass another --workdir."
        )
    return [
        {"step": step, "key": key, "was": saved.get(key), "to": wanted.get(key)}
        for key in keys
        if key in (*stage.extensible, *stage.tunable) and step < stage.steps
    ]


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
