"""A trained student in a notebook: `piflow_jax.load(path).sample(seed, labels or prompts)`.

Students are those of pi-Flow, arXiv 2510.14974; sampling is its Alg. 1.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from piflow_jax.config import ModelConfig, parse
from piflow_jax.flow.policies import Policy
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.substeps import Solver
from piflow_jax.flow.teacher import Teacher
from piflow_jax.training.conditions import conditions
from piflow_jax.training.networks import (
    IMAGENET_LATENTS,
    TEXT_LATENTS,
    Network,
    StudentSettings,
    abstract_params,
    student_network,
    student_settings,
    teacher_network,
    teacher_settings,
    trained_part,
    with_base,
)
from piflow_jax.training.objectives import make_policy_factory

__all__ = ["Student", "load", "load_teacher"]

_LARGEST = 256  # samples a device draws at a time
# What embedded prompts hold, and how many axes each has.
_EMBEDDED = {"text": 3, "text_length": 1, "pooled": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A network that predicts policies, with its weights and the settings it was trained with.

    Attributes:
      module: the network.
      params: its averaged weights.
      settings: model, policy, training and data, as its checkpoint has them.
      devices: where `sample` runs; None is where `params` are. See `on`.
    """

    module: Network
    params: Any
    settings: StudentSettings
    devices: tuple[jax.Device, ...] | None = None
    _samplers: dict = dataclasses.field(default_factory=dict, repr=False)

    def on(self, devices: Sequence[jax.Device]) -> "Student":
        """The same student with a copy of its weights on each device.

        Its `sample` splits batches over them; samples stay the same, whatever their number.

        Args:
          devices: such as `jax.devices()`.

        Returns:
          The student.

        Raises:
          ValueError: there is no device.
        """
        devices = tuple(devices)
        if not devices:
            raise ValueError("devices must name at least one device")
        params = jax.device_put(self.params, NamedSharding(_mesh(devices), PartitionSpec()))
        return dataclasses.replace(self, params=params, devices=devices, _samplers={})

    def policy(
        self,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array | Mapping[str, jax.Array],
        params: Any = None,
    ) -> Policy:
        """One network evaluation; composes with jit, vmap, grad and shard_map.

        Args:
          x: `[B, H, W, C]`, states at `t`.
          t: `[B]`, noise levels in (0, 1].
          labels: `[B]`, integers; or embedded prompts, see `sample`.
          params: weights in place of the student's own, to differentiate by them for instance.

        Returns:
          The policy, for `piflow_jax.rollout(policy, x, ...)` from `t` down.

        Raises:
          ValueError: shapes do not belong together.
        """
        params = self.params if params is None else params
        factory = make_policy_factory(self.settings.policy, self.settings.train, sampling=True)
        batch = labels if isinstance(labels, Mapping) else {"label": labels}
        told = conditions(self.settings.model, batch)
        return factory(self.module.apply(params, x, t, **told), x, t)

    def sample(
        self,
        key: int | jax.Array,
        labels: ArrayLike | Mapping[str, ArrayLike],
        *,
        size: tuple[int, int] | None = None,
        nfe: int | None = None,
        substeps: int = 128,
        h: float = 0.0,
        temperature: float = 1.0,
        start: float = 1.0,
        x: ArrayLike | None = None,
        noise: ArrayLike | None = None,
        solver: Solver = "multistep",
    ) -> jax.Array:
        """Samples, one for each label or prompt.

        Sample `i` depends on the key, on `i` and on its label or prompt alone: not on how many
        others there are, nor on how many devices. Numbers of samples are rounded up to powers of
        two, at most 256 at a time on each device, so that at most nine programs are compiled for a
        choice of options and a size, however many samples are asked for. Arrays that are passed are
        left as they are.

        Args:
          key: a seed, or one PRNG key, typed or legacy.
          labels: `[N]`, integers in `[0, num_classes)`. Of a student that reads text, embedded
            prompts: `text[N, L, D]`, padded behind its `text_length[N]` tokens, and for FLUX.1
            `pooled[N, P]`. `PromptsSource.embedded` has them of a cached set.
          size: `(H, W)` in sites of latents, of a student that reads text: (128, 128) are 1024x1024
            pixels. Students of classes have one size.
          nfe: network evaluations, at least 1; by default as trained.
          substeps: policy substeps per unit of raw time.
          h: stochasticity between segments, see `few_step_sample`.
          temperature: of the mixture, in all segments but the last; in (0, 1], 1 leaves it.
          start: noise level at which to start, with `x`.
          x: `[N, H, W, C]`, clean images or latents of which noise is made up to `start`; without
            it sampling starts at pure noise.
          noise: `[N, H, W, C]`, initial latents: standard normal noise in place of the key's,
            which is float32 `normal(fold_in(key, i))` whatever the network's dtype.
          solver: of the policy's rollouts, `multistep`, or `euler` as in training; see `rollout`.

        Returns:
          `float32[N, H, W, C]`: images, about [-1, 1], or latents as networks see them. A
          number that one program makes, such as 64, is not waited for; others are put together on
          the host, then sent to one device.

        Raises:
          ValueError: the key, labels, `x` or `noise` are not what they should be, or a number is
            out of range: `nfe` below 1, `temperature` outside (0, 1].
        """
        train = self.settings.train
        told, size = self._told(labels), self._size(size)
        number = len(next(iter(told.values())))
        if (x is None) != (start == 1.0):
            raise ValueError("start below 1 and x go together")
        shape = (number, *size, self.settings.data.channels)
        given = {name: _checked(name, a, shape) for name, a in (("x", x), ("noise", noise))}
        given = {name: a for name, a in given.items() if a is not None}
        nfe = train.nfe if nfe is None else nfe
        options = (nfe, substeps, float(h), float(temperature), float(start), solver)
        program = (*options, size, *given)
        if program not in self._samplers:
            self._samplers[program] = jax.jit(self._sampler(*options, shape=shape[1:]))
        parts, key = [], _typed(key)
        mesh = None if self.devices is None else _mesh(self.devices)
        count = 1 if mesh is None else mesh.size
        for first in range(0, number, _LARGEST * count):
            part = slice(first, first + _LARGEST * count)
            length = len(range(number)[part])
            padding = count * (1 << (-(-length // count) - 1).bit_length()) - length
            batch = {
                name: np.pad(a[part], ((0, padding), *[(0, 0)] * (a.ndim - 1)), "edge")
                for name, a in (told | given).items()
            }
            if mesh is not None:
                batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
            # Kernels split their batch over the mesh that is set.
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                samples = self._samplers[program](self.params, key, np.uint32(first), batch)
            parts.append((samples, length))
        return _joined(parts)

    def _told(self, labels: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
        """What the network is told, checked, on the host."""
        model, data = self.settings.model, self.settings.data
        if model.network != "dit":
            names = list(_EMBEDDED)[: 3 if data.pooled_features else 2]
            if not isinstance(labels, Mapping) or not set(names) <= set(labels):
                raise ValueError(
                    f"this student reads text: pass embedded prompts, a mapping with "
                    f"{', '.join(names)}, such as PromptsSource.embedded(prompts)"
                )
            told = {name: np.asarray(labels[name]) for name in names}
            shapes = {name: list(a.shape) for name, a in told.items()}
            number = len(told["text"]) if told["text"].ndim else 0
            fits = all(a.ndim == _EMBEDDED[name] and len(a) == number for name, a in told.items())
            if not number or not fits or told["text"].shape[-1] != data.text_features:
                raise ValueError(
                    f"embedded prompts must be text[N, L, {data.text_features}], text_length[N]"
                    + (f", pooled[N, {data.pooled_features}]" if len(names) == 3 else "")
                    + f", got {shapes}"
                )
            return told
        if isinstance(labels, Mapping):
            raise ValueError("this student is told classes: pass labels, integers [N]")
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise ValueError(f"labels must be integers [N], got {labels.dtype}{list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= data.num_classes:
            raise ValueError(
                f"labels must be in [0, {data.num_classes}), got {labels.min()} to {labels.max()}"
            )
        return {"label": labels.astype(np.int32)}

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width, _ = self.settings.data.shape
        if self.settings.model.network != "dit":
            if size is None:
                raise ValueError(
                    "this student has no size of its own: pass size=(H, W) in sites of latents; "
                    "(128, 128) are 1024x1024 pixels"
                )
            return tuple(size)
        if size is not None and tuple(size) != (height, width):
            raise ValueError(f"size must be ({height}, {width}), got {tuple(size)}")
        return height, width

    def _sampler(
        self,
        nfe: int,
        substeps: int,
        h: float,
        temperature: float,
        start: float,
        solver: Solver,
        *,
        shape: tuple[int, int, int],
    ) -> Callable[..., jax.Array]:
        train = self.settings.train

        def sample(params, key, first, batch):
            told = {name: a for name, a in batch.items() if name not in ("x", "noise")}
            labels = told.get("label", told)
            number = len(next(iter(told.values())))
            keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(
                jnp.arange(number, dtype=jnp.uint32)
            )
            if "noise" in batch:
                noise = batch["noise"]
            else:
                # The stream of `index_noise`: a seed gives the samples that a report has measured.
                noise = jax.vmap(lambda one: jax.random.normal(one, shape, jnp.float32))(keys)
            if "x" in batch:
                noise = (1 - start) * batch["x"] + start * noise
            return few_step_sample(
                lambda x, sigma: self.policy(x, sigma, labels, params),
                noise,
                nfe,
                TimeWarp(train.shift),
                total_substeps=substeps,
                final_step_size_scale=train.final_step_size_scale,
                h=h,
                temperature=temperature,
                key=keys,
                start=start,
                solver=solver,
            )

        return sample


def load(
    path: str | os.PathLike,
    config: Any = None,
    dtype: str = "float32",
    teacher: str | os.PathLike | None = None,
) -> Student:
    """Loads a student.

    Args:
      path: a run's work directory, a directory of checkpoints, or a `.safetensors` file: one that
        `--mode=export` wrote, or an official one, for which `config` is needed.
      config: the `ConfigDict` of an official file, such as `configs.imagenet.get_config()`; other
        files know their settings.
      dtype: compute dtype of the network, `float32` or `bfloat16`; policies stay in float32, and
        weights in the types that they were trained in, the base of adapters or of a merged file in
        its own.
      teacher: of a student with adapters, whose checkpoints and adapter files hold no more than
        those: official weights of its teacher, or the work directory of the run that trained it. By
        default the teacher is that of the run at `path`.

    Returns:
      The student, on the default device.

    Raises:
      FileNotFoundError: there is nothing at the path.
      CheckpointError: the checkpoint is unusable, or not a student's.
      ValueError: the file is not a student's, `config` is missing or does not fit, or the teacher
        is missing or another one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint or file")
    if path.is_file():
        return _from_file(path, config, dtype, teacher)
    directory, step, spec, saved = _checkpoint(path, "student")
    settings, module = _network(student_settings(spec), dtype)
    trained = _averaged(directory, step, module)
    if settings.model.network == "dit":
        return Student(module, trained, settings)
    return _on_base(settings, trained, teacher or path, saved.get("model.base_dtype"))


def load_teacher(
    path: str | os.PathLike,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> tuple[Teacher, Any]:
    """Loads the teacher of a run.

    Args:
      path: a run's work directory, or a directory of checkpoints.
      guidance_scale: classifier-free guidance, 1 is none; a checkpoint does not know it.
      guidance_interval: noise levels at which to guide, both ends included.

    Returns:
      The teacher, whose conditions are labels `[B]`, and its averaged weights, on the default
      device: `teacher.velocity(params, x, t, labels)`.

    Raises:
      FileNotFoundError: there is nothing at the path.
      CheckpointError: the checkpoint is unusable.
      ValueError: the checkpoint is not a teacher's of classes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    directory, step, spec, _ = _checkpoint(path, "teacher")
    model, data = teacher_settings(spec)
    _check_labels(model)
    module = teacher_network(model, data)
    teacher = Teacher(
        predict=module.apply,
        shape=data.shape,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        null_cond=jnp.int32(data.num_classes),
    )
    return teacher, _averaged(directory, step, module)


def _checkpoint(path: Path, stage: str) -> tuple[Path, int, dict[str, Any], dict[str, Any]]:
    """Directory, step, spec and settings of the latest checkpoint of a run, or of a directory."""
    # Orbax takes a second to load, which a notebook without checkpoints need not wait for.
    from piflow_jax.training.checkpoint import read_spec

    places = (path / stage / "checkpoints", path / "checkpoints", path)
    directory = next((place for place in places if place.is_dir()), path)
    return directory, *read_spec(directory)


def _averaged(directory: Path, step: int, module: Network) -> Any:
    from piflow_jax.training.checkpoint import restore_subtree

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        trained_part(module, abstract_params(module)),
    )
    return restore_subtree(directory, "ema_params", like, step)


def _network(
    settings: StudentSettings, dtype: str, base_dtype: str | None = None
) -> tuple[StudentSettings, Network]:
    types = {"dtype": dtype} | ({} if base_dtype is None else {"base_dtype": base_dtype})
    model = dataclasses.replace(settings.model, **types)
    settings = dataclasses.replace(settings, model=model)
    return settings, student_network(model, settings.policy, settings.data)


def _check_labels(model: ModelConfig) -> None:
    """Refuses networks that are told more than labels."""
    if model.network != "dit":
        raise ValueError(
            f"this is a {model.network}, which reads text; sample it by --mode=sample and "
            "config.evaluation.system=teacher (docs/text_to_image.md)"
        )


def _on_base(
    settings: StudentSettings, trained: Any, teacher: str | os.PathLike, base_dtype: str | None
) -> Student:
    """A student with adapters on its teacher's variables, of `base_dtype` where that is known."""
    base, base_dtype = _base(settings, Path(teacher), base_dtype)
    settings, module = _network(settings, settings.model.dtype, base_dtype)
    return Student(module, with_base(module, trained, base), settings)


def _base(settings: StudentSettings, teacher: Path, base_dtype: str | None) -> tuple[Any, str]:
    """Variables of the teacher on which a student's adapters are put, and their type.

    Weights of a file take the type that the student was trained with, or else keep their own.
    """
    from piflow_jax.convert import load_params, open_weights

    model, data = settings.model, settings.data
    if any((teacher / place).is_dir() for place in ("teacher", "checkpoints")):
        directory, step, spec, saved = _checkpoint(teacher, "teacher")
        base_dtype = saved.get("model.base_dtype", model.base_dtype)
        types = {"dtype": model.dtype, "base_dtype": base_dtype}
        found, model = (
            dataclasses.replace(one, **types) for one in (teacher_settings(spec)[0], model)
        )
        module = teacher_network(model, data)
        if teacher_network(found, data) != module:
            raise ValueError(f"{directory} holds another network than the student's teacher")
        return _averaged(directory, step, module), base_dtype
    if (teacher / "student").is_dir() or not teacher.exists():
        raise ValueError(
            f"{teacher} holds adapters of a {model.network} and no teacher: pass teacher=, its "
            "official weights or the work directory of the run that trained it"
        )
    weights = open_weights(teacher)
    base_dtype = base_dtype or _type_of(weights)
    module = teacher_network(dataclasses.replace(model, base_dtype=base_dtype), data)
    return load_params(module, weights, model.network, _placed_like(module)), base_dtype


def _type_of(weights: Mapping[str, Any]) -> str:
    """The type in which a network of weights is kept: that of the largest of them."""
    largest = max(weights.values(), key=lambda array: math.prod(array.shape))
    return "bfloat16" if largest.dtype == jnp.bfloat16 else "float32"


def _placed_like(module: Network) -> Callable[[tuple[str, ...], np.ndarray], jax.Array]:
    """Puts leaves on the default device, in the types of the module's own parameters."""
    like = flatten_dict(abstract_params(module)["params"])
    return lambda name, leaf: jnp.asarray(leaf, like[name].dtype if name in like else None)


def _from_file(path: Path, config: Any, dtype: str, teacher: str | os.PathLike | None) -> Student:
    from piflow_jax.convert import load_adapter, load_params, open_weights

    weights = open_weights(path)
    spec = weights.metadata.get("piflow_jax")
    if spec is not None:
        settings = student_settings(json.loads(spec))
    elif config is not None:
        parsed = parse(config)
        network = parsed.model.network
        data = IMAGENET_LATENTS if network == "dit" else TEXT_LATENTS[network]
        settings = StudentSettings(
            model=parsed.model, policy=parsed.policy, train=parsed.train, data=data
        )
    else:
        raise ValueError(
            f"{path} does not say how its student samples; pass its configuration, such as "
            "config=configs.imagenet.get_config('gm_repa')"
        )
    base_dtype = None if spec is not None else settings.model.base_dtype
    settings, module = _network(settings, dtype)
    if any(".lora_A." in name for name in weights):
        if teacher is None:
            raise ValueError(f"{path} is an adapter: pass teacher=, the weights that it goes on")
        trained = load_adapter(module, weights, place=_placed_like(module))
        return _on_base(settings, trained, teacher, base_dtype)
    if settings.model.network != "dit":
        settings, module = _network(settings, dtype, base_dtype or _type_of(weights))
        module = module.clone(lora=None)  # the adapters are in the weights
    form = f"{settings.policy.kind}_{settings.model.network}"
    return Student(module, load_params(module, weights, form, _placed_like(module)), settings)


def _joined(parts: list[tuple[jax.Array, int]]) -> jax.Array:
    """The first samples of each part, in one array; of several processes each gets all of them.

    On the host: on a device every length would be a program of its own. What is whole is returned
    as it is, not waited for.
    """
    samples, length = parts[0]
    if len(parts) == 1 and length == len(samples) and samples.is_fully_addressable:
        return samples
    if samples.is_fully_addressable:
        for array, _ in parts:
            array.copy_to_host_async()
        on_host = np.asarray
    else:
        on_host = functools.partial(multihost_utils.process_allgather, tiled=True)
    whole = np.concatenate([on_host(array)[:length] for array, length in parts])
    # Where all of it was, or began. Arrays that are tied to no device stay so.
    device = samples.addressable_shards[0].device if samples.committed else None
    return jax.device_put(whole, device)


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def _checked(name: str, values: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The caller's array as float32 of a shape, on the host."""
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
    return values.astype(np.float32)


def _typed(key: int | jax.Array) -> jax.Array:
    """A typed key of a seed, a legacy key or a typed key."""
    if isinstance(key, int):
        return jax.random.key(key)
    array = jnp.asarray(key)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and not array.ndim:
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) and not array.ndim:
        return jax.random.key(array)
    if array.dtype == jnp.uint32 and array.ndim == 1:
        return jax.random.wrap_key_data(array)
    raise ValueError(
        f"key must be a seed or one PRNG key, got an array {array.dtype}{list(array.shape)}"
    )
