"""Sums of estimated cycles: of programs written by hand, and of compiled loops of known lengths."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from piflow_jax.parallel.cycles import estimated_cycles
from piflow_jax.parallel.program import UnknownTripCountError
from tests import tpu_compiler

ROOT = Path(__file__).parents[2]
SCOPES = ("teacher", "student", "policy")


def config(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def name(op_name):
    return f'metadata={{op_name="{op_name}" stack_frame_id=1}}'


# Layouts with brackets, comments in tuples and copied counters are as in TPU programs.
LOOP = """
%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %step = s32[]{:T(128)} get-tuple-element(%state), index=2
  %next = s32[]{:T(128)} add(%i, %step)
  %x = f32[8]{0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %moved = f32[8]{0:T(8,128)S(1)} copy(%x), @CYCLES_1
  %y = f32[8]{0:T(8,128)} fusion(%moved), kind=kLoop, calls=%fused, @NAME, @CYCLES_10
  ROOT %out = (s32[], f32[8], /*index=2*/s32[]) tuple(%next, %y, /*index=2*/%step)
}

%condition (state.1: (s32[], f32[8], s32[])) -> pred[] {
  %state.1 = (s32[], f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(@LIMIT)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}
"""
FUSED = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sine = f32[8]{0} sine(%p), metadata={op_name="jit(f)/jvp(policy)/while/body/sin"}
}
"""
ENTRY = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="a"}
  %start = s32[]{:T(128)} constant(@START)
  %start.copy = s32[]{:T(128)} copy(%start)
  %one = s32[]{:T(128)} constant(@STEP)
  %init = (s32[], f32[8], s32[]) tuple(%start.copy, %a, %one)
  %loop = (s32[], f32[8], s32[]) while(%init), condition=%condition, body=%body, @LOOPNAME@KNOWN
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def program(limit=7, start=0, step=1, op="jit(f)/policy/sin", loop="jit(f)/while", known=""):
    text = "HloModule jit_f, is_scheduled=true\n" + FUSED + LOOP + ENTRY
    values = {"LIMIT": limit, "START": start, "STEP": step, "NAME": name(op), "KNOWN": known}
    values |= {"LOOPNAME": name(loop), "CYCLES_10": config(10), "CYCLES_1": config(1)}
    for key in sorted(values, key=len, reverse=True):  # LOOPNAME before NAME
        text = text.replace(f"@{key}", str(values[key]))
    return text


@pytest.mark.parametrize(
    ("numbers", "trips"),
    [((7, 0, 1), 7), ((7, 0, 2), 4), ((8, 0, 2), 4), ((7, 3, 1), 4), ((5, -1, 3), 2)],
)
def test_loops_count_as_often_as_they_run(numbers, trips):
    cycles = estimated_cycles(program(*numbers), SCOPES)
    assert cycles.by_scope == {"teacher": 0, "student": 0, "policy": 11 * trips, "other": 0}
    assert cycles.total == 11 * trips
    assert cycles.shares["policy"] == 1
    assert not cycles.traced


def test_line_breaks_in_attributes_end_no_computation():
    """As XLA prints the settings of a kernel, `splash` of jax."""
    broken = '%x), @KERNEL, backend_config={"note":{\n"tile":"{\\"queries\\": 512}"\n}}, @NAME, '
    text = program().replace("%x), ", broken)
    text = text.replace("@KERNEL", 'custom_call_target="k"').replace("@NAME", name("jit(f)/x"))
    assert text.count("\n}}") == 1
    assert estimated_cycles(text, SCOPES) == estimated_cycles(program(), SCOPES)


def test_a_stated_trip_count_goes_first():
    known = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}'
    assert estimated_cycles(program(known=known), SCOPES).by_scope["policy"] == 55


@pytest.mark.parametrize(
    ("op", "loop", "scope"),
    [
        ("jit(f)/teacher/while/body/sin", "jit(f)/teacher/while", "teacher"),
        ("jit(f)/policy/teacher/sin", "jit(f)/policy/while", "teacher"),
        ("jit(f)/teacher/policy/sin", "jit(f)/while", "policy"),
        ("jit(f)/transpose(jvp(student))/sin", "jit(f)/while", "student"),
        ("jit(f)/students/sin", "jit(f)/while", "policy"),  # by what is fused in it
    ],
)
def test_the_innermost_scope_has_it(op, loop, scope):
    cycles = estimated_cycles(program(op=op, loop=loop), SCOPES)
    assert cycles.by_scope[scope] >= 70
    # The copy has no name: it belongs to the loop's scope, or to what uses it.
    copied = "policy" if loop == "jit(f)/policy/while" else scope
    if op != "jit(f)/students/sin":
        assert cycles.by_scope[copied] == (77 if copied == scope else 7)
    assert cycles.total == 77


def test_loops_of_unknown_length_are_given_or_refused():
    text = program().replace("compare(%j, %limit)", "compare(%j, %j)")
    with pytest.raises(UnknownTripCountError, match=r"%loop \(jit\(f\)/while\).*scope other"):
        estimated_cycles(text, SCOPES, {"policy": 128})
    text = text.replace("jit(f)/while", "jit(f)/policy/while")
    with pytest.raises(UnknownTripCountError, match="none were given for the scope policy"):
        estimated_cycles(text, SCOPES, {"teacher": 128})
    cycles = estimated_cycles(text, SCOPES, {"policy": 128})
    assert cycles.by_scope["policy"] == 128 * 11
    assert cycles.traced == ("jit(f)/policy/while",)
    # A test of another kind, and a counter that is not counted up by a number of the program.
    with pytest.raises(UnknownTripCountError):
        estimated_cycles(program().replace("direction=LT", "direction=NE"), SCOPES)
    text = program().replace("add(%i, %step)", "multiply(%i, %step)")
    with pytest.raises(UnknownTripCountError):
        estimated_cycles(text, SCOPES)


def test_loops_in_loops_multiply_and_inherit_numbers():
    # The outer state has a step that the inner loop takes, and its loop the inner one's limit.
    outer = """
%outer (s: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %s = (s32[], f32[8], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %z = f32[8] get-tuple-element(%s), index=1
  %by = s32[] get-tuple-element(%s), index=2
  %zero = s32[] constant(0)
  %inner.init = (s32[], f32[8], s32[]) tuple(%zero, %z, %by)
  %inner = (s32[], f32[8], s32[]) while(%inner.init), condition=%condition, body=%body
  %w = f32[8] get-tuple-element(%inner), index=1
  %by.2 = s32[] get-tuple-element(%inner), index=2
  %up = s32[] add(%k, %by.2)
  ROOT %o = (s32[], f32[8], s32[]) tuple(%up, %w, %by)
}
"""
    text = (
        program(step=2)
        .replace("ENTRY", outer + "\nENTRY", 1)
        .replace("body=%body, m", "body=%outer, m")
    )
    # Of 7 by 2: 4 outer iterations of 4 inner ones.
    assert estimated_cycles(text, SCOPES).by_scope["policy"] == 4 * 4 * 11


def test_branches_count_the_dearest_and_calls_what_is_called():
    text = f"""HloModule jit_f

%cheap (p.1: f32[8]) -> f32[8] {{
  %p.1 = f32[8] parameter(0)
  ROOT %c = f32[8] sine(%p.1), {config(3)}
}}

%dear (p.2: f32[8]) -> f32[8] {{
  %p.2 = f32[8] parameter(0)
  ROOT %d = f32[8] cosine(%p.2), {name("jit(f)/student/cos")}, {config(5)}
}}

ENTRY %main (a: f32[8], b: pred[]) -> f32[8] {{
  %a = f32[8] parameter(0)
  %b = pred[] parameter(1)
  %one = f32[8] conditional(%b, %a, %a), true_computation=%cheap, false_computation=%dear
  %two = f32[8] conditional(%b, %a, %a), branch_computations={{%cheap, %cheap}}, {name("teacher/c")}
  %three = f32[8] call(%one), to_apply=%cheap
  %four = f32[8] fusion(%two), kind=kLoop, calls=%cheap, {config(100)}
  ROOT %five = (f32[8], f32[8]) tuple(%three, %four)
}}
"""
    cycles = estimated_cycles(text, SCOPES)
    # `four` uses what is in the teacher; nothing about `three` has a scope.
    assert cycles.by_scope == {"teacher": 103, "student": 5, "policy": 0, "other": 3}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        estimated_cycles("HloModule x\n", SCOPES)
    with pytest.raises(ValueError, match="not an instruction"):
        estimated_cycles("ENTRY %m () -> f32[] {\n  %x = f32[] 3\n}\n", SCOPES)


COMPILED = """
import sys
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.experimental import topologies

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
whole = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec())

def apply(x, w):
    return jnp.tanh(x @ w)

def loop(scope, length, x, w):
    with jax.named_scope(scope):
        return jax.lax.scan(lambda x, _: (apply(x, w), None), x, None, length=length)[0]

def step(x, w, n):
    x = jax.lax.scan(lambda x, _: (loop("teacher", 5, x, w), None), x, None, length=3)[0]
    x = loop("policy", 60, x, w)
    with jax.named_scope("traced"):
        x = jax.lax.fori_loop(0, n, lambda i, x: apply(x, w), x)
    gradient = jax.grad(lambda w: jnp.sum(loop("student", 4, x, w)))(w)
    return x, gradient

x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
n = jax.ShapeDtypeStruct((), jnp.int32)
compiled = jax.jit(step, in_shardings=whole, out_shardings=whole).lower(x, x, n).compile()
open(sys.argv[1], "w").write(compiled.as_text())
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compiled_loops_have_the_shares_of_their_lengths(tmp_path):
    path = tmp_path / "program.txt"
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(path)],
        cwd=ROOT,
        env=tpu_compiler.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    scopes = ("teacher", "policy", "traced", "student")
    cycles = estimated_cycles(path.read_text(), scopes, {"traced": 30})
    once = cycles.by_scope["policy"] / 60
    assert once > 0
    # Equal bodies: what is around a loop is all that may differ.
    assert cycles.by_scope["teacher"] == 15 * once
    assert cycles.by_scope["traced"] == pytest.approx(30 * once, rel=0.02)
    assert cycles.shares["policy"] == 4 * cycles.shares["teacher"]
    # Besides the forward pass there are two products of the same size in the backward pass.
    assert cycles.by_scope["student"] > 2 * 4 * once
    assert cycles.by_scope["other"] < 0.05 * cycles.total
    assert len(cycles.traced) == 1 and "traced" in cycles.traced[0]
