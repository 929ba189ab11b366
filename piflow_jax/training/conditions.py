"""What networks are told beside state and time: classes, or text.

Conditions are keyword arguments of a network, arrays with the batch in front; the null ones, which
stand for no condition in guidance, are those of a single example, without the batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from piflow_jax.config import ModelConfig

__all__ = ["Conditions", "conditions", "null_conditions"]

Conditions = Mapping[str, jax.Array]


def conditions(model: ModelConfig, batch: Mapping[str, ArrayLike]) -> Conditions:
    """The conditions of a batch.

    Args:
      model: the network's settings.
      batch: has `label[B]`, or of captions `text[B, L, D]`, padded behind its `text_length[B]`
        tokens, and for FLUX.1 `pooled[B, P]`.

    Returns:
      The arguments of the network. Qwen-Image does not see padding; FLUX.1, as it was trained, sees
      all of the text.
    """
    if model.network == "dit":
        return {"labels": jnp.asarray(batch["label"])}
    text = jnp.asarray(batch["text"])
    if model.network == "qwen_image":
        positions = jnp.arange(text.shape[1])[None, :]
        return {"text": text, "mask": positions < jnp.asarray(batch["text_length"])[:, None]}
    told = {"text": text, "pooled": jnp.asarray(batch["pooled"])}
    if model.distilled_guidance > 0:
        told["guidance"] = jnp.full(text.shape[:1], model.distilled_guidance, jnp.float32)
    return told


def null_conditions(
    model: ModelConfig, num_classes: int, null: Mapping[str, ArrayLike] | None
) -> Conditions:
    """The conditions that stand for none.

    Args:
      model: the network's settings.
      num_classes: of data with classes; that label is the null one.
      null: of captions, the example of the empty one.

    Returns:
      The arguments of the network, without the batch.
    """
    if model.network == "dit":
        null = {"label": jnp.int32(num_classes)}
    batch = {name: jnp.asarray(value)[None] for name, value in null.items()}
    return jax.tree.map(lambda a: a[0], conditions(model, batch))
