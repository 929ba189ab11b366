"""A network of your own on the command line: a small U-Net, which knows nothing of this package.

    python -m piflow_jax.main --config=configs/digits.py --workdir=runs/unet \
        --config.model.network=examples.unet:unet \
        --config.teacher.optimizer.kind=adamw --config.teacher.optimizer.learning_rate=1e-3 \
        --config.train.optimizer.kind=adamw

Teacher and student are networks of the same function: the teacher predicts one velocity per pixel,
the student, which starts at the teacher's weights, as many numbers as its policy wants. In a
notebook, `piflow_jax.load("runs/unet", network=unet)` has the student.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

WIDTH = 64


class Block(nn.Module):
    """Two convolutions with a residual, conditioned on time and label in between."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Maps `x[B, H, W, C]` and `condition[B, D]` to `[B, H, W, width]`."""
        h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
        h = h + nn.Dense(self.width)(condition)[:, None, None, :]
        h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(8)(h)))
        return h + nn.Dense(self.width)(x)


class UNet(nn.Module):
    """One scale down and up again."""

    outputs: int
    num_classes: int
    width: int = WIDTH

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Maps `x[B, H, W, C]`, `t[B]` in [0, 1] and `labels[B]` to `[B, H, W, outputs]`."""
        angles = t[:, None] * jnp.pi * 2.0 ** jnp.arange(8)[None]
        condition = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        # One more than there are classes: the last label stands for none.
        label = nn.Embed(self.num_classes + 1, self.width)(labels)
        condition = nn.silu(nn.Dense(self.width)(condition) + label)

        fine = Block(self.width)(nn.Conv(self.width, (3, 3))(x), condition)
        coarse = Block(2 * self.width)(nn.avg_pool(fine, (2, 2), (2, 2)), condition)
        up = jax.image.resize(coarse, (*fine.shape[:3], 2 * self.width), "nearest")
        h = Block(self.width)(jnp.concatenate([fine, up], axis=-1), condition)
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="out")(nn.silu(h))


def unet(outputs: int, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network of `outputs` numbers per site for states of a shape `(H, W, C)`.

    Args:
      outputs: the channels for a teacher; for a student what its policy wants.
      shape: of a sample, without the batch.
      num_classes: labels are 0 to `num_classes`, of which the last stands for none.

    Returns:
      The module, called with `(x, t, labels)`.
    """
    del shape  # convolutions take any
    return UNet(outputs, num_classes)
