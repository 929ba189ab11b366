"""Students and teachers from checkpoints and weight files, for notebooks.

Files are this package's own, or those of the pi-Flow release (arXiv 2510.14974).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from piflow_jax import hub
from piflow_jax.arguments import check_choice, lora_strengths, prefixed
from piflow_jax.config import ModelConfig, PolicyConfig, parse
from piflow_jax.exported import DESCRIPTION
from piflow_jax.flow.teacher import Schedule, Teacher
from piflow_jax.loading.loras import fine_tuned
from piflow_jax.loading.shipped import located_weights, shipped_names
from piflow_jax.loading.weights import (
    averaged,
    converted,
    find_checkpoint,
    saved_base_dtype,
)
from piflow_jax.runs.workdir import user_path
from piflow_jax.student import Student
from piflow_jax.systems.network import Network
from piflow_jax.systems.networks import (
    in_few_bits,
    network_kind,
    official_data,
    student_network,
    teacher_network,
)
from piflow_jax.systems.own import OwnNetwork, own_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import (
    StudentSettings,
    check_policy_config,
    spaces_in,
    spec_of,
    student_settings,
    teacher_settings,
    trained_with,
    updated_settings,
)

__all__ = ["load", "load_teacher", "shipped_names"]


def load(
    path: str | os.PathLike,
    config: Any = None,
    dtype: str = "float32",
    teacher: str | os.PathLike | Teacher | None = None,
    network: Any = None,
    loras: Any = None,
    download: bool = False,
) -> Student:
    """Loads a student.

    Every argument that takes a file or folder of weights also takes a name on the Hugging Face hub:
    `hf:owner/name`, `hf:owner/name/folder` or `hf:owner/name@revision/folder`.

    Args:
      path: the name of a shipped student, one of `shipped_names()`; a run's work directory, a
        directory of checkpoints, one of their steps; or a `.safetensors` file or its folder: what
        `--mode=export` wrote, or an official one, for which `config` is needed.
      config: the `ConfigDict` of an official file, such as `configs.imagenet.get_config()`; other
        files know their settings.
      dtype: compute dtype of the network, `float32` or `bfloat16`. Policies stay in float32.
        Weights keep the dtypes of their training, and a frozen base that of its file or run. A
        network of your own has its own.
      teacher: for a student with adapters, whose checkpoint or file holds only the adapters:
        official weights of its teacher, or the work directory of the run that trained the teacher.
        By default, the teacher of the run at `path`. For a network of your own whose teacher has a
        `Schedule` made from your own functions: that `Teacher`.
      network: for a network of your own, the one that was passed to `distill`, or the function that
        makes it, `config.model.network` of its run. A function that a file names is never imported.
      loras: for a student with adapters, LoRA files to add to the official weights of its teacher:
        strengths by path, or paths (`path@strength`). Names may be those of `peft`, `diffusers`,
        kohya's scripts or ComfyUI.
      download: first download what `path`, `teacher` and `loras` name on the hub and the cache
        lacks; by default only the cache is read.

    Returns:
      The student, on the default device.

    Raises:
      FileNotFoundError: there is nothing at the path, or the hub's cache does not have it.
      OSError: the bucket or the hub cannot be read; says why, and the remedy.
      CheckpointError: the checkpoint is unusable, or not a student's.
      ValueError: the file is not a student's, `config` is missing or does not fit, `dtype` is none
        of the two, the teacher is missing or another one, or a LoRA file does not fit it.
    """
    dtype = _compute_dtype(dtype)
    if download:
        _fetch(path, teacher, *lora_strengths(loras or {}))
    path, is_weights = located_weights(path, "student")
    if is_weights:
        if network is not None:
            raise ValueError(f"{path}: network= is for a run of a network of your own")
        return _from_file(path, config, dtype, teacher, loras)
    directory, step, spec, saved = find_checkpoint(path, "student")
    with prefixed(directory):
        settings = trained_with(student_settings(spec), saved)
        if network is not None or _is_own(settings.model):
            if dtype != "float32":
                raise ValueError(
                    f"dtype = {dtype!r}: a network of your own computes in its own dtype"
                )
            network = _own(settings, network, teacher)
        else:
            settings, network = _network(settings, dtype)
    trained = averaged(directory, network, step)
    if not network.adapted:
        _no_loras(loras)
        return Student(network, trained, settings)
    own = updated_settings(saved).get("teacher.loras")
    if own and loras is None:
        raise ValueError(
            f"{directory}: its teacher had LoRA files of its own ({', '.join(own)}): pass loras= "
            "with them, or {} if teacher= has them already"
        )
    return _on_base(settings, trained, teacher or path, saved_base_dtype(saved), loras)


def _fetch(*paths: Any) -> None:
    """Downloads what is named on the hub."""
    for path in paths:
        if isinstance(path, str | os.PathLike) and hub.is_name(path):
            hub.fetch(path, hub.NETWORK)


def _compute_dtype(dtype: Any) -> str:
    """The name of a type to compute in."""
    with contextlib.suppress(TypeError):
        dtype = jnp.dtype(dtype).name
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    return dtype


def load_teacher(
    path: str | os.PathLike,
    *,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    network: Any = None,
) -> tuple[Teacher, Any]:
    """Loads a teacher that was trained here.

    Args:
      path: the name of a shipped student, for its teacher; a run's work directory, a directory of
        checkpoints, or one of their steps; or the `teacher.safetensors` that `--mode=export` wrote.
      guidance_scale: classifier-free guidance, 1 is none. By default, the scale with which the run
        distilled its student. Without a student, as with a file, there is no guidance.
      guidance_interval: noise levels at which to guide, both ends included; by default likewise.
      network: see `load`.

    Returns:
      The teacher, whose conditions are labels `[B]`, and its averaged weights, on the default
      device: `teacher.velocity(params, x, t, labels)`.

    Raises:
      FileNotFoundError: there is nothing at the path.
      OSError: the bucket cannot be read; says why, and the remedy.
      CheckpointError: the checkpoint is unusable.
      ValueError: it is not a teacher's of classes, or the file is damaged.
    """
    from piflow_jax.convert import open_weights

    path, is_weights = located_weights(path, "teacher")
    run, weights, step = path, None, None
    if is_weights:
        weights = open_weights(path)
        with prefixed(path):
            spec = spec_of(weights.metadata)
            if spec is None:
                raise ValueError(
                    "the file does not say what its network is; "
                    "piflow_jax.load_torch_state reads official weights"
                )
    else:
        path, step, spec, _ = find_checkpoint(path, "teacher")
    with prefixed(path):
        model, data = teacher_settings(spec)
        own = network is not None or _is_own(model)
        network = _own_of(model, network, data) if own else teacher_network(model, data)
    if network.conditioning.reads_text:
        raise ValueError(
            f"this is a {model.network}, which reads text; sample it by --mode=sample and "
            "config.evaluation.system=teacher (docs/text_to_image.md)"
        )
    given = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
    guidance = {} if is_weights else _guidance(run)
    guidance |= {key: v for key, v in given.items() if v is not None}
    teacher = Teacher(
        predict=network.apply,
        shape=data.shape,
        **guidance,
        null_cond=network.conditioning.null(data, None),
    )
    if weights is None:
        return teacher, averaged(path, network, step)
    with prefixed(path):
        return teacher, converted(weights, network, model.network)


def _is_own(model: ModelConfig) -> bool:
    return network_kind(model).of_caller


def _own(settings: StudentSettings, given: Any, teacher: Any) -> OwnNetwork:
    """A student's network of a caller's making, asked as it was in training."""
    network = _own_of(settings.model, given, settings.data, settings.policy)
    if not settings.asked:
        return network
    schedule = settings.asked.get("schedule")
    if schedule is not None:
        asked = Teacher(
            predict=None,
            shape=None,
            prediction=settings.asked.get("prediction"),
            schedule=Schedule.made(*schedule),
        )
    elif isinstance(teacher, Teacher):
        asked = teacher.as_asked()
    else:
        raise ValueError(
            "its teacher has a schedule of functions of your own: pass teacher=, that Teacher"
        )
    return dataclasses.replace(network, asked=asked)


def _own_of(
    model: ModelConfig, given: Any, data: DataShape, policy: PolicyConfig | None = None
) -> OwnNetwork:
    """The network of a caller's making."""
    if not _is_own(model):
        raise ValueError(f"network= is for a network of your own, this holds a {model.network}")
    if given is None:
        raise ValueError(f"its network is {model.network}: pass network=, that module or function")
    return own_network(model.network, given, data, policy)


def _guidance(path: epath.Path) -> dict[str, Any]:
    """How the teacher of a run was guided when its student was taught; empty if that is not known.

    The teacher's own checkpoints do not know: it was trained without.
    """
    from piflow_jax.runs.checkpoint import read_spec
    from piflow_jax.runs.steps import latest_step

    # The path may lead to the run's teacher, to its checkpoints, or to one of their steps.
    above = [one.parent for one in (path, *list(path.parents)[:2]) if one.name == "teacher"]
    places = [run / "student" / "checkpoints" for run in (path, *above)]
    directory = next((place for place in places if latest_step(place) is not None), None)
    if directory is None:
        return {}
    _, _, saved = read_spec(directory)
    found = {
        name: saved.get(f"teacher.{name}")
        for name in ("guidance_scale", "guidance_interval", "orthogonal_guidance")
    }
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def _network(
    settings: StudentSettings, dtype: str, base_dtype: str | None = None
) -> tuple[StudentSettings, Network]:
    types = {"dtype": dtype, "base_dtype": base_dtype}
    settings = dataclasses.replace(settings, model=_typed(settings.model, **types))
    model = settings.model
    return settings, student_network(model, settings.policy, settings.data, settings.teacher)


def _typed(model: ModelConfig, *, dtype: str, base_dtype: str | None = None) -> ModelConfig:
    """A network's settings with other types."""
    if base_dtype is not None:
        own = dataclasses.replace(model.own, base_dtype=base_dtype)
        model = dataclasses.replace(model, **{model.network: own})
    return dataclasses.replace(model, dtype=dtype)


def _on_base(
    settings: StudentSettings,
    trained: Any,
    teacher: str | os.PathLike,
    base_dtype: str | None,
    loras: Any,
) -> Student:
    """A student with adapters on its teacher's variables, of `base_dtype` where that is known."""
    base, base_dtype = _base(
        settings, user_path(teacher, of_weights=True), base_dtype, lora_strengths(loras or {})
    )
    settings, network = _network(settings, settings.model.dtype, base_dtype)
    return Student(network, network.with_base(trained, base), settings)


def _base(
    settings: StudentSettings,
    teacher: epath.Path,
    base_dtype: str | None,
    loras: dict[str, float],
) -> tuple[Any, str]:
    """Variables of the teacher on which a student's adapters are put, and their type.

    Weights of a file take the type that the student was trained with, or else keep their own.
    """
    from piflow_jax.convert import open_weights

    model, data = settings.model, settings.data
    if any((teacher / place).is_dir() for place in ("teacher", "checkpoints")):
        _no_loras(loras)
        directory, step, spec, saved = find_checkpoint(teacher, "teacher")
        if not in_few_bits(base_dtype):
            base_dtype = saved_base_dtype(saved) or model.own.base_dtype
        types = {"dtype": model.dtype, "base_dtype": base_dtype}
        found, model = (_typed(one, **types) for one in (teacher_settings(spec)[0], model))
        network = teacher_network(model, data)
        if teacher_network(found, data) != network:
            raise ValueError(f"{directory} holds another network than the student's teacher")
        return averaged(directory, network, step), base_dtype
    if (teacher / "student").is_dir() or not teacher.exists():
        raise ValueError(
            f"{teacher} holds adapters of a {model.network} and no teacher: pass teacher=, its "
            "official weights or the work directory of the run that trained it"
        )
    weights = open_weights(teacher)
    base_dtype = base_dtype or _type_of(weights)
    network = teacher_network(_typed(model, dtype=model.dtype, base_dtype=base_dtype), data)
    with prefixed(teacher):
        weights = fine_tuned(weights, network, model.network, loras, of_student=True)
        return converted(weights, network, model.network), base_dtype


def _no_loras(loras: Any) -> None:
    if loras:
        raise ValueError(
            "loras= are added to the official weights of a student's teacher: the student must "
            "have adapters, and teacher= be such weights"
        )


def _type_of(weights: Mapping[str, Any]) -> str:
    """The type in which a network of weights is kept: that of the largest of them."""
    largest = max(weights.values(), key=lambda array: math.prod(array.shape))
    # Every number of a float8 is one of bfloat16.
    return "float32" if largest.dtype.itemsize > 2 or largest.dtype == np.float16 else "bfloat16"


def _from_file(
    path: epath.Path, config: Any, dtype: str, teacher: str | os.PathLike | None, loras: Any
) -> Student:
    from piflow_jax.convert import is_adapter, open_weights

    weights = open_weights(path)
    with prefixed(path):
        if DESCRIPTION in weights.metadata:
            raise ValueError("a sampler of Student.export: piflow_jax.load_exported reads it")
        adapter, spec = is_adapter(weights), spec_of(weights.metadata)
        if spec is not None:
            settings = student_settings(spec)
            settings = dataclasses.replace(settings, trained_in=spaces_in(weights.metadata))
        elif config is not None:
            parsed = parse(config)
            settings = StudentSettings.of(parsed, official_data(parsed))
            policy_config = weights.metadata.get("policy_config")
            check_policy_config(policy_config, settings.policy, settings.train)
        else:
            raise ValueError(
                "the file does not say how its student samples; pass its configuration, such as "
                "config=configs.imagenet.get_config('gm_repa')"
            )
        base_dtype = getattr(settings.model.own, "base_dtype", None) if spec is None else None
        settings, network = _network(settings, dtype)
        if adapter and teacher is None:
            raise ValueError("an adapter: pass teacher=, the weights that it goes on")
        if network.adapted and not adapter:  # the adapters are in the weights
            settings, network = _network(settings, dtype, base_dtype or _type_of(weights))
            network = dataclasses.replace(network, module=network.module.clone(lora=None))
        params = converted(weights, network, f"{settings.policy.kind}_{settings.model.network}")
    if not adapter:
        _no_loras(loras)
        return Student(network, params, settings)
    return _on_base(settings, params, teacher, base_dtype, loras)
