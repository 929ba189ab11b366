"""A network that takes two times, for methods that learn mean velocities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.models import DiT
from piflow_jax.rivals.flow_map import TwoTimes
from tests.models.small import SMALL, apply, random_params, small_inputs


def test_a_second_time_is_embedded_beside_the_first():
    """It adds two layers and nothing else, and its output matters at every value."""
    plain, module = DiT(**SMALL), TwoTimes(**SMALL)
    x, t, labels = small_inputs()
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, labels, t)["params"]
    without = jax.eval_shape(plain.init, jax.random.key(0), x, t, labels)["params"]
    added = {"second_time_in", "second_time_out"}
    assert set(shapes) - set(without) == added and set(without) < set(shapes)

    params = {"params": dict(random_params(plain)["params"])}
    for name in added:
        params["params"][name] = {
            leaf: jnp.sin(jnp.arange(shape.size, dtype=jnp.float32)).reshape(shape.shape)
            for leaf, shape in shapes[name].items()
        }
    run = jax.jit(module.apply)
    outputs = [run(params, x, t, labels, jnp.full_like(t, second)) for second in (0.0, 0.3, 1.0)]
    for a, b in itertools.pairwise(outputs):
        assert jnp.abs(a - b).max() > 1e-3
    # With a silent embedder the network is the plain one.
    silent = jax.tree.map(jnp.zeros_like, params["params"]["second_time_out"])
    params["params"]["second_time_out"] = silent
    found = run(params, x, t, labels, t)
    np.testing.assert_allclose(found, apply(plain, random_params(plain), x, t, labels), atol=1e-5)

    with pytest.raises(TypeError, match="second"):
        module.apply(params, x, t, labels)
    with pytest.raises(ValueError, match="guidance_embed is False"):
        plain.apply(params, x, t, labels, t)
    with pytest.raises(ValueError, match="must have the shape of t"):
        module.apply(params, x, t, labels, t[:1])
    assert len(module.example(2)) == 4 and module.example(2)[3] == module.example(2)[1]
