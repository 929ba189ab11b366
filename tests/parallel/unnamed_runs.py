"""Steps of a network that names no axes, on one device and split over eight; prints JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from piflow_jax.config import parse
from piflow_jax.parallel import batch_sharding, device_mesh, replicated, state_shardings
from piflow_jax.training.optimizer import make_optimizer
from piflow_jax.training.state import TrainState
from piflow_jax.training.step import advance
from tests import tiny


class Network(nn.Module):
    """Convolutions as anybody writes them."""

    @nn.compact
    def __call__(self, x, t):
        """A velocity of `x[B, H, W, 1]` at `t[B]`."""
        hidden = nn.Conv(16, (3, 3), param_dtype=x.dtype)(x)
        hidden = hidden + nn.Dense(16, param_dtype=x.dtype)(t[:, None])[:, None, None]
        hidden = nn.silu(nn.Conv(32, (3, 3), param_dtype=x.dtype)(nn.silu(hidden)))
        return nn.Conv(1, (3, 3), param_dtype=x.dtype)(hidden)


def run(fsdp):
    """Losses, and the share of each kernel and its moment that a device holds."""
    mesh = device_mesh(fsdp=fsdp, devices=jax.devices()[:fsdp])
    settings = dataclasses.replace(parse(tiny.get_config()).train.optimizer, kind="adamw")
    optimizer = make_optimizer(settings, 5)
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(16, 8, 8, 1)), "t": rng.uniform(size=16)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    module = Network()

    def init():
        params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
        return TrainState.create(params, optimizer)

    params = jax.eval_shape(init).params
    shardings = state_shardings(mesh, jax.eval_shape(init), params)
    state = jax.jit(init, out_shardings=shardings)()

    def step(state, batch):
        def loss_fn(params):
            return jnp.mean((module.apply(params, batch["x"], batch["t"]) - batch["x"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return advance(state, grads, loss, optimizer, settings)

    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    shares = {
        jax.tree_util.keystr(path): leaf.addressable_data(0).size / leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.ndim > 1
    }
    return {"losses": losses, "shares": shares}


if __name__ == "__main__":
    print(json.dumps({fsdp: run(fsdp) for fsdp in (1, 8)}))
