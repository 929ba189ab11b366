"""`check_teacher` on a normal distribution, whose best denoiser is known in closed form."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import Schedule, Teacher, check_teacher

DEVIATION = 0.3
DATA = np.random.default_rng(0).normal(0, DEVIATION, (256, 6, 2)).astype(np.float32)


def teacher(prediction, schedule):
    """The exact denoiser of `N(0, DEVIATION^2)` on a schedule, as a prediction of it."""

    def predict(params, z, s, cond):
        s = s[:, None, None] / schedule.time_scale
        a, b = schedule.signal(s), schedule.noise(s)
        x0 = DEVIATION**2 * a / (a**2 * DEVIATION**2 + b**2) * z
        eps = (z - a * x0) / jnp.maximum(b, 1e-6)
        return {"x0": x0, "eps": eps, "v": a * eps - b * x0, "u": eps - x0}[prediction]

    return Teacher(predict=predict, shape=(6, 2), prediction=prediction, schedule=schedule)


RIGHT = [
    ("u", Schedule.straight(time_scale=1000.0)),
    ("eps", Schedule.cosine()),
    ("x0", Schedule.cosine(time_scale=10.0)),
    ("v", Schedule.cosine()),
]


@pytest.mark.parametrize("examples", [0, -1, 2.5])
def test_some_examples_are_needed(examples):
    with pytest.raises(ValueError, match="examples must be"):
        check_teacher(teacher(*RIGHT[0]), {}, DATA, examples=examples)


@pytest.mark.parametrize(("prediction", "schedule"), RIGHT, ids=[name for name, _ in RIGHT])
def test_nothing_is_said_of_the_exact_denoiser(prediction, schedule):
    report = check_teacher(teacher(prediction, schedule), {}, DATA)
    assert report.problem is None and "nothing wrong" in str(report)
    # The best estimate of a normal distribution is linear: the errors are its own.
    np.testing.assert_allclose(report.error, report.linear, rtol=0.2)
    variance = DEVIATION**2
    t = np.array(report.levels)
    expected = variance * t**2 / ((1 - t) ** 2 * variance + t**2)
    np.testing.assert_allclose(report.linear, expected, rtol=0.1)


@pytest.mark.parametrize(
    ("prediction", "change", "words"),
    [
        ("v", {"prediction": "eps"}, "read as prediction='v'"),
        ("v", {"prediction": "x0"}, "read as prediction='v'"),
        ("v", {"predict": None}, "with the opposite sign"),
        ("x0", {"schedule": Schedule.cosine(time_scale=1e-3)}, "asked with 1000 times its time"),
    ],
    ids=["eps", "x0", "sign", "clock"],
)
def test_a_wrong_description_is_named(prediction, change, words):
    right, traced = teacher(prediction, Schedule.cosine()), []
    sign = -1 if "predict" in change else 1

    def predict(*arguments):
        traced.append(arguments)
        return sign * right.predict(*arguments)

    wrong = dataclasses.replace(right, **change | {"predict": predict})
    report = check_teacher(wrong, {}, DATA)
    assert len(traced) == 1  # one program for all that is tried
    assert report.problem is not None and words in report.problem, report


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (4.5 * DATA, "with the data times about 0.25"),
        (0.22 * DATA, "with the data times about 4"),
        (DATA / 2 + 0.5, "with 2 * x - 1 in place of"),
        (127.5 * DATA + 127.5, "with x / 127.5 - 1 in place of"),
    ],
    ids=["large", "small", "half", "bytes"],
)
@pytest.mark.parametrize(("prediction", "schedule"), RIGHT, ids=[name for name, _ in RIGHT])
def test_data_of_another_scale_are_named(prediction, schedule, data, words):
    report = check_teacher(teacher(prediction, schedule), {}, data)
    assert report.problem is not None and words in report.problem, report


@pytest.mark.filterwarnings("error")
def test_of_a_single_example_nothing_can_be_said():
    report = check_teacher(teacher("v", Schedule.cosine()), {}, DATA[:1])
    assert report.problem is None and np.isnan(report.ratio) and "nothing wrong" in str(report)


def test_of_a_network_that_has_learned_nothing_no_other_reading_is_named():
    nothing = Teacher(
        predict=lambda params, z, s, cond: 0 * z,
        shape=(6, 2),
        prediction="eps",
        schedule=Schedule.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
    )
    report = check_teacher(nothing, {}, np.tanh(2 * DATA / DEVIATION))
    assert report.ratio > 10 and report.problem is None
