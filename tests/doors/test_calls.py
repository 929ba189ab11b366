"""Python calls: what is refused, and in which words.

A case is a line: a call and the words of its error.
"""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import piflow_jax
from piflow_jax.flow.guidance import guided_velocity
from piflow_jax.flow.imitation import Intervals, intervals_from_uniforms, window_size
from piflow_jax.flow.policies import ArcFlowPolicy, ArcOutput
from piflow_jax.flow.rollout import average_velocity
from piflow_jax.flow.schedule import sampling_times, segment_start
from piflow_jax.keys import as_key, seed_key
from tests.students import IMAGES, LABELS, NAN, ONE, WARP, X, few, grid, mixture, tiny_student

POLICY = mixture(X, ONE)


# --- Refusals -------------------------------------------------------------------------------------


def roll(start=ONE, end=0 * ONE, x=X, substeps=8, **options):
    return piflow_jax.rollout(POLICY, x, start, end, WARP, substeps, **options)


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
        r"t must be in \(0, 1\]",
    ),
    "noise level 0": (
        lambda s: s.policy(s.x, 0.0, LABELS[:2]),
        r"t must be in \(0, 1\], got 0",
    ),
    "pixels of a policy": (
        lambda s: s.policy(np.zeros((2, 8, 8, 1), np.uint8), 1.0, LABELS[:2]),
        r"x must be about \[-1, 1\], got uint8",
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
    "several starts": (
        lambda s: s.sample(0, [1], x=s.x[:1], start=np.array([0.5, 0.5, 0.5])),
        r"start must be one number, got an array \[3\]",
    ),
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
    "under grad": (
        lambda s: jax.grad(lambda w: s.sample(0, LABELS, temperature=w).sum())(1.0),
        "cannot be traced",
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
