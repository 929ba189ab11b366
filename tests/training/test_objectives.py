"""The losses: against the reference's recorded training steps, and against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.config import PolicyConfig, TeacherConfig, TrainConfig
from piflow_jax.convert import to_torch_state
from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.flow.policies import GMFlowPolicy, GMOutput
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.systems.assembly import guided
from piflow_jax.systems.policies import policy_factory
from piflow_jax.training.objectives import (
    Draws,
    data_dependent_loss,
    data_free_loss_and_grads,
    flow_matching_loss,
    sample_draws,
    teacher_ratio,
)
from tests import golden_files
from tests.golden_files import sites_last
from tests.steps import call

# Compiling is most of the time of these tests: programs this small run as fast unoptimised.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# --- The reference's training steps -------------------------------------------------------------


class RecordedStep:
    """One recorded training step: networks, configs and random draws in their order."""

    def __init__(self, name):
        params, self.arrays = golden_files.load(name)
        self.time_scale = params["num_timesteps"]
        self.iteration = params.get("iteration", 0)
        self.recorded_ratio = params.get("teacher_ratio", 0.0)
        self.student, self.variables = golden_files.network(
            "gm_dit", "gmdit_student.npz", self.time_scale
        )
        teacher, teacher_variables = golden_files.network("dit", "dit_teacher.npz", self.time_scale)
        train, guidance = params["train_cfg"], params["teacher_test_cfg"]
        self.config = TrainConfig(
            nfe=train["nfe"],
            final_step_size_scale=train.get("final_step_size_scale", 1.0),
            shift=params["shift"],
            total_substeps=train["total_substeps"],
            num_states=train["num_intermediate_states"],
            window_substeps=train.get("window_substeps", 0),
            gm_dropout=train["gm_dropout"],
            mixing_steps=train.get("num_decay_iters", 0),
            loss_scale=3.0,
        )
        interval = guidance.get("guidance_interval", (0, self.time_scale))
        teacher_config = TeacherConfig(
            guidance_scale=guidance["guidance_scale"],
            guidance_interval=tuple(t / self.time_scale for t in interval),
            orthogonal_guidance=float(guidance.get("orthogonal_guidance", 0.0)),
        )
        self.labels = jnp.asarray(self.arrays["class_labels"])
        (null_label,) = set(self.arrays["negative_labels"].tolist())
        self.guided = guided(teacher, teacher_config, null_label).bind(
            teacher_variables, self.labels
        )
        self.factory = policy_factory(PolicyConfig(), self.config)

    def random(self, index):
        """The draw of that index, in our layout."""
        names = [n for n in self.arrays if n.startswith(f"random_{index}_")]
        value = self.arrays[names[0]]
        if names[0].endswith("randn_like"):
            return sites_last(value)
        return value.reshape(value.shape[:2])

    def draws(self, first):
        """Dropout, student's and teacher's uniforms, recorded in this order."""
        dropout, student, teacher = (self.random(first + i) for i in range(3))
        return Draws(student, teacher, dropout)

    def check_gradients(self, grads):
        """Every gradient, by its official name.

        The float32 reference and our float64 agree in norm to 2e-6 with time scale 1; with 1000
        to 4e-5, one rounding of a frequency being worth 6e-5 in the sinusoids at 1000 radians.
        Single parameters are off by up to 9e-5 of their largest entry (logstd: ill-conditioned
        below t = 1e-3). Keys' biases have a zero gradient, because a softmax does not see them:
        their recorded ones are rounding, 4e-9 of the largest gradient.
        """
        recorded = {n[8:]: a for n, a in self.arrays.items() if n.startswith("grad_sd/")}
        grads = to_torch_state(self.student, grads)
        assert grads.keys() == recorded.keys()
        largest = max(np.abs(array).max() for array in recorded.values())
        for name, array in recorded.items():
            atol = 3e-4 * np.abs(array).max() + 1e-7 * largest
            np.testing.assert_allclose(grads[name], array, rtol=0, atol=atol, err_msg=name)

        def norm(tree):
            return np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in tree))

        difference = norm(grads[name] - recorded[name] for name in recorded)
        tolerance = 1e-5 if self.time_scale == 1 else 2e-4
        assert difference < tolerance * norm(recorded.values())

    @property
    def loss_rtol(self):
        # Measured: 5e-7 with time scale 1, 2e-6 with 1000.
        return 3e-6 if self.time_scale == 1 else 2e-5


def recorded_steps():
    """The steps with data; those not kept in the repository only with `-m slow`."""
    names = [n for n in golden_files.names("train_gmdit_") if "datafree" not in n]
    kept = {n: (golden_files.HERE / n).exists() for n in names}
    return [pytest.param(n, marks=[] if kept[n] else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("name", recorded_steps())
def test_data_dependent_step_matches_the_reference(name):
    step = RecordedStep(name)
    ratio = teacher_ratio(step.iteration, step.config.mixing_steps)
    np.testing.assert_allclose(ratio, step.recorded_ratio, rtol=1e-6)

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_fn(variables, x0, tau, noise, draws):
        return data_dependent_loss(
            call(functools.partial(step.student.apply, variables)),
            (),
            step.guided,
            step.factory,
            x0,
            step.labels,
            tau,
            noise,
            draws,
            ratio,
            step.config,
        )

    # The reference turns its uniform around: the raw time is one minus it.
    x0, tau = sites_last(step.arrays["x_0"]), 1 - step.random(0).reshape(-1)
    (loss, _), grads = loss_fn(step.variables, x0, tau, step.random(1), step.draws(2))
    np.testing.assert_allclose(loss, step.arrays["loss"], rtol=step.loss_rtol)
    step.check_gradients(grads)


def test_data_free_step_matches_the_reference():
    step = RecordedStep("train_gmdit_datafree_4step.npz")
    nfe = step.config.nfe
    draws = jax.tree.map(lambda *d: np.stack(d), *(step.draws(1 + 3 * i) for i in range(nfe)))

    @jit
    def loss_and_grads(variables, noise, draws):
        return data_free_loss_and_grads(
            lambda variables, *inputs: call(functools.partial(step.student.apply, variables))(
                *inputs
            ),
            variables,
            (),
            step.guided,
            step.factory,
            step.labels,
            noise,
            draws,
            0,
            step.config,
        )

    loss, losses, grads, _ = loss_and_grads(step.variables, step.random(0), draws)
    recorded = [step.arrays[f"loss_step{i}"] for i in range(nfe)]
    np.testing.assert_allclose(losses, recorded, rtol=step.loss_rtol)
    np.testing.assert_allclose(loss, step.arrays["loss_total"], rtol=step.loss_rtol)
    step.check_gradients(grads)


# --- Parts of a pi-ID step ----------------------------------------------------------------------


class Plain:
    """A function as a network without parameters."""

    def __init__(self, function):
        self.apply = lambda params, *inputs: function(*inputs)


def linear_network(x, sigma, labels):
    """A velocity that depends on everything it is given."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return 0.5 * x + jnp.reshape(jnp.sin(labels) + sigma, shape)


@pytest.mark.parametrize("orthogonal", [0.0, 0.5])
def test_guided_teacher_combines_both_halves_of_one_call(orthogonal):
    calls = []

    def teacher(x, sigma, labels):
        calls.append(x.shape)
        return linear_network(x, sigma, labels) * jnp.reshape(1 + labels, (-1, 1, 1))

    config = TeacherConfig(
        guidance_scale=2.5, guidance_interval=(0.2, 0.6), orthogonal_guidance=orthogonal
    )
    x = jax.random.normal(jax.random.key(0), (4, 3, 2))
    # Below the interval, on both of its ends, above it.
    sigma, labels = jnp.asarray([0.1, 0.2, 0.6, 0.61]), jnp.asarray([1, 2, 3, 4])
    found = guided(Plain(teacher), config, 9).velocity((), x, sigma, labels)
    assert calls == [(8, 3, 2)]
    cond = teacher(x, sigma, labels)
    uncond = teacher(x, sigma, jnp.full((4,), 9))
    expected = guided_velocity(cond, uncond, 2.5, sigma, (0.2, 0.6), orthogonal, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[jnp.asarray([0, 3])], cond[jnp.asarray([0, 3])])
    if not orthogonal:
        inside = slice(1, 3)
        by_hand = cond[inside] + 1.5 * (cond[inside] - uncond[inside])
        np.testing.assert_allclose(found[inside], by_hand, rtol=1e-5, atol=1e-5)


def test_unguided_teacher_is_asked_without_the_null_label():
    asked = []

    def teacher(x, sigma, labels):
        asked.append(labels)
        return linear_network(x, sigma, labels)

    x, sigma, labels = jnp.ones((2, 3)), jnp.asarray([0.3, 0.9]), jnp.asarray([1, 2])
    unguided = guided(Plain(teacher), TeacherConfig(guidance_scale=1.0), 9)
    velocity = unguided.velocity((), x, sigma, labels)
    np.testing.assert_array_equal(velocity, linear_network(x, sigma, labels))
    assert len(asked) == 1 and asked[0] is labels


def test_a_student_that_equals_the_teacher_has_no_loss():
    # One sharp component at the velocity that leads to a fixed x_0; a teacher that leads there too.
    point = jnp.asarray([0.3, -0.7])
    config = TrainConfig(nfe=2, gm_dropout=0.0, total_substeps=8, window_substeps=2, num_states=2)

    def teacher(x, sigma):
        return (x - point[None]) / jnp.maximum(sigma, 1e-6)[:, None]

    def student(x, sigma, labels):
        del labels
        means = teacher(x, sigma)[:, None]
        return GMOutput(means, jnp.zeros((len(x), 1)), jnp.full((len(x),), -30.0))

    keys = jax.random.split(jax.random.key(0), 4)
    x0, noise = (jax.random.normal(key, (16, 2)) for key in keys[:2])
    tau = 1 - jax.random.uniform(keys[2], (16,))

    @jit
    def loss(shift):
        return data_dependent_loss(
            call(student),
            (),
            lambda x, sigma: teacher(x, sigma) + shift,
            policy_factory(PolicyConfig(), config),
            x0,
            jnp.zeros((16,), jnp.int32),
            tau,
            noise,
            sample_draws(keys[3], 16, 2, 1),
            0,
            config,
        )

    assert loss(0.0)[0] < 1e-8
    # Everywhere off by 0.1: scale times half of the square.
    np.testing.assert_allclose(loss(0.1)[0], 3 * 0.5 * 0.1**2, rtol=1e-3)


def test_each_example_has_a_segment_of_its_own_number_of_evaluations():
    """The loss of a batch with several numbers is the mean of the losses with one number each."""
    keys = jax.random.split(jax.random.key(0), 4)
    x0, noise = (jax.random.normal(key, (12, 2)) for key in keys[:2])
    tau = 1 - jax.random.uniform(keys[2], (12,))
    draws = sample_draws(keys[3], 12, 2, 1, choices=3)
    np.testing.assert_array_equal(np.bincount(draws.evaluations), [4, 4, 4])

    def student(x, sigma, labels):
        return GMOutput(jnp.sin(3 * x)[:, None], jnp.zeros((len(x), 1)), -sigma)

    def loss(rows, **evaluations):
        config = TrainConfig(gm_dropout=0.0, total_substeps=8, num_states=2, **evaluations)
        part = jax.tree.map(lambda a: a[rows], draws)
        if not config.nfe_choices:
            part = part.replace(evaluations=None)
        return data_dependent_loss(
            call(student),
            (),
            lambda x, sigma: jnp.cos(x) * sigma[:, None],
            policy_factory(PolicyConfig(), config),
            x0[rows],
            jnp.zeros((len(rows),), jnp.int32),
            tau[rows],
            noise[rows],
            part,
            0,
            config,
        )[0]

    several = loss(np.arange(12), nfe_choices=(1, 2, 4))
    each = [
        loss(np.flatnonzero(draws.evaluations == index), nfe=nfe)
        for index, nfe in enumerate((1, 2, 4))
    ]
    assert np.std(each) > 0.01 * np.mean(each)
    np.testing.assert_allclose(several, np.mean(each), rtol=1e-5)


def test_states_are_drawn_by_the_density_of_the_settings():
    """At two evaluations: raw times of uniforms u are roots between the ends' powers."""
    x0 = jax.random.normal(jax.random.key(0), (12, 2))
    noise, tau = jax.random.normal(jax.random.key(1), (12, 2)), jnp.linspace(0.1, 1, 12)
    draws = sample_draws(jax.random.key(2), 12, 2, 8)
    start = np.where(np.asarray(tau) > 0.5, 1.0, 0.5)[:, None]
    low, high = (start - 0.5) ** 2, start**2
    moved = (start - np.sqrt(high - np.asarray(draws.student) * (high - low))) / 0.5

    def student(x, sigma, labels):
        return GMOutput(jnp.stack([x, -x], -2), jnp.zeros((len(x), 2)), jnp.zeros(len(x)))

    def loss(draws, power):
        config = TrainConfig(gm_dropout=0.0, total_substeps=8, nfe=2, state_power=power)
        return data_dependent_loss(
            call(student),
            (),
            lambda x, sigma: jnp.cos(x) * sigma[:, None],
            policy_factory(PolicyConfig(), config),
            x0,
            None,
            tau,
            noise,
            draws,
            0,
            config,
        )[0]

    plain, found = loss(draws, 0.0), loss(draws, 1.0)
    np.testing.assert_allclose(found, loss(draws.replace(student=moved), 0.0), rtol=1e-5)
    assert abs(found / plain - 1) > 0.01


def test_teacher_ratio_decays_linearly_to_zero():
    steps = jnp.asarray([0, 1, 500, 1999, 2000, 50000])
    expected = [1, 1999 / 2000, 0.75, 1 / 2000, 0, 0]
    np.testing.assert_allclose(teacher_ratio(steps, 2000), expected, rtol=1e-4, atol=1e-7)
    # A Python zero lets the loss leave the teacher's part out.
    assert isinstance(teacher_ratio(steps, 0), int) and teacher_ratio(steps, 0) == 0


def test_draws_have_their_shapes_and_are_independent():
    draws = sample_draws(jax.random.key(0), 500, 3, 4)
    assert draws.student.shape == (500, 3)
    assert draws.teacher.shape == (500, 2)
    assert draws.dropout.shape == (500, 4)
    columns = np.concatenate([draws.student, draws.teacher, draws.dropout], axis=1)
    assert columns.min() >= 0 and columns.max() < 1
    correlation = np.corrcoef(columns.T) - np.eye(9)
    assert np.abs(correlation).max() < 4 / np.sqrt(500)
    # Nor are they the same stream of numbers in other shapes.
    flat = [np.ravel(value)[:1000] for value in (draws.student, draws.teacher, draws.dropout)]
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 4 / np.sqrt(1000)


def test_mixture_policies_clamp_as_the_reference_does():
    output = GMOutput(jnp.zeros((1, 3, 2)), jnp.zeros((1, 3)), jnp.zeros((1,)))
    inputs = (output, jnp.ones((1, 2)), jnp.ones((1,)))
    training = policy_factory(PolicyConfig(), TrainConfig())(*inputs)
    sampling = policy_factory(PolicyConfig(), TrainConfig(), sampling=True)(*inputs)
    assert isinstance(training, GMFlowPolicy)
    assert (training.eps, sampling.eps) == (1e-6, 1e-4)


@pytest.mark.parametrize(
    ("nfe", "final", "given", "expected"),
    [
        (1, 1.0, 0.0, 1.0),
        (4, 0.5, 0.0, 2 / 7),  # the first segments, not the shorter last one
        (2, 3.0, 0.0, 3 / 4),  # the last segment is the longest
        (4, 0.5, 0.9, 0.9),
    ],
)
@pytest.mark.parametrize("sampling", [False, True])
def test_grid_policies_cover_the_longest_segment(nfe, final, given, expected, sampling):
    policy = PolicyConfig(kind="dx", mode="polynomial", segment_size=given)
    train = TrainConfig(nfe=nfe, final_step_size_scale=final, shift=3.2)
    sigma = jnp.ones((1,))
    made = policy_factory(policy, train, sampling=sampling)(
        jnp.zeros((1, 5, 2)), jnp.ones((1, 2)), sigma
    )
    np.testing.assert_allclose(made.tau_src - made.tau_dst, expected, rtol=1e-6)
    assert (made.mode, made.shift, made.eps) == ("polynomial", 3.2, 1e-4)


# --- Flow matching ------------------------------------------------------------------------------


def test_flow_matching_loss_is_the_formula():
    batch, shift, seen = 6, 3.2, {}

    def spy(x, sigma, labels):
        seen.update(x=x, sigma=sigma, labels=labels)
        return linear_network(x, sigma, labels)

    x0 = jax.random.normal(jax.random.key(0), (batch, 4, 3))
    labels = jnp.arange(batch)
    loss, _ = flow_matching_loss(
        call(spy), (), jax.random.key(1), x0, labels, 9, 0.0, TimeWarp(shift)
    )
    x, sigma, x0 = (np.asarray(v, np.float64) for v in (seen["x"], seen["sigma"], x0))
    # One time in each of as many strata of raw time as there are samples.
    tau = sigma / (shift + (1 - shift) * sigma)
    np.testing.assert_array_equal(np.floor(tau * batch), np.arange(batch))
    # The noise, recovered from the state; it is standard normal as far as 72 numbers can say.
    t = sigma[:, None, None]
    noise = (x - (1 - t) * x0) / t
    assert abs(noise.mean()) < 0.5 and abs(noise.std() - 1) < 0.35
    velocity = 0.5 * x + (np.sin(np.arange(batch)) + sigma)[:, None, None]
    np.testing.assert_allclose(loss, np.mean((velocity - (noise - x0)) ** 2), rtol=1e-4)
    np.testing.assert_array_equal(seen["labels"], labels)


def test_optimal_velocity_of_gaussian_data_has_the_irreducible_loss():
    # x_0 ~ N(0, s^2): E[u | x_t] = x_t (t - (1 - t) s^2) / var and Var[u | x_t] = s^2 / var with
    # var = (1 - t)^2 s^2 + t^2, whose integral over t in [0, 1] is s pi / 2.
    s, batch = 0.5, 20000

    def velocity(x, sigma, labels, off=0.0):
        del labels
        t = sigma[:, None]
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) + off

    x0 = s * jax.random.normal(jax.random.key(0), (batch, 4))
    labels = jnp.zeros((batch,), jnp.int32)

    @jit
    def loss(key, off):
        network = functools.partial(velocity, off=off)
        return flow_matching_loss(call(network), (), key, x0, labels, 9, 0.1, TimeWarp())[0]

    # The square of a normal residual of variance V has variance 2 V^2, and V <= 1 + s^2: the
    # standard error is below sqrt(2 * 1.25^2 / 80000) = 0.0063.
    np.testing.assert_allclose(loss(jax.random.key(1), 0.0), s * np.pi / 2, atol=0.02)
    shifted = loss(jax.random.key(1), 0.3)
    np.testing.assert_allclose(shifted - loss(jax.random.key(1), 0.0), 0.3**2, atol=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_their_rate(rate):
    seen = []

    def spy(x, sigma, labels):
        seen.append((labels, sigma))
        return x

    count = 4000
    x0, labels = jnp.zeros((count, 1)), jnp.arange(count) % 9
    flow_matching_loss(call(spy), (), jax.random.key(0), x0, labels, 9, rate, TimeWarp())
    ((given, sigma),) = seen
    dropped = np.asarray(given == 9)
    np.testing.assert_array_equal(given[~dropped], labels[~dropped])
    error = np.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.mean() - rate) <= 4 * error
    if 0 < rate < 1:  # independent of the time
        assert abs(np.corrcoef(dropped, sigma)[0, 1]) < 4 / np.sqrt(count)
