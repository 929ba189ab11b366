"""Teachers of other makings, against closed forms of Gaussian data in their own coordinates."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.flow.teacher import Schedule, Teacher

MEAN, VARIANCE = np.array([0.7, -1.3]), 0.4
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

# `(a, b, da/ds, db/ds)` of times as the network is given them, written down once more.
COORDINATES = {
    "straight": (
        Schedule.straight(time_scale=1000.0),
        lambda s: (1 - s / 1000, s / 1000, -np.ones_like(s), np.ones_like(s)),
    ),
    "reversed": (
        Schedule.straight(data_at=1),
        lambda s: (s, 1 - s, np.ones_like(s), -np.ones_like(s)),
    ),
    "cosine": (
        Schedule.cosine(time_scale=7.0),
        lambda s: (
            np.cos(np.pi * s / 14),
            np.sin(np.pi * s / 14),
            -np.pi / 2 * np.sin(np.pi * s / 14),
            np.pi / 2 * np.cos(np.pi * s / 14),
        ),
    ),
    "exploding": (
        Schedule.variance_exploding(),
        lambda s: (np.ones_like(s), s, np.zeros_like(s), np.ones_like(s)),
    ),
    "exploding in thousandths": (
        Schedule.variance_exploding(time_scale=1000.0),
        lambda s: (np.ones_like(s), s / 1000, np.zeros_like(s), np.ones_like(s)),
    ),
}


def posterior(z, a, b):
    """`E[x_0 | z]` and `E[eps | z]` of `z = a x_0 + b eps`, `x_0 ~ N(MEAN, VARIANCE)`."""
    a, b = (np.asarray(value)[:, None] for value in (a, b))
    off = (z - a * MEAN) / (a * a * VARIANCE + b * b)
    return MEAN + a * VARIANCE * off, b * off


def exact_velocity(x, t):
    x0, eps = posterior(x, 1 - t, t)
    return eps - x0


def states():
    t = np.array([0.02, 0.3, 0.5, 0.77, 0.98])
    return np.random.default_rng(0).normal(size=(5, 2)), t


def predictor(kind, coordinates):
    def predict(params, z, s, cond):
        z, s = np.asarray(z), np.asarray(s)  # teachers are called eagerly here
        a, b, a_rate, b_rate = coordinates(s)
        x0, eps = posterior(z, a, b)
        a, b, a_rate, b_rate = (value[:, None] for value in (a, b, a_rate, b_rate))
        values = {
            "u": a_rate * x0 + b_rate * eps,
            "eps": eps,
            "x0": x0,
            "v": a * eps - b * x0,
        }
        return jnp.asarray(values[kind], z.dtype)

    return predict


@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("kind", ["u", "eps", "x0", "v"])
def test_predictions_of_every_kind_are_the_exact_velocity(x64, name, kind):
    schedule, coordinates = COORDINATES[name]
    predict = predictor(kind, coordinates)
    teacher = Teacher(predict=predict, shape=(2,), prediction=kind, schedule=schedule)
    x, t = states()
    found = teacher.velocity(None, jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(found, exact_velocity(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_table_of_ddpm_is_the_exact_velocity_at_its_own_levels(x64, kind):
    a = np.sqrt(ALPHAS[[0, 10, 300, 700, 999]])
    b = np.sqrt(1 - a**2)
    t = b / (a + b)
    asked = []

    def coordinates(s):
        asked.append(s)
        a = np.sqrt(ALPHAS[np.rint(s).astype(int)])
        return a, np.sqrt(1 - a**2), a, a  # the rates are of no use to these kinds

    teacher = Teacher(
        predict=predictor(kind, coordinates),
        shape=(2,),
        prediction=kind,
        schedule=Schedule.discrete(ALPHAS),
    )
    x, _ = states()
    found = teacher.velocity(None, jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(asked[0], [0, 10, 300, 700, 999], atol=1e-9)
    np.testing.assert_allclose(found, exact_velocity(x, t), rtol=1e-8, atol=1e-8)
    # Beyond the table it is asked at its ends.
    teacher.velocity(None, jnp.asarray(x[:2]), jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(asked[1], [0, 999], atol=1e-9)


@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("kind", ["u", "eps", "x0", "v"])
def test_the_ends_of_time_are_finite_in_float32(name, kind):
    schedule, coordinates = COORDINATES[name]
    predict = predictor(kind, coordinates)
    teacher = Teacher(predict=predict, shape=(2,), prediction=kind, schedule=schedule)
    x = jnp.asarray(states()[0][:2], jnp.float32)
    for level in (0.0, 1e-5, 1.0):
        assert np.isfinite(teacher.velocity(None, x, jnp.full(2, level))).all()


def test_a_null_condition_may_be_a_list():
    def predict(params, z, s, cond):
        return z * cond[:, :1]

    x, t, cond = jnp.ones((2, 2)), jnp.ones(2), jnp.full((2, 3), 2.0)
    teacher = Teacher(predict=predict, shape=(2,), guidance_scale=2.0, null_cond=[0.5, 0.0, 0.0])
    np.testing.assert_allclose(teacher.velocity({}, x, t, cond), np.full((2, 2), 3.5))
    other = dataclasses.replace(teacher, null_cond={"a": 0.5})
    with pytest.raises(ValueError, match="null_cond must be the condition of one example"):
        other.velocity({}, x, t, cond)


@pytest.mark.parametrize("orthogonal", [0.0, 0.7])
def test_guidance_is_that_of_velocities(x64, orthogonal):
    x, t = states()

    def predict(params, z, s, cond):
        return params * z * cond["a"][:, None]

    teacher = Teacher(
        predict=predict,
        shape=(2,),
        prediction="eps",
        schedule=Schedule.cosine(),
        guidance_scale=2.5,
        guidance_interval=(0.0, 0.6),
        orthogonal_guidance=orthogonal,
        null_cond={"a": 0.25},
    )
    plain = Teacher(predict=predict, shape=(2,), prediction="eps", schedule=Schedule.cosine())
    x, t, a = jnp.asarray(x), jnp.asarray(t), jnp.arange(5.0)
    expected = guided_velocity(
        plain.velocity(3.0, x, t, {"a": a}),
        plain.velocity(3.0, x, t, {"a": jnp.full(5, 0.25)}),
        2.5,
        t,
        (0.0, 0.6),
        orthogonal,
        x,
    )
    found = jax.jit(teacher.bind(3.0, {"a": a}))(x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert not np.allclose(found[1], plain.velocity(3.0, x, t, {"a": a})[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.straight(data_at=2), "data_at must be 0 or 1, got 2"),
        (lambda: Schedule.discrete(ALPHAS[::-1]), "must be .N., falling"),
        (lambda: Teacher(predict=max, shape=(2,), prediction="score"), "must be u, eps, x0 or v"),
        (lambda: Teacher(predict=max, shape=(2,), guidance_scale=2.0), "guidance needs null_cond"),
    ],
)
def test_what_is_no_teacher_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_that_are_not_the_teachers_are_refused():
    teacher = Teacher(predict=lambda params, z, s, cond: z[..., None], shape=(2,))
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\), the teacher's samples are \(2,\)"):
        teacher.velocity(None, jnp.zeros((5, 3)), jnp.ones(5))
    with pytest.raises(ValueError, match=r"the teacher predicts \(5, 2, 1\) of states \(5, 2\)"):
        teacher.velocity(None, jnp.zeros((5, 2)), jnp.ones(5))


SCHEDULES = {
    "straight": lambda **scale: Schedule.straight(data_at=1, **scale),
    "cosine": Schedule.cosine,
    "exploding": lambda **scale: Schedule.variance_exploding(largest=40.0, **scale),
    "table": lambda **scale: Schedule.discrete(ALPHAS, **scale),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_comes_back_as_it_was(name):
    """And one that was changed by hand is not taken for the one that its method makes."""
    t = jnp.linspace(0.1, 0.9, 9)
    for schedule in (SCHEDULES[name](), SCHEDULES[name](time_scale=1e-3)):
        assert schedule.made_by is not None
        method, arguments = schedule.made_by
        for again in (pickle.loads(pickle.dumps(schedule)), Schedule.made(method, dict(arguments))):
            assert (again.time_scale, again.levels) == (schedule.time_scale, schedule.levels)
            np.testing.assert_array_equal(again.time(t), schedule.time(t))
    assert SCHEDULES[name]().made_by != SCHEDULES[name](time_scale=1e-3).made_by
    assert dataclasses.replace(SCHEDULES[name](), time_scale=1e-3).made_by is None


@pytest.mark.parametrize(
    ("null", "dtype"), [(-1, np.uint8), (256, np.uint8), (-1, bool), (0.5, np.int32)]
)
def test_a_null_condition_is_what_it_is_in_the_dtype_of_the_conditions(null, dtype):
    teacher = Teacher(
        predict=lambda params, z, s, cond: z * cond["class"][:, None],
        shape=(2,),
        guidance_scale=3.0,
        null_cond={"class": null},
    )
    with pytest.raises(ValueError, match=rf"null_cond is {null}, which conditions of dtype"):
        teacher.velocity(None, jnp.ones((1, 2)), jnp.ones(1), {"class": np.ones(1, dtype)})
    wide = {"class": np.ones(1, np.float32)}
    found = teacher.velocity(None, jnp.ones((1, 2)), jnp.ones(1), wide)
    np.testing.assert_allclose(found, null + 3 * (1 - np.full((1, 2), float(null))), rtol=1e-6)
