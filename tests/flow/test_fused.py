"""Fused rollouts against the scan, a float64 loop in NumPy, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp

WARP = TimeWarp(3.2)
# Sites that fill no row of a block, several rows, and one.
SHAPES = {"points": ((3,), 5, 2), "tokens": ((70,), 4, 3), "images": ((8, 8), 1, 1)}
STARTS, ENDS = (1.0, 0.8, 0.3, 0.5), (0.0, 0.1, 0.3, 0.46)


def mixture(sites, components, channels, batch=4, logstd=-1.5, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(batch, *sites, components, channels))
    logweights = rng.normal(size=(batch, *sites, components))
    x = rng.normal(size=(batch, *sites, channels))
    output = GMOutput(means, logweights, np.full(batch, logstd))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (output, x))


def inputs(shape, **options):
    output, x = mixture(*SHAPES[shape], **options)
    starts = jnp.asarray(STARTS, jnp.float32)
    policy = GMFlowPolicy.create(output, x, WARP.warp(starts))
    dropped = np.zeros((4, SHAPES[shape][1]), bool)
    dropped[0, 1:] = True
    return policy.drop(jnp.asarray(dropped)), x, starts, jnp.asarray(ENDS, jnp.float32)


@pytest.mark.parametrize("solver", ["euler", "multistep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_scan(shape, solver):
    arguments = inputs(shape)
    ends = {
        (implementation, bound): jax.jit(
            lambda *a, i=implementation, b=bound: rollout(
                *a, WARP, 16, bound=b, solver=solver, implementation=i
            )
        )(*arguments)
        for implementation in ("scan", "fused")
        for bound in (None, 5, "traced")
    }
    for (implementation, bound), (x, sigma) in ends.items():
        if implementation == "fused":
            expected, at = ends["scan", bound]
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_allclose(sigma, at, rtol=0, atol=1e-7)  # to rounding
    # The bound is one: five substeps do not end where sixteen do.
    assert np.abs(ends["fused", 5][0] - ends["fused", None][0]).max() > 1e-3


def test_auto_is_fused_where_that_is_possible(x64):
    policy, *rest = inputs("images")
    text = jax.jit(lambda *a: rollout(*a, WARP, 8)).lower(policy, *rest).as_text()
    scan = jax.jit(lambda *a: rollout(*a, WARP, 8, implementation="scan"))
    assert text != scan.lower(policy, *rest).as_text()
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (policy, *rest))
    ends = [
        rollout(*double, WARP, 8, implementation=implementation)[0]
        for implementation in ("auto", "scan")
    ]
    np.testing.assert_array_equal(*ends)
    with pytest.raises(ValueError, match=r"in float32, not for a GMFlowPolicy .*float64"):
        rollout(*double, WARP, 8, implementation="fused")


def test_unknown_choices_are_refused():
    policy, x, start, end = inputs("points")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        rollout(policy, x, start, end, WARP, 8, implementation="cuda")
    with pytest.raises(ValueError, match="unknown solver 'heun'; it is 'euler' or 'multistep'"):
        rollout(policy, x, start, end, WARP, 8, solver="heun")
    grid = DXPolicy.create(jnp.zeros((4, 3, 2, 2)), x, start)
    with pytest.raises(ValueError, match="not for a DXPolicy"):
        rollout(grid, x, start, end, WARP, 8, implementation="fused")


def test_it_is_as_accurate_as_its_inputs_allow(x64):
    """Narrow mixtures, down to the data: no farther from float64 than the scan is."""
    for logstd in (-1.0, -3.0, -5.0):
        arguments = inputs("tokens", logstd=logstd)
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        exact, _ = rollout(*double, WARP, 128)
        errors = {
            implementation: np.abs(
                rollout(*arguments, WARP, 128, implementation=implementation)[0] - exact
            ).max()
            for implementation in ("scan", "fused")
        }
        scale = np.abs(exact).max()
        assert errors["fused"] <= 2 * errors["scan"] + 1e-5 * scale, (logstd, errors)


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_derivatives_are_those_of_finite_differences(solver, x64):
    """Of the fused rollout in float32, both ways, against differences in float64."""
    output, x = mixture((3,), 3, 2)
    starts, ends = jnp.asarray(STARTS, jnp.float32), jnp.asarray(ENDS, jnp.float32)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(output, x, implementation="fused"):
        policy = GMFlowPolicy.create(output, x, WARP.warp(starts).astype(x.dtype))
        at = (a.astype(x.dtype) for a in (starts, ends))
        end, _ = rollout(
            policy, 0.9 * x, *at, WARP, 12, solver=solver, implementation=implementation
        )
        return jnp.sum(end * weights)

    direction = jax.tree.map(
        lambda a: jnp.sin(3 + jnp.arange(a.size)).reshape(a.shape), (output, x)
    )
    single = jax.tree.map(lambda a: a.astype(jnp.float32), direction)
    double = jax.tree.map(lambda a: a.astype(jnp.float64), (output, x))

    def moved(h):
        return loss(*jax.tree.map(lambda a, d: a + h * d, double, direction), "scan")

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(output, x)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(single), strict=True)
    along = sum(jnp.vdot(g, d) for g, d in pairs)
    _, forward = jax.jit(lambda *a: jax.jvp(loss, *a))((output, x), single)
    np.testing.assert_allclose(along, expected, rtol=2e-4)
    np.testing.assert_allclose(forward, expected, rtol=2e-4)


def test_a_rollout_without_derivative_stays_fused():
    """As in training: the detached policy is inside what is differentiated."""
    policy, *rest = inputs("images")

    def loss(scale):
        detached = jax.lax.stop_gradient(policy)
        end, _ = rollout(detached, *rest, WARP, 8, bound="traced")
        return jnp.sum(scale * end)

    text = str(jax.make_jaxpr(jax.grad(loss))(1.0))
    assert "custom_vmap_call" in text or "custom_partitioning" in text
    assert float(jax.grad(loss)(1.0)) == pytest.approx(
        float(jnp.sum(rollout(policy, *rest, WARP, 8)[0])), rel=1e-5
    )


def test_vmap_maps_what_it_is_told_to():
    policy, x, start, end = inputs("tokens")
    many = jnp.stack([x, 0.5 * x, -x])

    def run(x, end, implementation="fused"):
        return rollout(policy, x, start, end, WARP, 8, implementation=implementation)[0]

    found = jax.vmap(run, in_axes=(0, None))(many, end)
    for one, expected in zip(many, found, strict=True):
        np.testing.assert_allclose(run(one, end, "scan"), expected, rtol=0, atol=1e-5)
