"""Fused rollouts against the scan, a float64 loop in NumPy, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import ArcFlowPolicy, ArcOutput, DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.kernels.mosaic import mosaic_rollout
from piflow_jax.kernels.triton import triton_rollout

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


def both(arguments, total, **options):
    """A rollout's `(x, sigma)` by the scan and fused, of one program."""
    return jax.jit(
        lambda *a: [
            rollout(*a, WARP, total, implementation=implementation, **options)
            for implementation in ("scan", "fused")
        ]
    )(*arguments)


def assert_same(scan, fused):
    (expected, at), (x, sigma) = scan, fused
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(sigma, at)


@pytest.fixture
def program(request, monkeypatch):
    """What a fused rollout is: XLA's on a CPU, or a kernel, operation by operation."""
    if request.param != "xla":
        kernel = {"mosaic": mosaic_rollout, "triton": triton_rollout}[request.param]
        interpreted = functools.partial(kernel, interpret=True)
        monkeypatch.setattr("piflow_jax.flow.fused.mixture_rollout", interpreted)


PROGRAMS = ["xla", *(pytest.param(k, marks=pytest.mark.slow) for k in ("mosaic", "triton"))]


@pytest.mark.parametrize("program", PROGRAMS, indirect=True)
@pytest.mark.parametrize("solver", ["euler", "multistep"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_is_the_scan(shape, solver, program):
    arguments = inputs(shape)
    ends = {b: both(arguments, 16, bound=b, solver=solver) for b in (None, 5, "traced")}
    for pair in ends.values():
        assert_same(*pair)
    # The bound is one: five substeps do not end where sixteen do.
    assert np.abs(ends[5][1][0] - ends[None][1][0]).max() > 1e-3


@pytest.mark.parametrize("program", ["mosaic", "triton"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_the_scan(shape, program):
    """With a policy's coefficients, as many substeps as in sampling, and few or one of some."""
    assert_same(*both(inputs(shape), 128, bound="traced", solver="multistep"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["mosaic", "triton"], indirect=True)
def test_kernels_of_many_components_are_the_scan(program):
    """As many as a student of ImageNet has, and one."""
    for components, channels in ((32, 4), (1, 3)):
        output, x = mixture((5,), components, channels)
        starts, ends = (jnp.asarray(a, jnp.float32) for a in (STARTS, ENDS))
        policy = GMFlowPolicy.create(output, x, WARP.warp(starts))
        arguments = (policy, x, starts, ends)
        assert_same(*both(arguments, 128, bound="traced", solver="multistep"))


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["euler", "multistep"])
@pytest.mark.parametrize("sizes", [*SHAPES.values(), ((32, 32), 32, 4), ((16, 16), 8, 64)])
def test_on_a_gpu_auto_is_the_scan(sizes, solver):
    """The compiled kernel, as `jit` finds it."""
    output, x = mixture(*sizes)
    starts, ends = (jnp.asarray(a, jnp.float32) for a in (STARTS, ENDS))
    arguments = (GMFlowPolicy.create(output, x, WARP.warp(starts)), x, starts, ends)
    auto, scan = (
        jax.jit(
            lambda *a, i=implementation: rollout(
                *a, WARP, 128, bound="traced", solver=solver, implementation=i
            )[0]
        ).lower(*arguments)
        for implementation in ("auto", "scan")
    )
    assert "triton" in auto.as_text() and "triton" not in scan.as_text()
    expected = scan.compile()(*arguments)
    found = auto.compile()(*arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_auto_is_fused_where_that_is_possible(x64):
    policy, *rest = inputs("images")
    text = jax.jit(lambda *a: rollout(*a, WARP, 8)).lower(policy, *rest).as_text()
    scan = jax.jit(lambda *a: rollout(*a, WARP, 8, implementation="scan"))
    assert text != scan.lower(policy, *rest).as_text()
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (policy, *rest))
    ends = [
        jax.jit(lambda *a, i=implementation: rollout(*a, WARP, 8, implementation=i)[0])(*double)
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
    outputs = ArcOutput(jnp.zeros((4, 3, 2, 2)), *jnp.zeros((2, 4, 3, 2)))
    closed = ArcFlowPolicy.create(outputs, x, start)
    with pytest.raises(ValueError, match="not for a ArcFlowPolicy"):
        rollout(closed, x, start, end, WARP, 8, implementation="fused")


@pytest.mark.parametrize("program", ["xla", "mosaic", "triton"], indirect=True)
def test_it_is_as_accurate_as_its_inputs_allow(program, x64):
    """Narrow mixtures, down to the data: no farther from float64 than the scan is."""
    of_both = jax.jit(
        lambda *a: [rollout(*a, WARP, 128, implementation=i)[0] for i in ("scan", "fused")]
    )
    alone = jax.jit(lambda *a: rollout(*a, WARP, 128)[0])
    for logstd in (-1.0, -3.0, -5.0):
        arguments = inputs("tokens", logstd=logstd)
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        exact = alone(*double)
        scan, fused = (np.abs(end - exact).max() for end in of_both(*arguments))
        assert fused <= 2 * scan + 1e-5 * np.abs(exact).max(), (logstd, scan, fused)


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

    @jax.jit
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
    plain = jax.jit(lambda *a: jnp.sum(rollout(*a, WARP, 8)[0]))
    assert float(jax.jit(jax.grad(loss))(1.0)) == pytest.approx(
        float(plain(policy, *rest)), rel=1e-5
    )


def test_vmap_maps_what_it_is_told_to():
    policy, x, start, end = inputs("tokens")
    many = jnp.stack([x, 0.5 * x, -x])

    def run(x, end, implementation="fused"):
        return rollout(policy, x, start, end, WARP, 8, implementation=implementation)[0]

    found = jax.jit(jax.vmap(run, in_axes=(0, None)))(many, end)
    scan = jax.jit(functools.partial(run, implementation="scan"))
    for one, expected in zip(many, found, strict=True):
        np.testing.assert_allclose(scan(one, end), expected, rtol=0, atol=1e-5)
