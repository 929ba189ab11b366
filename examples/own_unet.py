"""A teacher and images of your own: a DDPM with a U-Net, distilled to one evaluation.

    python examples/own_unet.py FOLDER runs/own

The folder has a folder of images for each class. U-Net, data and the teacher's training know
nothing of this package: `piflow_jax.Teacher` says what the network predicts, and `distill` does the
rest. Killed and started again, it continues; `samples.png` and `report.json` come last.
"""

import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from PIL import Image

import piflow_jax

ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM's table


class Block(nn.Module):
    """Two convolutions, with time and label in between, and a residual."""

    width: int

    @nn.compact
    def __call__(self, x, condition):
        """Maps `x[B, H, W, C]` and `condition[B, D]` to `[B, H, W, width]`."""
        h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(8)(nn.Conv(self.width, (1, 1))(x))))
        h = h + nn.Dense(self.width)(condition)[:, None, None, :]
        h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(8)(h)))
        return h + nn.Conv(self.width, (1, 1))(x)


class UNet(nn.Module):
    """Down once and up again; it predicts noise, at one of 1,000 times."""

    outputs: int
    classes: int
    width: int = 32

    @nn.compact
    def __call__(self, z, s, labels):
        """Maps `z[B, H, W, C]`, `s[B]` in [0, 1000) and `labels[B]` to `[B, H, W, outputs]`."""
        angles = s[:, None] / 1000 * jnp.pi * 2.0 ** jnp.arange(10)[None]
        times = nn.Dense(self.width)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        condition = nn.silu(times + nn.Embed(self.classes + 1, self.width)(labels))
        fine = Block(self.width)(z, condition)
        coarse = Block(2 * self.width)(nn.avg_pool(fine, (2, 2), (2, 2)), condition)
        up = jax.image.resize(coarse, (*fine.shape[:3], 2 * self.width), "nearest")
        h = Block(self.width)(jnp.concatenate([fine, up], -1), condition)
        return nn.Conv(self.outputs, (1, 1), name="head")(nn.silu(h))


def read_images(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `float32[N, size, size, 3]` in [-1, 1] and their labels."""
    images, labels = [], []
    for label, directory in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for path in sorted(directory.iterdir()):
            image = Image.open(path).convert("RGB").resize((size, size))
            images.append(np.asarray(image, np.float32) / 127.5 - 1)
            labels.append(label)
    return np.stack(images), np.asarray(labels, np.int32)


def train_ddpm(unet: UNet, images, labels, steps: int, batch: int = 64):
    """What somebody else has done: DDPM training, with nothing of ours."""
    alphas = jnp.asarray(ALPHAS, jnp.float32)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    params = unet.init(jax.random.key(0), images[:1], jnp.ones(1), labels[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry, key):
        params, state = carry
        which, when, noise = jax.random.split(key, 3)
        rows = jax.random.randint(which, (batch,), 0, len(images))
        s = jax.random.randint(when, (batch,), 0, 1000)
        eps = jax.random.normal(noise, (batch, *images.shape[1:]))
        alpha = alphas[s][:, None, None, None]
        z = jnp.sqrt(alpha) * images[rows] + jnp.sqrt(1 - alpha) * eps
        grads = jax.grad(lambda p: jnp.mean((unet.apply(p, z, s, labels[rows]) - eps) ** 2))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params)


def main(folder, workdir, *, size=32, teacher_steps=3000, student_steps=2000, width=32, **changes):
    """Trains the teacher once, distils it, and returns the student."""
    images, labels = read_images(Path(folder), size)
    classes = int(labels.max()) + 1
    teacher_net = UNet(3, classes, width)
    weights = Path(workdir) / "ddpm.msgpack"
    if not weights.exists():
        params = train_ddpm(teacher_net, images, labels, teacher_steps)
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(flax.serialization.to_bytes(params))
    params = flax.serialization.msgpack_restore(weights.read_bytes())

    config = piflow_jax.base_config()
    config.policy.num_components = 4
    config.train.steps, config.train.batch_size = student_steps, 32
    config.evaluation.num_samples, config.evaluation.teacher_steps = 500, (1, 4, 32)
    config.update_from_flattened_dict(changes)
    return piflow_jax.distill(
        config,
        workdir,
        teacher=piflow_jax.Teacher(
            predict=teacher_net.apply,
            shape=(size, size, 3),
            prediction="eps",
            schedule=piflow_jax.Schedule.discrete(ALPHAS),
        ),
        teacher_params=params,
        network=UNet(piflow_jax.policy_outputs(config, channels=3), classes, width),
        source=(images, labels),
        initial_params=params,  # the first policy is the teacher
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
