"""Python calls: what is refused and in which words, and where samples must be the same.

A case is a line: a call and the words of its error, or a context and nothing else.
"""

import ast
import contextlib
import dataclasses
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import piflow_jax
from piflow_jax.config import parse
from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.flow.imitation import Intervals, intervals_from_uniforms, window_size
from piflow_jax.flow.policies import ArcFlowPolicy, ArcOutput
from piflow_jax.flow.rollout import average_velocity
from piflow_jax.flow.sampling import sample_segments
from piflow_jax.flow.schedule import sampling_times, segment_start
from piflow_jax.flow.substeps import num_substeps
from piflow_jax.keys import as_key, seed_key
from piflow_jax.student import _program
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import StudentSettings
from tests import tiny

ROOT = Path(__file__).parents[2]
NAN = float("nan")
ONE = np.ones(2, np.float32)
X = np.random.default_rng(0).normal(size=(2, 4, 1)).astype(np.float32)
WARP = piflow_jax.TimeWarp(3.2)


def mixture(x, t):
    """A policy of two components that depend on what the network sees."""
    means = jnp.stack([jnp.tanh(x), 0.5 * jnp.asarray(x)], axis=-2)
    output = piflow_jax.GMOutput(means, jnp.zeros(means.shape[:-1]), -jnp.asarray(t))
    return piflow_jax.GMFlowPolicy.create(output, jnp.asarray(x), jnp.asarray(t))


def grid(x, t):
    return piflow_jax.DXPolicy.create(jnp.stack([x, 0.5 * x], axis=-2), x, t)


POLICY = mixture(X, ONE)


def tiny_student(nfe=2, shift=1.0, final=1.0):
    config = tiny.get_config()
    config.train.nfe, config.train.shift, config.train.final_step_size_scale = nfe, shift, final
    config = parse(config)
    data = DataShape(name="digits", sample_size=8, channels=1, num_classes=10)
    network = student_network(config.model, config.policy, data)
    params = jax.jit(network.init)(seed_key(0))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    settings = StudentSettings(
        model=config.model, policy=config.policy, train=config.train, data=data
    )
    return piflow_jax.Student(network, params, settings)


@pytest.fixture(scope="module")
def student():
    return tiny_student()


LABELS = np.arange(3)


def sampled(student):
    return np.asarray(student.sample(5, LABELS, substeps=8, h=0.5, temperature=0.7))


@pytest.fixture(scope="module")
def samples(student):
    return sampled(student)


# --- Refusals -------------------------------------------------------------------------------------


def roll(start=ONE, end=0 * ONE, x=X, substeps=8, **options):
    return piflow_jax.rollout(POLICY, x, start, end, WARP, substeps, **options)


def few(nfe=2, noise=X, policy_fn=mixture, warp=WARP, **options):
    return piflow_jax.few_step_sample(policy_fn, noise, nfe, warp, total_substeps=8, **options)


def teacher(**options):
    shape = {"predict": lambda params, z, s, cond: jnp.tanh(z), "shape": (4, 1)}
    return piflow_jax.Teacher(**(shape | options))


def loss(teacher=lambda x, t: x, student=0.2, walked=0.2, size=1.0, tau=ONE, **options):
    student, walked = (np.full((2, 2), a) if np.ndim(a) == 0 else a for a in (student, walked))
    intervals = Intervals(student, walked)
    size, options = size * ONE, {"total_substeps": 8} | options
    return piflow_jax.imitation_loss(POLICY, teacher, X, tau, size, intervals, WARP, **options)


def mixed(components=2, t=ONE, **options):
    means = np.ones((2, 4, components, 1), np.float32)
    output = piflow_jax.GMOutput(means, means[..., 0], np.zeros(2, np.float32))
    return piflow_jax.GMFlowPolicy.create(output, X, t, **options)


def gridded(points=3, **options):
    return piflow_jax.DXPolicy.create(np.ones((2, 4, points, 1), np.float32), X, ONE, **options)


def growing(components=2):
    means = np.ones((2, 4, components, 1), np.float32)
    return ArcFlowPolicy.create(ArcOutput(means, means[..., 0], means[..., 0]), X, ONE)


def guided(scale=2.0, interval=(0.0, 1.0), orthogonal=0.0, other=X, **options):
    return guided_velocity(X, other, scale, ONE, interval, orthogonal, X)


def draw(states=2, size=1.0, window=0.0, ratio=0.5):
    return piflow_jax.sample_intervals(seed_key(0), states, size * ONE, window * ONE, ratio)


def ode(steps=2, solver="euler", noise=X):
    return piflow_jax.ode_sample(lambda x, t: x, noise, steps, WARP, solver)


REFUSED = {
    "upwards": (lambda: roll(0 * ONE, ONE), "tau_end must not be above tau_start"),
    "one upwards": (lambda: roll([1, 0.2], [0.5, 0.3]), "tau_end must not be above tau_start"),
    "time of NaN": (lambda: roll(NAN * ONE), r"tau_start must be in \[0, 1\], got nan"),
    "end of NaN": (lambda: roll(end=[0.0, NAN]), "tau_end must be .* got nan"),
    "time above 1": (lambda: roll(1.5 * ONE), r"tau_start must be in \[0, 1\], got 1.5"),
    "times of another batch": (lambda: roll(np.ones(3)), r"tau_start has shape \(3,\); x of shape"),
    "empty batch": (lambda: roll(ONE[:0], ONE[:0], X[:0]), r"at least one state.*\(0, 4, 1\)"),
    "2^31 substeps": (lambda: roll(substeps=2**31), "total_substeps must be at most 16777216"),
    "half a substep": (
        lambda: roll(substeps=0.5),
        "total_substeps must be a whole number, got 0.5",
    ),
    "substeps of NaN": (lambda: roll(substeps=NAN), "total_substeps must be a whole number"),
    "no bound": (lambda: roll(bound=0), "bound must be at least 1"),
    "bound's name": (lambda: roll(bound="tight"), "bound must be a whole number, got 'tight'"),
    "rounding": (
        lambda: roll(rounding="floor"),
        "unknown rounding 'floor'; it is 'round' or 'ceil'",
    ),
    "solver": (lambda: roll(solver="rk4"), "unknown solver 'rk4'; it is 'euler' or 'multistep'"),
    "mean upwards": (
        lambda: average_velocity(POLICY, X, 0 * ONE, ONE, WARP, 8),
        "tau_end must not be above",
    ),
    "shift 0": (lambda: piflow_jax.TimeWarp(0), r"shift must be in \[1e-06, 1e\+06\], got 0"),
    "shift below 0": (lambda: piflow_jax.TimeWarp(-1.0), "shift must be in .* got -1.0"),
    "shift of NaN": (lambda: piflow_jax.TimeWarp(NAN), "shift must be in .* got nan"),
    "segment of NaN": (lambda: segment_start(NAN * ONE, 2), "tau must be .* got nan"),
    "no evaluation": (lambda: few(0), "nfe must be at least 1, got 0"),
    "half an evaluation": (lambda: few(1.5), "nfe must be a whole number, got 1.5"),
    "last segment": (lambda: sampling_times(2, WARP, NAN), "final_step_size_scale must be finite"),
    "start 0": (lambda: few(start=0.0), r"start must be in \(0, 1\], got 0"),
    "h of NaN": (lambda: few(h=NAN), "h must be at least 0"),
    "hot": (lambda: few(temperature=2.0), r"temperature must be in \(0, 1\], got 2.0"),
    "grid's temperature": (
        lambda: few(policy_fn=grid, temperature=0.5),
        "DXPolicy has no temperature",
    ),
    "traced h": (
        lambda: jax.jit(lambda h: few(h=h, key=seed_key(0)))(0.5),
        "pass its times to `sample_segments`",
    ),
    "no step": (lambda: ode(0), "steps must be at least 1"),
    "no state": (lambda: few(noise=X[:0]), "at least one state"),
    "broadcast teacher": (
        lambda: loss(lambda x, t: x[..., :1, :]),
        r"the teacher's velocity has shape \(2, 1, 1\); its state asks for \(2, 4, 1\)",
    ),
    "negative interval": (lambda: loss(student=-0.1), r"intervals.student must be .* got -0.1"),
    "walk upwards": (lambda: loss(walked=-0.1), r"intervals.teacher must be .* got -0.1"),
    "too far": (lambda: loss(student=0.6), "intervals must not be longer than their segment"),
    "negative segment": (lambda: loss(size=-0.5), r"segment_size must be in \[0, 1\], got -0.5"),
    "segment's NaN": (lambda: loss(size=NAN), r"segment_size must be in \[0, 1\], got nan"),
    "negative window": (lambda: loss(window_substeps=-1), "window_substeps must be at least 0"),
    "loss's time": (lambda: loss(tau=NAN * ONE), "tau_src must be .* got nan"),
    "loss's scale": (lambda: loss(loss_scale=NAN), "loss_scale must be finite, got nan"),
    "loss's eps": (lambda: loss(eps=0.0), "eps must be finite and above 0"),
    "window's segment": (lambda: window_size(-ONE, 3), "segment_size must be"),
    "drawn segment": (lambda: draw(size=-1.0), "segment_size must be"),
    "drawn window": (lambda: draw(window=-0.5), "window must be"),
    "long window": (lambda: draw(size=0.5, window=0.7), "window must not be longer than segment"),
    "ratio": (lambda: draw(ratio=1.5), r"teacher_ratio must be in \[0, 1\], got 1.5"),
    "no states": (lambda: draw(states=0), "num_states must be at least 1"),
    "uniforms": (
        lambda: intervals_from_uniforms(X[..., 0] * 9, X[:, 1:, 0], ONE, 0 * ONE, 0.5),
        r"student_u must be in \[0, 1\]",
    ),
    "guidance of NaN": (lambda: guided(NAN), "guidance's scale must be finite, got nan"),
    "guidance upside down": (
        lambda: guided(interval=(0.7, 0.1)),
        r"interval must be \(low, high\)",
    ),
    "orthogonal": (lambda: guided(orthogonal=2.0), r"orthogonal share must be in \[0, 1\]"),
    "guidance of others": (lambda: guided(other=X[:, :1]), "u_uncond has shape"),
    "teacher's guidance": (
        lambda: teacher(guidance_scale=NAN, null_cond=0),
        "guidance's scale must be finite, got nan",
    ),
    "teacher's interval": (
        lambda: teacher(guidance_interval=(NAN, 1.0)),
        r"interval must be \(low, high\)",
    ),
    "guided without cond": (
        lambda: teacher(guidance_scale=2.0, null_cond=0).velocity(None, X, ONE),
        "guidance needs cond",
    ),
    "another batch's cond": (
        lambda: teacher(guidance_scale=2.0, null_cond=0).velocity(None, X, ONE, np.zeros(3)),
        r"cond must be \[2, ...\], got an array \(3,\)",
    ),
    "teacher's time": (lambda: teacher().velocity(None, X, 2 * ONE), r"t must be in \[0, 1\]"),
    "integers to compute in": (
        lambda: piflow_jax.load("nowhere", dtype="int8"),
        "unknown dtype 'int8'; it is 'float32' or 'bfloat16'",
    ),
    "no dtype": (lambda: piflow_jax.load("nowhere", dtype="half"), "unknown dtype 'float16'"),
    "shift beyond float32": (lambda: piflow_jax.TimeWarp(1e300), "shift must be in"),
    "shift's name": (lambda: piflow_jax.TimeWarp("linear"), "shift must be in .* got 'linear'"),
    "complex start": (lambda: few(start=1j), "start must be in"),
    "two temperatures": (lambda: few(temperature=ONE), "temperature must be one number"),
    "two starts": (lambda: few(start=ONE), r"start must be one number, got an array \[2\]"),
    "h's name": (lambda: few(h="much"), "h must be at least 0"),
    "no policy": (
        lambda: few(policy_fn=lambda x, t: x),
        "policy must be a policy, with a velocity",
    ),
    "number for a warp": (
        lambda: piflow_jax.rollout(POLICY, X, ONE, 0 * ONE, 3.2),
        "warp must be a TimeWarp, got 3.2",
    ),
    "sampler's warp": (lambda: few(warp=3.2), "warp must be a TimeWarp, got 3.2"),
    "solver's warp": (
        lambda: piflow_jax.ode_sample(lambda x, t: x, X, 2, "linear"),
        "warp must be a TimeWarp, got 'linear'",
    ),
    "number for noise": (
        lambda: few(noise=1.0),
        r"noise must hold at least one state \[B, \*sites, C\], got shape \(\)",
    ),
    "evaluations beyond int32": (
        lambda: segment_start(ONE, 1e300),
        "nfe must be at most 214748364",
    ),
    "states of another policy": (
        lambda: roll(x=np.ones((2, 5, 1), np.float32)),
        r"x has shape \(2, 5, 1\); the policy is of states \(2, 4, 1\)",
    ),
    "one state of two": (lambda: roll(1.0, 0.0, X[:1]), r"the policy is of states \(2, 4, 1\)"),
    "channels": (lambda: POLICY.velocity(np.ones((2, 4, 3)), ONE), "the policy is of states"),
    "query's times": (lambda: POLICY.velocity(X, np.ones(3)), r"sigma has shape \(3,\)"),
    "grid's query": (lambda: grid(X, ONE).velocity(X[:, :1], ONE), "the policy is of states"),
    "no component": (lambda: mixed(0), "GMOutput.means has shape .* without a component"),
    "no grid point": (lambda: gridded(0), r"DX output has shape \(2, 4, 0, 1\)"),
    "no growth": (lambda: growing(0), "ArcOutput.means has shape .* without a component"),
    "source of NaN": (lambda: mixed(t=NAN * ONE), "sigma_src must be finite, got nan"),
    "number for a source": (lambda: mixed(t=1.0), r"sigma_src has shape \(\), expected \(2,\)"),
    "policy's eps": (lambda: mixed(eps=NAN), "eps must be finite and at least 0, got nan"),
    "grid upwards": (
        lambda: gridded(segment_size=-1.0),
        "segment_size must be finite and at least 0",
    ),
    "grid's mode": (lambda: gridded(mode="spline"), "unknown DX mode 'spline'"),
    "mask": (
        lambda: POLICY.drop(np.zeros((2, 3), bool)),
        r"mask has shape \(2, 3\); the policy asks",
    ),
    "mask of fractions": (lambda: POLICY.drop(np.zeros((2, 2))), "mask must be bool, got float32"),
    "policy's temperature": (lambda: POLICY.with_temperature(NAN), "temperature must be finite"),
    "mean's eps": (
        lambda: average_velocity(POLICY, X, ONE, 0 * ONE, WARP, 8, NAN),
        "eps must be finite and above 0",
    ),
    "word for a key": (lambda: few(h=1.0, key="seed"), "key must be a seed or one PRNG key"),
    "keys of others": (
        lambda: few(h=1.0, key=jax.random.split(seed_key(0), 3)),
        r"keys must be one or \[2\], got \[3\]",
    ),
    "velocity of others": (
        lambda: piflow_jax.ode_sample(lambda x, t: x[:, :1], X, 2, WARP),
        r"the velocity has shape \(2, 1, 1\); its state asks for \(2, 4, 1\)",
    ),
    "no velocity": (
        lambda: piflow_jax.ode_sample(lambda x, t: None, X, 2, WARP),
        r"the velocity has shape \(\)",
    ),
    "intervals of others": (
        lambda: loss(student=np.full((3, 2), 0.1), walked=np.full((3, 2), 0.1)),
        r"intervals must be student\[2, M\] and teacher\[2, M\]",
    ),
    "no interval": (
        lambda: loss(student=np.ones((2, 0)), walked=np.ones((2, 0))),
        "with M at least 1",
    ),
    "no teacher": (lambda: loss(lambda x, t: None), "the teacher's velocity has shape"),
    "drawn for no batch": (
        lambda: piflow_jax.sample_intervals(seed_key(0), 2, 1.0, 0.0, 0.5),
        r"segment_size and window must be \[B\]",
    ),
    "interval of three": (
        lambda: teacher(guidance_interval=(0.0, 0.5, 1.0)),
        r"interval must be \(low, high\)",
    ),
    "teacher of two": (
        lambda: teacher(predict=lambda params, z, s, cond: (z, z)).velocity(None, X, ONE),
        r"the teacher predicts tuple of states \(2, 4, 1\)",
    ),
    "null of others": (
        lambda: teacher(guidance_scale=2.0, null_cond=np.ones(3)).velocity(None, X, ONE, ONE),
        "null_cond must be the condition of one example",
    ),
    "schedule upside down": (
        lambda: piflow_jax.Schedule.variance_exploding(smallest=2.0, largest=1.0),
        "smallest must be above 0 and below largest",
    ),
    "empty schedule": (lambda: piflow_jax.Schedule.discrete([]), r"alphas_cumprod must be \[N\]"),
    "network of integers": (
        lambda: piflow_jax.DiT(dtype=jnp.int8).init(seed_key(0), X, ONE, LABELS),
        "dtype must be one of floating-point numbers",
    ),
    "network without heads": (
        lambda: piflow_jax.DiT(num_heads=0).init(seed_key(0), X, ONE, LABELS),
        "num_heads must be at least 1, got 0",
    ),
    "several keys": (lambda: as_key(jax.random.split(seed_key(0))), "one PRNG key, got an array"),
    "long seed": (lambda: as_key(2**64), "a seed has at most 64 bits"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_call_is_refused_in_a_sentence(call):
    make, words = REFUSED[call]
    with pytest.raises(ValueError, match=words) as found:
        make()
    assert "\n" not in str(found.value)


OF_STUDENTS = {
    "class": (
        lambda s: s.policy(s.x, s.t, np.array([0, 11])),
        r"labels must be in \[0, 10\], got 11",
    ),
    "class below 0": (
        lambda s: s.policy(s.x, s.t, np.array([0, -1])),
        "labels must be in .* got -1",
    ),
    "class of a teacher": (
        lambda s: dataclasses.replace(s.teacher).velocity(s.params, s.x, s.t, np.array([0, 11])),
        r"labels must be in \[0, 10\], got 11",
    ),
    "classes for a mapping": (
        lambda s: s.policy(s.x, s.t, {"text": LABELS}),
        "conditioned on classes: pass labels",
    ),
    "noise level of NaN": (
        lambda s: s.policy(s.x, NAN * ONE, LABELS[:2]),
        r"t must be in \[0, 1\]",
    ),
    "empty batch": (lambda s: s.policy(s.x[:0], ONE[:0], LABELS[:0]), r"x must be \[B, H, W, 1\]"),
    "number for a size": (lambda s: s.sample(0, LABELS, size=8), r"size must be \(8, 8\), got 8"),
    "complex noise": (lambda s: s.sample(0, [1], noise=1j * s.x[:1]), "noise must be finite"),
    "noise beyond float32": (
        lambda s: s.sample(0, [1], noise=1e300 * np.ones((1, 8, 8, 1))),
        "noise must be finite, got inf",
    ),
    "device's number": (
        lambda s: s.on([0]),
        r"devices must be different devices of JAX, got \[0\]",
    ),
    "device twice": (lambda s: s.on(jax.devices()[:1] * 2), "must be different devices"),
    "fractions": (lambda s: s.policy(s.x, s.t, np.array([0.5, 1])), "labels must be integers"),
    "a label too many": (
        lambda s: s.policy(s.x, s.t, np.arange(3)),
        r"labels \(3,\) must be \[B\]",
    ),
    "half a substep": (
        lambda s: s.sample(0, LABELS, substeps=1.5),
        "total_substeps must be a whole",
    ),
    "2^31 substeps": (
        lambda s: s.sample(0, LABELS, substeps=2**31),
        "total_substeps must be at most",
    ),
    "solver": (lambda s: s.sample(0, LABELS, solver="rk4"), "unknown solver 'rk4'"),
    "noise of NaN": (
        lambda s: s.sample(0, [1], noise=NAN * np.ones((1, 8, 8, 1))),
        "noise must be fin",
    ),
    "h": (lambda s: s.sample(0, LABELS, h=-1.0), "h must be at least 0"),
    "pixels": (
        lambda s: s.sample(0, [1], x=np.zeros((1, 8, 8, 1), np.uint8), start=0.5),
        r"x must be about \[-1, 1\], got uint8: turn pixels into x / 127.5 - 1",
    ),
    "rollout above 1": (
        lambda s: s.rollout(s.policy(s.x, 1.0, LABELS[:2]), s.x, 2.0),
        r"t_start must be in \[0, 1\], got 2.0",
    ),
    "long seed": (lambda s: s.sample(2**70, LABELS), "a seed has at most 64 bits"),
    "under jit": (
        lambda s: jax.jit(lambda: s.sample(0, LABELS))(),
        "cannot be traced.*few_step_sample",
    ),
    "under vmap": (
        lambda s: jax.vmap(lambda key: s.sample(key, LABELS))(jax.random.split(seed_key(0))),
        "cannot be traced",
    ),
}


@pytest.mark.parametrize("call", OF_STUDENTS)
def test_a_students_call_is_refused_in_a_sentence(student, call):
    make, words = OF_STUDENTS[call]

    class Case:
        x, t, params = np.zeros((2, 8, 8, 1), np.float32), ONE, student.params
        policy, sample, on = student.policy, student.sample, student.on
        rollout = student.rollout
        teacher = piflow_jax.Teacher(
            predict=lambda *inputs: student.network.apply(*inputs).means[..., 0, :],
            shape=(8, 8, 1),
            guidance_scale=2.0,
            null_cond=np.int32(10),
        )

    with pytest.raises(ValueError, match=words) as found:
        make(Case)
    assert "\n" not in str(found.value)


def test_what_is_traced_is_not_refused_and_does_what_the_docstrings_say(student):
    up = jax.jit(lambda a, b: piflow_jax.rollout(POLICY, X, a, b, WARP, 8))
    x, sigma = up(0.5 * ONE, ONE)  # one step, up to there
    assert np.isfinite(x).all() and np.allclose(sigma, 1)
    scaled = jax.jit(lambda w: guided_velocity(X, 0 * X, w, ONE))
    assert np.isnan(scaled(NAN)).all() and np.allclose(scaled(3.0), 3 * X)
    velocity = jax.jit(lambda labels: student.policy(IMAGES, ONE, labels).velocity(IMAGES, ONE))
    for label in (11, -1):
        found = np.asarray(velocity(np.array([3, label])))
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)


def test_checks_add_nothing_to_a_program():
    """Known values are checked before; the program of traced ones is that of no check at all."""

    def rolled(start, end):
        return piflow_jax.rollout(POLICY, X, start, end, WARP, 8, implementation="scan")[0]

    text = str(jax.make_jaxpr(rolled)(ONE, 0 * ONE))
    assert "callback" not in text and "is_finite" not in text


def test_lists_and_numbers_are_taken_for_arrays(student):
    listed = student.policy(IMAGES.tolist(), [1.0, 1.0], [3, 4])
    jax.tree.map(
        np.testing.assert_array_equal, listed, student.policy(IMAGES, ONE, np.array([3, 4]))
    )
    for key in (7, np.asarray(jax.random.key_data(seed_key(7)))):
        np.testing.assert_array_equal(few(h=1.0, key=key), few(h=1.0, key=seed_key(7)))
    masks = np.array([[0, 1], [2, 0]]), np.array([[False, True], [True, False]])
    jax.tree.map(np.testing.assert_array_equal, *map(POLICY.drop, masks))


def test_a_policy_of_one_sample_is_asked_at_many_states():
    one = mixture(X[:1], ONE[:1])
    many = np.concatenate([X, 2 * X])
    for ask in (
        lambda policy, x: policy.velocity(x, 0.5),
        lambda policy, x: piflow_jax.rollout(policy, x, 1.0, 0.0, WARP, 8)[0],
    ):
        each = jnp.concatenate([ask(one, x[None]) for x in many])
        np.testing.assert_allclose(ask(one, many), each, rtol=0, atol=1e-5)


# Options of `sample` by what is said of them; of a student that was trained for 2 evaluations.
CAUTIONS = {
    "": {},
    "as trained, by hand": {"nfe": 2, "h": 0.5, "temperature": 0.5},
    "its last segment alone": {"nfe": 1, "start": 0.5, "x": np.zeros((3, 8, 8, 1))},
    r"trained for nfe=2, .* at t = 1, 0.5; nfe=4 evaluates it at t = 1, 0.75, 0.5, 0.25,": {
        "nfe": 4
    },
    r"nfe=1 evaluates it at t = 1, where": {"nfe": 1},
    r"nfe=2 from start=0.5 evaluates it at t = 0.5, 0.25,": {
        "start": 0.5,
        "x": np.zeros((3, 8, 8, 1)),
    },
    "temperature=0.5 has no effect with nfe=1": {"nfe": 1, "temperature": 0.5},
    "h=0.5 has no effect with nfe=1": {"nfe": 1, "h": 0.5},
}


@pytest.mark.parametrize("words", CAUTIONS)
def test_what_a_student_was_not_trained_for_is_said(student, words):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        student.sample(0, LABELS, substeps=8, **CAUTIONS[words])
    texts = [str(one.message) for one in found if "nfe=" in str(one.message)]
    if " " not in words or words.startswith(("as", "its")):
        assert not texts
    else:
        assert len([text for text in texts if re.search(words, text)]) == 1, texts
        assert {one.filename for one in found} == {__file__}


def test_a_students_rollout_is_that_of_its_samples():
    """The same to rounding, from scalar times; the plain rollout integrates as training does."""
    student = tiny_student(nfe=1, shift=3.2)
    noise = np.random.default_rng(2).normal(size=(3, 8, 8, 1)).astype(np.float32)
    expected = student.sample(0, LABELS, noise=noise, substeps=128)
    policy = student.policy(noise, 1.0, LABELS)
    found = student.rollout(policy, noise, substeps=128)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    halfway = student.rollout(policy, noise, 1.0, 0.5 * np.ones(3), substeps=128)
    found = student.rollout(policy, halfway, 0.5, substeps=128)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)
    assert np.abs(halfway - expected).max() > 0.1


def test_a_student_is_shown_in_five_lines(student):
    lines = repr(student).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 80
    assert "dit" in lines[1] and "trained for 2 evaluations" in lines[2] and "digits" in lines[3]


def test_one_number_is_the_time_of_all_samples():
    expected = roll()
    for times in ((1.0, 0.0), (ONE[:1], 0.0), (1, 0)):
        jax.tree.map(np.testing.assert_array_equal, roll(*times), expected)
    assert np.isfinite(roll(ONE, -0.3 * ONE)[0]).all()  # steps stop at 0


# --- Numbers are arguments of a program -----------------------------------------------------------


@contextlib.contextmanager
def compilations():
    """Names of what XLA compiles meanwhile, or takes from its cache on disk."""
    found = []

    def listen(name, seconds, **kwargs):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_new_numbers_compile_nothing(student, samples):
    whole = {"substeps": 8, "x": np.ones((3, 8, 8, 1)), "start": 0.5}
    student.sample(0, LABELS, **whole)
    other = dataclasses.replace(student, params=jax.tree.map(lambda a: 1.1 * a, student.params))
    with compilations() as compiled:
        for temperature in (1.0, 0.9, 0.31):
            student.sample(0, LABELS, substeps=8, temperature=temperature)
        for h in (0.0, 0.2, 1.0, float("inf")):
            student.sample(0, LABELS, substeps=8, h=h)
        for start in (0.1, 0.7, 0.99):
            student.sample(0, LABELS, **(whole | {"start": start}))
        other.sample(1, LABELS, substeps=8)  # nor do other weights
    assert compiled == []


def test_a_program_for_all_numbers_gives_what_programs_of_their_own_give():
    warp, key = piflow_jax.TimeWarp(3.2), seed_key(1)

    @jax.jit
    def one_program(times, temperature):
        return sample_segments(
            mixture, X, times, warp, total_substeps=8, temperature=temperature, key=key
        )

    for h, start, temperature in ((0.0, 1.0, 1.0), (0.3, 1.0, 0.5), (np.inf, 0.6, 1.0)):
        own = few(3, warp=warp, h=h, start=start, temperature=temperature, key=key)
        found = one_program(sampling_times(3, warp, h=h, start=start), temperature)
        np.testing.assert_allclose(found, own, rtol=0, atol=2e-5)
    assert one_program._cache_size() == 1


def test_a_teachers_guidance_is_an_argument_of_a_program():
    def predict(params, z, s, cond):
        return z * cond[:, None, None]

    def velocity(scale):
        guide = teacher(predict=predict, null_cond=np.float32(0), guidance_scale=scale)
        return guide.velocity(None, X, ONE, 2 * ONE)

    program = jax.jit(velocity)
    for scale in (1.0, 1.5, 4.0):
        np.testing.assert_allclose(program(scale), 2 * scale * X, rtol=1e-6)
        np.testing.assert_allclose(velocity(scale), 2 * scale * X, rtol=1e-6)
    assert program._cache_size() == 1


def test_programs_that_were_not_used_for_long_are_let_go(student):
    settings = student.settings
    choice = (student.network, settings.policy, settings.train, (8, 8, 1), 2)
    most = _program.cache_info().maxsize
    first = weakref.ref(_program(*choice, 1001, "euler"))
    for substeps in range(1002, 1002 + most):
        assert _program(*choice, substeps, "euler")
    gc.collect()
    assert first() is None and _program.cache_info().currsize == most


# --- Students as values ---------------------------------------------------------------------------


def test_a_replaced_student_samples_with_its_own_settings(student, samples):
    train = dataclasses.replace(student.settings.train, shift=5.0)
    settings = dataclasses.replace(student.settings, train=train)
    found = sampled(dataclasses.replace(student, settings=settings))
    right = sampled(piflow_jax.Student(student.network, student.params, settings))
    np.testing.assert_array_equal(found, right)
    assert np.abs(found - samples).max() > 0.1
    np.testing.assert_array_equal(sampled(student), samples)


def test_a_student_that_has_sampled_is_pickled(student, samples):
    for one in (student, student.on(jax.devices()[:1])):
        sampled(one)
        other = pickle.loads(pickle.dumps(one))
        np.testing.assert_array_equal(sampled(other), samples)
        assert other.settings == student.settings and other.devices is None


# --- Contexts -------------------------------------------------------------------------------------


@contextlib.contextmanager
def configured(name, value):
    previous = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, previous)


def mesh_is_set(kind):
    return jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(kind,)))


CONTEXTS = {
    "mesh of auto axes": lambda: mesh_is_set(AxisType.Auto),
    "mesh of explicit axes": lambda: mesh_is_set(AxisType.Explicit),
    "x64": lambda: configured("jax_enable_x64", True),
    "no jit": jax.disable_jit,
    "rbg": lambda: configured("jax_default_prng_impl", "rbg"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_samples_are_the_same_in_every_context(student, samples, context):
    with CONTEXTS[context]():
        found = sampled(student)
    np.testing.assert_allclose(found, samples, rtol=0, atol=1e-5)
    assert found.dtype == np.float32


def test_threads_sample_the_same(student, samples):
    found = []
    threads = [threading.Thread(target=lambda: found.append(sampled(student))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, samples)


def test_a_sampler_of_a_students_policy_is_exported(student):
    def sample(params, noise, labels):
        return piflow_jax.few_step_sample(
            lambda x, t: student.policy(x, t, labels, params), noise, 2, WARP, total_substeps=8
        )

    arguments = (student.params, IMAGES, np.arange(2))
    expected = jax.jit(sample)(*arguments)
    exported = jax.export.export(jax.jit(sample))(*arguments)
    found = jax.export.deserialize(exported.serialize()).call(*arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


FOUR_DEVICES = """
import jax, numpy as np, piflow_jax
from jax.sharding import AxisType
from tests.doors.test_calls import LABELS, IMAGES, ONE, WARP, sampled, tiny_student

student = tiny_student()
one_device, four = student, student.on(jax.devices())
expected = sampled(student)
labels = np.arange(600) % 10

def rolled(x, labels):
    return piflow_jax.rollout(student.policy(x, ONE, labels), x, ONE, 0 * ONE, WARP, 8)[0]

end = jax.jit(rolled)(IMAGES, LABELS[:2])
many = np.asarray(one_device.sample(0, labels, substeps=2))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for who in (one_device, four):
            np.testing.assert_allclose(sampled(who), expected, atol=1e-5)
        np.testing.assert_allclose(jax.jit(rolled)(IMAGES, LABELS[:2]), end, atol=1e-5)
with jax.default_device(jax.devices()[2]):
    np.testing.assert_allclose(sampled(one_device), expected, atol=1e-5)
np.testing.assert_allclose(four.sample(0, labels, substeps=2), many, atol=1e-5)
np.save(__import__("sys").argv[1], many)
print("same")
"""


def test_samples_are_the_same_on_meshes_and_devices_under_any_generator(student, tmp_path):
    """Eight contexts in a process of four devices, whose default generator is another one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(tmp_path / "many.npy")],
        env=environment | {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
    here = student.sample(0, np.arange(600) % 10, substeps=2)
    np.testing.assert_allclose(np.load(tmp_path / "many.npy"), here, rtol=0, atol=1e-4)


# --- Random streams -------------------------------------------------------------------------------

SEEDS = (0, 7, 2**31, 2**40, -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_is_the_same_key_under_any_generator(seed):
    with configured("jax_enable_x64", True):
        words = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    expected = [0, 2**32 - 1] if seed < 0 else words  # as with 32-bit types
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        with configured("jax_default_prng_impl", implementation):
            for key in (seed, np.int64(seed), jax.random.key(seed)):
                if seed in (2**31, 2**40) and isinstance(key, jax.Array):
                    continue  # JAX's own keys of 32-bit types do not hold them
                found = jax.random.key_data(as_key(key))
                np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.random.key_data(as_key(jax.random.PRNGKey(7))), [0, 7])


def test_noise_between_segments_depends_on_a_samples_own_key_under_any_generator():
    for implementation in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(3, impl=implementation), 2)
        both = few(h=1.0, key=keys)
        alone = [few(h=1.0, key=keys[i : i + 1], noise=X[i : i + 1]) for i in range(2)]
        np.testing.assert_allclose(both, jnp.concatenate(alone), rtol=0, atol=1e-5)


def key_makers(source):
    """Lines of a program that make a key of whatever the default is."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        made = name.endswith(("random.key", "PRNGKey", "wrap_key_data"))
        if made and not any(keyword.arg == "impl" for keyword in node.keywords):
            yield node.lineno
        if name.endswith(("nnx.Rngs", "random.seed", "random_seed")):
            yield node.lineno


def test_keys_are_made_in_one_place_which_names_the_generator():
    places = [*(ROOT / "piflow_jax").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert len(places) > 100
    found = [f"{path}:{line}" for path in places for line in key_makers(path.read_text("utf-8"))]
    assert not found
    made = [path.name for path in places if '"threefry2x32"' in path.read_text("utf-8")]
    assert made == ["keys.py"]
    for planted in ("jax.random.key(0)", "random.PRNGKey(1)", "jax.random.wrap_key_data(words)"):
        assert list(key_makers(f"def f():\n    return {planted}")) == [2]


# --- Substeps -------------------------------------------------------------------------------------

# nfe, length of the last segment, shift, substeps: how many each segment has, rounded and up.
COUNTS = [
    (4, 0.5, 3.2, 128, (37, 37, 37, 18), (37, 37, 37, 19)),
    (4, 0.5, 3.2, 132, (38, 38, 38, 19), (38, 38, 38, 19)),
    (4, 1.0, 3.2, 128, (32, 32, 32, 32), (32, 32, 32, 32)),
    (3, 1.0, 1.0, 128, (43, 43, 43), (43, 43, 43)),
    (3, 1.0, 1.0, 100, (33, 33, 33), (34, 34, 34)),
    (1, 1.0, 1.0, 512, (512,), (512,)),
    (2, 1.0, 1.0, 1, (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("nfe", "last", "shift", "total", "rounded", "up"), COUNTS)
def test_substeps_of_segments(nfe, last, shift, total, rounded, up):
    warp = piflow_jax.TimeWarp(shift)
    times = sampling_times(nfe, warp, last)
    ends = [warp.unwarp(t) for t in (times.src, times.dst)]
    for rounding, expected in (("round", rounded), ("ceil", up)):
        assert tuple(num_substeps(ends[0] - ends[1], total, rounding)) == expected
        # And so where levels and times are float32.
        src, dst = (warp.unwarp(jnp.asarray(t, jnp.float32)) for t in (times.src, times.dst))
        assert tuple(np.asarray(num_substeps(src - dst, total, rounding))) == expected


def test_rounding_errors_are_no_substep():
    lengths = np.float32([32.000002, 31.999998, 32.01, 0.0, 1e-9]) / np.float32(128)
    np.testing.assert_array_equal(num_substeps(lengths, 128, "ceil"), [32, 32, 33, 1, 1])


def by_hand(policy_fn, x, times, counts):
    """Euler's steps, one after the other, as the release takes them."""
    for src, dst, count in zip(times.src, times.dst, counts, strict=True):
        policy = policy_fn(x, jnp.full(len(x), src, jnp.float32))
        taus = np.linspace(WARP.unwarp(src), WARP.unwarp(dst), count + 1)
        for begin, end in zip(WARP.warp(taus)[:-1], WARP.warp(taus)[1:], strict=True):
            x = x + (end - begin) * policy.velocity(x, jnp.full(len(x), begin, jnp.float32))
    return x


@pytest.mark.parametrize("policy_fn", [mixture, grid])
def test_samples_take_the_substeps_of_the_rule(policy_fn):
    times = sampling_times(4, WARP, 0.5)
    for rounding, counts in (("round", (5, 5, 5, 2)), ("ceil", (5, 5, 5, 3))):
        options = {"final_step_size_scale": 0.5, "rounding": rounding, "policy_fn": policy_fn}
        found = piflow_jax.few_step_sample(noise=X, nfe=4, warp=WARP, total_substeps=17, **options)
        right = by_hand(policy_fn, jnp.asarray(X), times, counts)
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5)
    assert (
        np.abs(
            few(4, final_step_size_scale=0.5) - few(4, final_step_size_scale=0.5, rounding="ceil")
        ).max()
        > 1e-4
    )


def test_students_sample_with_the_substeps_of_the_release():
    student = tiny_student(nfe=4, shift=3.2, final=0.5)
    noise = np.random.default_rng(2).normal(size=(2, 8, 8, 1)).astype(np.float32)
    found = student.sample(0, [3, 4], noise=noise, substeps=17, solver="euler")
    times = sampling_times(4, WARP, 0.5)
    labels = np.array([3, 4])
    right = by_hand(lambda x, t: student.policy(x, t, labels), noise, times, (5, 5, 5, 3))
    np.testing.assert_allclose(found, right, rtol=0, atol=5e-5)
