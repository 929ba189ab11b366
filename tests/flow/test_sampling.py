"""The samplers: against the reference's recorded samples, and against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.policies import DXPolicy, GMFlowPolicy, GMOutput
from piflow_jax.flow.rollout import rollout
from piflow_jax.flow.sampling import few_step_sample, ode_sample, sde_sample
from piflow_jax.flow.schedule import TimeWarp, sampling_times
from tests import gaussian, golden_files
from tests.golden_files import sites_last

# Policies of the reference's sampler clamp their times here.
EPS = 1e-4
GOLDEN = golden_files.names("sampler_gmdit_") + golden_files.names("sampler_dxdit_")
# Compiling is most of the time of these tests: programs this small run as fast unoptimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The reference rounds in other places than we do, so our distance to it is of the size of its own
# distance to the run with a float64 network (5e-7 to 3e-6 on samples of size 4 to 8); the largest
# ratio of the two that was measured is 5.
MARGIN = 10


# --- The reference's samples --------------------------------------------------------------------


def policy_fn(params, labels):
    """`(x, sigma) -> policy` of a recorded case."""
    gm = params["policy"] == "GMFlow"
    file = params["weights"].split()[-1]
    module, variables = golden_files.network(
        "gm_dit" if gm else "dx_dit", file, params["num_timesteps"]
    )

    def create(x, sigma):
        output = module.apply(variables, x, sigma, labels)
        if gm:
            return GMFlowPolicy.create(output, x, sigma, eps=EPS)
        return DXPolicy.create(output, x, sigma, **params["policy_kwargs"], eps=EPS)

    return create


def settings(params):
    """The recorded settings as arguments of `few_step_sample`, `nfe` and `warp` first."""
    config = params["test_cfg"]
    options = {
        "total_substeps": config["total_substeps"],
        "final_step_size_scale": config.get("final_step_size_scale", 1.0),
        "temperature": config.get("temperature", 1.0),
        "h": float(config.get("sampler_kwargs", {}).get("h", 0.0)),
    }
    return (config["nfe"], TimeWarp(params["shift"])), options


def recorded(stochastic):
    """The recorded cases; those not kept in the repository only with `-m slow`."""
    cases = []
    for name in GOLDEN:
        if (settings(golden_files.load(name)[0])[1]["h"] > 0) == stochastic:
            kept = (golden_files.HERE / name).exists()
            cases.append(pytest.param(name, marks=[] if kept else [pytest.mark.slow]))
    return cases


def assert_matches_recording(x, arrays):
    expected = sites_last(arrays["latents_float32_network"])
    rounding = np.abs(arrays["latents_float32_network"] - arrays["latents_float64_network"]).max()
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected, rtol=0, atol=MARGIN * rounding)


def flow_map(nfe, warp, final_step_size_scale, h):
    """`(src, dst, to, m)` of every segment as DESIGN 3.6 states them; the levels are tested."""
    times = sampling_times(nfe, warp, final_step_size_scale)
    for src, to in zip(times.src, times.to, strict=True):
        m = 0.0 if np.isinf(h) else (to * (1 - src) / (src * (1 - to))) ** (h * h)
        yield src, to * m / (1 - to + to * m), to, m


def replay(create, noise, fresh, nfe, warp, *, total_substeps, final_step_size_scale, h):
    """The flow-map SDE sampler as DESIGN 3.6 states it, segment by segment, with given noise.

    Returns the sample and the states at which the network was asked.
    """
    times = flow_map(nfe, warp, final_step_size_scale, h)

    @jit
    def segment(x, src, dst):
        sigma = jnp.full(x.shape[:1], src, x.dtype)
        tau_dst = jnp.full(x.shape[:1], warp.unwarp(dst), x.dtype)
        policy = create(x, sigma)
        return rollout(
            policy, x, warp.unwarp(sigma), tau_dst, warp, total_substeps, bound="traced"
        )[0]

    x, visited = noise, []
    for (src, dst, to, m), new in zip(times, fresh, strict=True):
        visited.append(x)
        x = (1 - to + to * m) * segment(x, src, dst) + to * np.sqrt(1 - m * m) * new
    return x, jnp.stack(visited)


@pytest.mark.parametrize("name", recorded(stochastic=False))
def test_deterministic_samples_match_the_reference(name):
    params, a = golden_files.load(name)
    positional, options = settings(params)
    create = policy_fn(params, jnp.asarray(a["class_labels"]))
    sample = jit(lambda noise: few_step_sample(create, noise, *positional, **options))
    assert_matches_recording(sample(sites_last(a["noise"])), a)


@pytest.mark.parametrize("name", recorded(stochastic=True))
def test_stochastic_samples_match_the_reference(name):
    params, a = golden_files.load(name)
    positional, options = settings(params)
    assert options.pop("temperature") == 1
    create = policy_fn(params, jnp.asarray(a["class_labels"]))
    noise, fresh = sites_last(a["noise"]), sites_last(a["sde_noise"], 2)
    x, visited = replay(create, noise, fresh, *positional, **options)
    assert_matches_recording(x, a)
    expected = sites_last(a["x_t_src_float32_network"], 2)
    rounding = np.abs(a["x_t_src_float32_network"] - a["x_t_src_float64_network"]).max()
    np.testing.assert_allclose(visited, expected, rtol=0, atol=MARGIN * rounding)


# --- A network known in closed form -------------------------------------------------------------

MEAN, STD = 0.7, 0.4


def exact_policy(x, sigma):
    """What a perfect network says of data `N(MEAN, STD^2)`: the exact posterior of x_0."""
    t, alpha, v = sigma[:, None], 1 - sigma[:, None], STD**2
    precision = jnp.square(alpha) * v + jnp.square(t)
    mean = (alpha * v * x + jnp.square(t) * MEAN) / precision
    std = jnp.sqrt(v / precision)  # of the velocity: sqrt(v t^2 / precision) / t
    output = GMOutput(((x - mean) / t)[:, None], jnp.zeros_like(t), jnp.log(std[:, 0]))
    return GMFlowPolicy.create(output, x, sigma, eps=1e-9)


def mixed_policy(x, sigma):
    """Two components whose means, weights and widths depend smoothly on what the network sees."""
    t = sigma[:, None]
    means = jnp.stack([jnp.tanh(x + t), 0.5 * x - jnp.cos(3 * t)], axis=1)
    logweights = jnp.stack([jnp.sin(x).sum(-1), jnp.cos(2 * x).sum(-1)], axis=1)
    return GMFlowPolicy.create(GMOutput(means, logweights, -1 - sigma), x, sigma, eps=EPS)


def small_noise(batch=4, channels=3, seed=0):
    # NumPy's, for float64 tests: JAX's draws differ between precisions.
    return np.random.default_rng(seed).standard_normal((batch, channels))


def test_a_perfect_student_gives_the_same_sample_at_any_nfe(x64):
    noise = small_noise(channels=1)
    # Segments of 1/4, 2/4, 1 of raw time share their substeps.
    samples = [few_step_sample(exact_policy, noise, nfe, TimeWarp(3.2)) for nfe in (1, 2, 4)]
    for sample in samples[1:]:
        np.testing.assert_allclose(sample, samples[0], rtol=0, atol=1e-9)
    # The flow of a Gaussian carries quantiles to quantiles; what is left is the Euler error.
    errors = [
        np.abs(
            few_step_sample(exact_policy, noise, 2, TimeWarp(), total_substeps=n)
            - (MEAN + STD * noise)
        ).max()
        for n in (64, 128, 256)
    ]
    assert errors[-1] < 0.01
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.1)


@pytest.mark.parametrize("h", [0.5, np.inf])
def test_noise_between_segments_keeps_the_distribution(h):
    count = 20000
    noise = jax.random.normal(jax.random.key(0), (count, 1))
    sample = jit(
        lambda noise, key: few_step_sample(exact_policy, noise, 3, TimeWarp(), h=h, key=key)
    )
    x = np.asarray(sample(noise, jax.random.key(1)))
    # Three standard errors, and the Euler error of the rollouts (0.01, see above).
    assert abs(x.mean() - MEAN) < 3 * STD / np.sqrt(count) + 0.01
    assert abs(x.std() - STD) < 3 * STD / np.sqrt(2 * count) + 0.01
    # How much of the first noise is left: at `dst` the state is `N((1 - dst) MEAN, spread^2)`.
    kept = 1.0
    for _, dst, to, m in flow_map(3, TimeWarp(), 1.0, h):
        signal = (1 - to + to * m) * np.hypot((1 - dst) * STD, dst)
        kept *= signal / np.hypot(signal, to * np.sqrt(1 - m * m))
    assert 0.1 < kept < 0.9
    assert abs(np.corrcoef(noise[:, 0], x[:, 0])[0, 1] - kept) < 3 / np.sqrt(count)


@pytest.mark.parametrize("h", [0.7, np.inf])
def test_own_noise_follows_the_formula(x64, h):
    noise, key = small_noise(), jax.random.key(3)
    options = {"total_substeps": 16, "final_step_size_scale": 0.5, "h": h}
    fresh = [jax.random.normal(jax.random.fold_in(key, i), noise.shape) for i in range(3)]
    expected, _ = replay(mixed_policy, noise, fresh, 3, TimeWarp(2.0), **options)
    actual = few_step_sample(mixed_policy, noise, 3, TimeWarp(2.0), **options, key=key)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_keys_decide_the_noise_and_nothing_else():
    noise = small_noise().astype(np.float32)
    options = {"nfe": 3, "warp": TimeWarp(), "total_substeps": 8}

    def sample(h):
        return jit(lambda key: few_step_sample(mixed_policy, noise, **options, h=h, key=key))

    keys = jax.random.split(jax.random.key(0), 3)
    noisy, still = sample(1.0), sample(0.0)
    np.testing.assert_array_equal(noisy(keys[0]), noisy(keys[0]))
    assert np.abs(noisy(keys[0]) - noisy(keys[1])).max() > 0.1
    np.testing.assert_array_equal(still(keys[0]), still(keys[1]))
    np.testing.assert_array_equal(still(keys[0]), still(None))
    with pytest.raises(ValueError, match="needs key"):
        noisy(None)
    # One program for a batch of keys.
    many = jax.vmap(noisy)(keys)
    np.testing.assert_allclose(many, jnp.stack([noisy(key) for key in keys]), rtol=0, atol=1e-5)


def test_temperature_sharpens_all_but_the_last_evaluation():
    noise = small_noise().astype(np.float32)

    def sample(nfe, temperature):
        return few_step_sample(
            mixed_policy, noise, nfe, TimeWarp(), total_substeps=8, temperature=temperature
        )

    np.testing.assert_array_equal(sample(1, 0.3), sample(1, 1.0))
    assert np.abs(sample(2, 0.3) - sample(2, 1.0)).max() > 0.01

    def grid_policy(x, sigma):
        return DXPolicy.create(x[:, None], x, sigma)

    with pytest.raises(ValueError, match="DXPolicy has no temperature"):
        few_step_sample(grid_policy, noise, 2, TimeWarp(), temperature=0.5)


def test_the_network_is_traced_once_and_asked_at_the_segments_starts():
    traces, asked = [], []

    def create(x, sigma):
        traces.append(x.shape)
        jax.debug.callback(lambda s: asked.append(float(s[0])), sigma)
        return mixed_policy(x, sigma)

    sample = jit(
        lambda noise: few_step_sample(
            create, noise, 4, TimeWarp(3.2), total_substeps=8, final_step_size_scale=0.5
        )
    )
    for seed in range(2):
        x = sample(small_noise(seed=seed).astype(np.float32))
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(traces) == 1
    starts = sampling_times(4, TimeWarp(3.2), 0.5).src
    np.testing.assert_allclose(np.sort(asked)[::-1], np.repeat(starts, 2), rtol=1e-6)


def test_gradient_with_respect_to_noise_matches_finite_differences(x64):
    noise, direction = small_noise(2), small_noise(2, seed=1)

    def loss(noise):
        x = few_step_sample(
            mixed_policy,
            noise,
            3,
            TimeWarp(3.2),
            total_substeps=8,
            h=0.5,
            temperature=0.5,
            key=jax.random.key(0),
        )
        return jnp.sum(jnp.sin(x))

    gradient = jit(jax.grad(loss))(noise)
    assert np.all(np.isfinite(gradient))
    loss, step = jit(loss), 1e-6
    numeric = (loss(noise + step * direction) - loss(noise - step * direction)) / (2 * step)
    # Central differences: truncation step^2 and rounding 1e-16 / step.
    np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-7)


def test_sampler_refuses_impossible_arguments():
    with pytest.raises(ValueError, match="nfe must be at least 1"):
        few_step_sample(mixed_policy, jnp.ones((1, 2)), 0, TimeWarp())
    with pytest.raises(ValueError, match="h must be at least 0"):
        few_step_sample(mixed_policy, jnp.ones((1, 2)), 2, TimeWarp(), h=-1.0)


# --- The teacher's ODE --------------------------------------------------------------------------


def linear_field(x, sigma):
    """`dx/dt = 2 cos(3 t) x`, so `x(0) = x(1) exp(-2 sin(3) / 3)`."""
    return 2 * jnp.cos(3 * sigma)[:, None] * x


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_solvers_converge_at_their_order(x64, solver, order, shift):
    noise = small_noise()
    exact = noise * np.exp(-2 * np.sin(3) / 3)
    errors = [
        np.abs(ode_sample(linear_field, noise, steps, TimeWarp(shift), solver) - exact).max()
        for steps in (128, 256, 512)
    ]
    assert errors[-1] < (0.01 if order == 1 else 1e-4)
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.1)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("heun", 2), ("multistep", 1)])
def test_the_teacher_is_traced_as_often_as_a_step_asks_it(solver, evaluations):
    for steps in (1, 7):
        traces = []

        def velocity(x, sigma, traces=traces):
            traces.append(sigma.shape)
            return linear_field(x, sigma)

        noise = jnp.ones((5, 2), jnp.bfloat16)
        x = jit(lambda z, v=velocity, n=steps: ode_sample(v, z, n, TimeWarp(), solver))(noise)
        assert traces == [(5,)] * evaluations
        assert x.dtype == jnp.float32


def test_steps_are_uniform_in_raw_time(x64):
    x, middle = small_noise(), 3.2 * 0.5 / (1 + 2.2 * 0.5)
    actual = ode_sample(linear_field, x, 2, TimeWarp(3.2))
    for start, end in ((1.0, middle), (middle, 0.0)):
        x = x + (end - start) * linear_field(x, np.full(len(x), start))
    np.testing.assert_allclose(actual, x, rtol=1e-12)


def test_ode_sampler_refuses_impossible_arguments():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ode_sample(linear_field, jnp.ones((1, 2)), 0, TimeWarp())
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        ode_sample(linear_field, jnp.ones((1, 2)), 2, TimeWarp(), "rk4")


SOLVERS = [("euler", 1), ("heun", 2), ("multistep", 2)]


@pytest.mark.parametrize(("solver", "order"), SOLVERS)
def test_solvers_carry_noise_to_gaussian_data(x64, solver, order):
    """The flow of a Gaussian carries quantiles to quantiles: `x_0 = MEAN + SCALE noise`."""
    noise, exact = small_noise(), gaussian.MEAN + gaussian.SCALE * small_noise()
    sample = functools.partial(ode_sample, gaussian.velocity, noise, warp=TimeWarp(2.0))
    errors = [np.abs(sample(steps=n, solver=solver) - exact).max() for n in (64, 128, 256)]
    assert errors[-1] < (0.01 if order == 1 else 2e-4)
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.15)


# --- The teacher's SDE ----------------------------------------------------------------------------


def released_steps(steps, h, terminal=0.04, shift=1.0):
    """The release's levels and its formula: factors of state, velocity and noise of each step."""
    raw = np.linspace(1, 0, steps, endpoint=False)
    levels = shift * raw / (1 + (shift - 1) * raw)
    levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    for begin, end in zip(levels, [*levels[1:], 0], strict=True):
        dt, square = end - begin, h(begin) ** 2
        drift = dt if begin == 1 else dt * square / (1 - begin)
        yield begin, 1 + drift, (1 + square) * dt, np.sqrt(-2 * drift * begin) if end else 0.0


def root(level):
    return np.sqrt(1 - level)


@pytest.mark.parametrize(
    ("h", "given"), [(root, None), (root, root), (lambda level: 0.5, 0.5)], ids=["", "f", "number"]
)
def test_the_sde_takes_the_steps_of_the_release(x64, h, given):
    noise, key = small_noise(), jax.random.key(4)
    x = noise
    for index, (level, kept, step, spread) in enumerate(released_steps(9, h, shift=2.0)):
        fresh = np.asarray(jax.random.normal(jax.random.fold_in(key, index), x.shape))
        u = np.asarray(gaussian.velocity(jnp.asarray(x), jnp.full(len(x), level)))
        x = kept * x + step * u + spread * fresh
    actual = sde_sample(gaussian.velocity, noise, 9, TimeWarp(2.0), key, h=given)
    np.testing.assert_allclose(actual, x, rtol=1e-10, atol=1e-12)


def moments(steps):
    """Mean and standard deviation after the release's steps in Gaussian data, in closed form."""
    mean, var = 0.0, 1.0
    for level, kept, step, spread in released_steps(steps, root, terminal=0.4 / steps):
        ours = np.ones(1) * level
        slope = (level - (1 - level) * gaussian.SCALE**2) / gaussian.variance(ours)[0]
        shift = -slope * (1 - level) * gaussian.MEAN - gaussian.MEAN
        factor = kept + step * slope
        mean, var = factor * mean + step * shift, factor**2 * var + spread**2
    return np.array([mean, np.sqrt(var)])


def test_the_sde_samples_gaussian_data_to_first_order():
    """What many samples have is what the closed form has, which converges to the data."""
    count, steps = 20000, 16
    noise = jax.random.normal(jax.random.key(0), (count, 1))
    sample = jit(
        lambda z, k: sde_sample(
            gaussian.velocity, z, steps, TimeWarp(), k, terminal_sigma=0.4 / steps
        )
    )
    x = np.asarray(sample(noise, jax.random.key(1)))
    expected = moments(steps)
    assert abs(x.mean() - expected[0]) < 3 * expected[1] / np.sqrt(count)
    assert abs(x.std() - expected[1]) < 3 * expected[1] / np.sqrt(2 * count)
    assert abs(np.corrcoef(noise[:, 0], x[:, 0])[0, 1]) < 0.5  # most of the first noise is gone
    data = np.array([gaussian.MEAN, gaussian.SCALE])
    errors = np.array([np.abs(moments(n) - data).max() for n in (128, 256, 512)])
    assert errors[-1] < 0.005
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), 1, atol=0.15)


def test_the_sde_without_noise_is_the_ode(x64):
    noise = small_noise()
    still = sde_sample(linear_field, noise, 1, TimeWarp(), jax.random.key(0), h=0.0)
    np.testing.assert_allclose(still, ode_sample(linear_field, noise, 1, TimeWarp()), rtol=1e-12)
    keys = [jax.random.key(seed) for seed in (0, 1)]
    samples = [sde_sample(linear_field, noise, 5, TimeWarp(), key, h=0) for key in keys]
    np.testing.assert_array_equal(*samples)


def test_the_sde_refuses_impossible_arguments():
    sample = functools.partial(
        sde_sample, linear_field, jnp.ones((1, 2)), warp=TimeWarp(), key=jax.random.key(0)
    )
    for options, words in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2, "h": -1.0}, "h must be finite and at least 0"),
        ({"steps": 2, "h": lambda level: level - 1}, "h must be finite and at least 0"),
        ({"steps": 2, "terminal_sigma": 0.0}, r"terminal_sigma must be in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(**options)
