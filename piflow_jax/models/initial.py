"""Students that start at their teacher.

Parameters that both networks have are the teacher's. The student's output layer repeats the
teacher's, and only parameters that the teacher lacks are fresh. Source: pi-Flow, arXiv 2510.14974,
as released.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from piflow_jax.models.layers import xavier_uniform
from piflow_jax.models.lora import DOWN, TRAINED, UP, split

__all__ = ["initial_trained", "initialize_student", "student_from_teacher"]

# Settings in which networks with the same parameters may differ: their heads, and how they are
# computed.
FREE = ("head", "lora", "dtype", "param_dtype", "remat", "scan_unroll", "attention", "constrain")


def student_from_teacher(
    key: jax.Array,
    student: nn.Module,
    student_params: Mapping,
    teacher_params: Mapping,
    *,
    teacher: nn.Module | None = None,
) -> dict:
    """Starts a student at its teacher and draws the noise that separates mixture components.

    Args:
        key: Random key.
        student: The student's module.
        student_params: Fresh parameters of the student, as `student.init` returns them.
        teacher_params: Parameters of a teacher with a `VelocityHead`.
        teacher: The teacher's module. If given, settings that shapes do not show are compared too.

    Returns:
        Parameters of the student, see `initialize_student`.

    Raises:
        ValueError: Teacher and student differ; the message names the difference.
    """
    noise = _noise(key, student)
    return initialize_student(student, student_params, teacher_params, noise, teacher=teacher)


def initialize_student(
    student: nn.Module,
    student_params: Mapping,
    teacher_params: Mapping,
    noise: jax.Array | None,
    *,
    teacher: nn.Module | None = None,
) -> dict:
    """The deterministic part of `student_from_teacher`.

    Args:
        student: The student's module.
        student_params: Fresh parameters of the student. Only their dtypes are used, and the
            parameters that the teacher lacks (the first layer of the logstd head, the embedder of
            an input that it does not have).
        teacher_params: Parameters of a teacher with a `VelocityHead`.
        noise: `[K, C]` standard normal draws for a mixture head; None adds none.
        teacher: The teacher's module. If given, settings that shapes do not show are compared too.

    Returns:
        Parameters with the structure and dtypes of `student_params`. They share no buffer with
        either argument, so a training step may donate them.

    Raises:
        ValueError: Teacher and student differ; the message names the difference.
    """
    _check(student, student_params, teacher_params, teacher)
    return _at_teacher(student, student_params, teacher_params, noise)


def initial_trained(
    key: jax.Array,
    student: nn.Module,
    teacher_params: Mapping,
    *,
    teacher: nn.Module | None = None,
) -> dict:
    """Initial trained parameters of a student with adapters that starts at its teacher.

    No array of the base's size is created: a 12B student starts in the memory of its adapters.

    Args:
        key: Random key.
        student: A `Flux` or `QwenImage`, with or without `lora`.
        teacher_params: Parameters of the same network with a `VelocityHead` and without adapters.
        teacher: The teacher's module. If given, settings that shapes do not show are compared too.

    Returns:
        `{"params": ...}` for `merge`, with the dtypes of `student`'s own fresh parameters. It
        shares no buffer with the teacher, so a training step may donate it.

    Raises:
        ValueError: The teacher's parameters do not match the student's base.
    """
    shapes = jax.eval_shape(student.init, key, *student.example())
    _check(student, shapes, teacher_params, teacher)
    keys = jax.random.split(key, 3)
    fresh = split(shapes)[1]["params"]
    adapters = {name: tree for name, tree in fresh.items() if name not in TRAINED}
    if student.lora is not None:
        fresh |= _draw_adapters(keys[0], adapters, 1 / student.lora.rank)
    head = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fresh["head"])
    if "logstd_in" in head:  # the only fresh parameters of its own that a head keeps
        kernel = head["logstd_in"]["kernel"]
        head["logstd_in"]["kernel"] = xavier_uniform(keys[2], kernel.shape, kernel.dtype)
    noise = _noise(keys[1], student)
    return _at_teacher(student, {"params": fresh | {"head": head}}, teacher_params, noise)


def _noise(key: jax.Array, student: nn.Module) -> jax.Array | None:
    shape = student.head.noise_shape(student.in_channels)
    return None if shape is None else jax.random.normal(key, shape, jnp.float32)


def _draw_adapters(key: jax.Array, shapes: Mapping, spread: float) -> dict:
    """Down projections drawn from `N(0, spread^2)` and zero up projections."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = []
    for (path, leaf), its_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if path[-1].key == DOWN:
            drawn.append(spread * jax.random.normal(its_key, leaf.shape, leaf.dtype))
        else:
            drawn.append(jnp.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(tree, drawn)


def _at_teacher(
    student: nn.Module, fresh: Mapping, teacher_params: Mapping, noise: jax.Array | None
) -> dict:
    """Fresh parameters, replaced by the teacher's where it has them; the head repeats its head."""
    ours, theirs = fresh["params"], teacher_params["params"]
    # In bfloat16, rounding would lose the noise of the bias.
    output = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)),
        dict(theirs["head"]["output"]),
    )
    head = student.head.from_velocity(
        ours["head"], output, channels=student.in_channels, noise=noise
    )
    # Our tree, with their leaves wherever they have one.
    leaves = flatten_dict(theirs | {"head": head})
    started = {
        path: jnp.array(leaves.get(path, own), dtype=own.dtype, copy=True)
        for path, own in flatten_dict(ours).items()
    }
    return {"params": unflatten_dict(started)}


def _check(
    student: nn.Module, student_params: Mapping, teacher_params: Mapping, teacher: Any
) -> None:
    """Raises ValueError if the teacher cannot be the student's base; lists all differences."""
    theirs = teacher_params["params"]
    if set(theirs["head"]) != {"output"}:
        raise ValueError(f"head: the teacher needs a VelocityHead, it has {set(theirs['head'])}")
    ours, theirs = (
        {name: np.shape(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
        for params in (student_params["params"], theirs)
    )
    # A teacher that also predicts something else (say a variance) has a wider output layer.
    pixels = student.patch_size**2 * student.in_channels
    differences = {"head": ((pixels,), theirs["head/output/kernel"][-1:])}
    added = {field: layers for field, layers in student.addable.items() if getattr(student, field)}
    if teacher is not None:
        for field in dataclasses.fields(student):
            if field.init and field.name not in (*FREE, *added, "parent", "name"):
                pair = (getattr(module, field.name, None) for module in (student, teacher))
                differences[field.name] = tuple(pair)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs and name.split("/")[0] in sum(added.values(), ()):
            continue
        if not name.startswith("head/") and name.split("/")[-1] not in (DOWN, UP):
            differences[name] = (ours.get(name), theirs.get(name))
    lines = [f"{name}: student {a}, teacher {b}" for name, (a, b) in differences.items() if a != b]
    if lines:
        raise ValueError("teacher and student differ in:\n  " + "\n  ".join(lines))
