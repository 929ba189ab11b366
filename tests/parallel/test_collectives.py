# ruff: noqa: E501
"""Bytes that programs move: of programs written by hand, in every notation of the TPU compiler."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from piflow_jax.parallel.collectives import BETWEEN_SLICES, collective_bytes
from tests import tpu_compiler

# 4 devices in pairs: 64 KiB gathered from halves in a loop of 3; the same one, asynchronous, is
# written three times. An all-reduce of which each device keeps its part is a reduce-scatter.
PROGRAM = """
HloModule step

%start (a: bf16[16,1024]) -> (bf16[16,1024], bf16[32,1024]) {
  %a = bf16[16,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=6, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, dimensions={0}
  ROOT %started = (bf16[16,1024]{1,0}, bf16[32,1024]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (a.1: bf16[16,1024]) -> bf16[32,1024] {
  %a.1 = bf16[16,1024]{1,0} parameter(0)
  ROOT %gather.2 = bf16[32,1024]{1,0} all-gather(%a.1), channel_id=6, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, dimensions={0}
}

%done (a.2: bf16[16,1024]) -> bf16[32,1024] {
  %a.2 = bf16[16,1024]{1,0} parameter(0)
  %gather.3 = bf16[32,1024]{1,0} all-gather(%a.2), channel_id=6, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, dimensions={0}
  ROOT %ended = bf16[32,1024]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (b: f32[32,1024]) -> f32[16,1024] {
  %b = f32[32,1024]{1,0} parameter(0)
  %sum = f32[32,1024]{1,0} all-reduce(%b), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = f32[16,1024]{1,0} slice(%sum), slice={[0:16], [0:1024]}
}

%body (s: (s32[], bf16[16,1024])) -> (s32[], bf16[16,1024]) {
  %s = (s32[], bf16[16,1024]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[16,1024]{1,0} get-tuple-element(%s), index=1
  %f.1 = (bf16[16,1024]{1,0}, bf16[32,1024]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %f.2 = bf16[32,1024]{1,0} fusion(%w), kind=kCustom, calls=%middle, backend_config={"estimated_cycles":"5"}
  %f.3 = bf16[32,1024]{1,0} fusion(%w), kind=kCustom, calls=%done
  ROOT %t = (s32[], bf16[16,1024]) tuple(%i, %w)
}

%cond (s.1: (s32[], bf16[16,1024])) -> pred[] {
  %s.1 = (s32[], bf16[16,1024]) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (x: (s32[], bf16[16,1024]), g: f32[32,1024], l: f32[]) -> f32[] {
  %x = (s32[], bf16[16,1024]) parameter(0)
  %g = f32[32,1024]{1,0} parameter(1)
  %l = f32[] parameter(2)
  %loop = (s32[], bf16[16,1024]) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scatter = f32[16,1024]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %permuted = f32[32,1024]{1,0} collective-permute(%g), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %to_all = (f32[8]{0}, f32[8]{0}) all-to-all(%l, %l), channel_id=10, replica_groups=[1,4]<=[4]
  %token = token[] after-all()
  %send = (f32[128]{0:T(128)}, u32[], token[]) send(%l, %token), channel_id=2, is_host_transfer=true
  ROOT %loss = f32[] all-reduce(%l), channel_id=8, replica_groups=[1,4]<=[2,2]T(1,0), to_apply=%add
}
"""


def test_bytes_of_every_kind():
    gathered, reduced = 32 * 1024 * 2, 32 * 1024 * 4
    assert collective_bytes(PROGRAM) == {
        "all-gather": 3 * gathered // 2,
        "reduce-scatter": reduced // 2,
        "collective-permute": reduced,
        "all-to-all": 48,
        "all-reduce": 2 * 3,
        BETWEEN_SLICES: 512,
    }


def test_a_scatter_in_its_own_words():
    text = """
ENTRY %main (g: f32[32]) -> f32[8] {
  %g = f32[32]{0} parameter(0)
  %pair = (f32[32]{0}, f32[64]{0}) all-gather-start(%g), channel_id=1, replica_groups={{0,1}}
  %move = (f32[32], f32[32], u32[], u32[]) collective-permute-start(%g), channel_id=3
  %both = (f32[32], f32[16]) all-reduce(%g, %g), channel_id=4, replica_groups={{0,1}}
  ROOT %part = f32[8]{0} reduce-scatter(%g), channel_id=2, replica_groups={{0,1,2,3}}
}
"""
    assert collective_bytes(text) == {
        "all-gather": 128,
        "reduce-scatter": 96,
        "collective-permute": 128,
        "all-reduce": 192,
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['a'=2,'b'=16,'c'=4] {'b'}", 16),
        ("mesh['a'=2,'b'=16,'c'=4], device_ids=([4,32]T(1,0)) {'b'}", 16),
        ("mesh['a'=2,'b'=16,'c'=4], device_ids=([8,2,8]T(2,0,1)) {'a', 'c'}", 8),
        ("mesh['a'=2,'b'=16] {'a', 'b':(1)4}", 8),
        ("mesh['a'=2,'b'=16], device_ids=([32]) {'b':(4)2}", 2),
        ("[32,4]<=[128]", 4),
        ("[32,4]<=[4,32]T(1,0)", 4),
    ],
)
def test_the_size_of_a_group(groups, size):
    text = f"""
ENTRY %main (g: f32[1024]) -> f32[1024] {{
  %g = f32[1024]{{0}} parameter(0)
  ROOT %sum = f32[1024]{{0}} all-reduce(%g), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert collective_bytes(text) == {"all-reduce": 2 * 4096 * (size - 1) // size}


def test_groups_in_another_notation_are_refused():
    text = """
ENTRY %main (g: f32[8]) -> f32[8] {
  %g = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%g), replica_groups=everyone
}
"""
    with pytest.raises(ValueError, match="no group of devices"):
        collective_bytes(text)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_matrices_are_gathered_but_by_all_of_sixty_four_chips():
    """Where weights move by all-reduces, see docs/scaling.md."""
    names = ["v5e:8x8@16", "v5e:8x8@64", "v5e:8x16@64"]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "gathered_parts.py", *names],
        env=tpu_compiler.environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    weights = 4 * 1152 * 1152 * 2
    assert found == {
        "v5e:8x8@16": {"all-gather": weights * 15 // 16},
        "v5e:8x8@64": {"all-reduce": 2 * weights * 63 // 64},
        "v5e:8x16@64": {"all-gather": weights * 63 // 64},
    }
