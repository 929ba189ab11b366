"""A trained student in a notebook: `piflow_jax.load(path).sample(seed, labels or prompts)`.

Students are those of pi-Flow, arXiv 2510.14974; sampling is its Alg. 1.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from piflow_jax.arguments import ROUNDING, check_between, check_no_pixels, check_number, whole
from piflow_jax.config import PolicyConfig, TrainConfig
from piflow_jax.exported import write_exported
from piflow_jax.flow.policies import Policy
from piflow_jax.flow.rollout import Implementation
from piflow_jax.flow.substeps import Solver, check_substeps
from piflow_jax.keys import as_key, index_keys, index_noise
from piflow_jax.systems.datasets import class_names
from piflow_jax.systems.network import Network
from piflow_jax.systems.policies import POLICIES
from piflow_jax.systems.sampling import (
    sampling_cautions,
    student_policy,
    student_rollout,
    student_sampler,
    student_times,
)
from piflow_jax.systems.segments import said_evaluations
from piflow_jax.systems.spec import StudentSettings

__all__ = ["Student"]

_LARGEST = 256  # samples a device draws at a time
_PROGRAMS = 16  # choices of options whose programs are kept


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A network that predicts policies, with its weights and the settings it was trained with.

    Attributes:
      network: the network.
      params: its averaged weights.
      settings: model, policy, training and data, as its checkpoint has them.
      devices: where `sample` runs; None is where `params` are. See `on`.
    """

    network: Network
    params: Any
    settings: StudentSettings
    devices: tuple[jax.Device, ...] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels; their numbers where none are known."""
        return class_names(self.settings.data)

    def __repr__(self) -> str:
        """What the student is, in five lines; weights are not shown."""
        settings = self.settings
        data, policy, train = settings.data, settings.policy, settings.train
        plural = "s" * (train.evaluations != (1,))
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        shape = "of any size" if self.network.conditioning.reads_text else f"{list(data.shape)}"
        return (
            f"Student(\n"
            f"  network: {settings.model.network}, {count:,} parameters\n"
            f"  policy: {policy.kind}, trained for {said_evaluations(train)} evaluation{plural}\n"
            f"  samples: {data.name}, {shape}, {data.num_classes} classes\n"
            f")"
        )

    def on(self, devices: Sequence[jax.Device]) -> "Student":
        """The same student with a copy of its weights on each device.

        Its `sample` splits batches over them; samples stay the same, whatever their number.

        Args:
          devices: such as `jax.devices()`.

        Returns:
          The student.

        Raises:
          ValueError: there is no device, or one twice.
        """
        devices = tuple(devices) if isinstance(devices, Sequence) else (devices,)
        if not devices:
            raise ValueError("devices must name at least one device")
        strangers = [device for device in devices if not isinstance(device, jax.Device)]
        if strangers or len(set(devices)) != len(devices):
            raise ValueError(f"devices must be different devices of JAX, got {list(devices)}")
        params = jax.device_put(self.params, NamedSharding(_mesh(devices), PartitionSpec()))
        return dataclasses.replace(self, params=params, devices=devices)

    def policy(
        self,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array | Mapping[str, jax.Array] | None,
        params: Any = None,
        guidance: ArrayLike | None = None,
    ) -> Policy:
        """One network evaluation; composes with jit, vmap, grad and shard_map.

        Args:
          x: `[B, *sites, C]`, states at `t`.
          t: `[B]`, or one for all: noise levels in (0, 1]; traced ones are not checked.
          labels: `[B]`, integers in `[0, num_classes]`, of which the last is the null label (others
            give NaN if traced); or embedded prompts, see `sample`; None without conditions.
          params: weights in place of the student's own, to differentiate by them for instance.
          guidance: a number or `[B]`, see `sample`; traced ones are not checked.

        Returns:
          The policy, for `Student.rollout` from `t` down.

        Raises:
          ValueError: shapes do not belong together, `x` is uint8, known labels or noise levels are
            out of range, or the student does not take a guidance scale.
        """
        labels = self.network.conditioning.guided(labels, guidance)
        params = self.params if params is None else params
        x, t = (a if isinstance(a, jax.Array) else np.asarray(a) for a in (x, t))
        check_no_pixels("x", x)
        check_between("t", t, 0, 1, open_low=True, slack=ROUNDING)
        t = jnp.broadcast_to(t, np.shape(x)[:1]) if np.ndim(t) == 0 else t
        predict = student_policy(self.network, self.settings.policy, self.settings.train)
        return predict(params, x, t, labels)

    def rollout(
        self,
        policy: Policy,
        x: jax.Array,
        t_start: ArrayLike = 1.0,
        t_end: ArrayLike = 0.0,
        *,
        substeps: int = 128,
        solver: Solver = "multistep",
    ) -> jax.Array:
        """Integrates a policy without the network, as `sample` does.

        Args:
          policy: from `policy`.
          x: `[B, *sites, C]`, states at `t_start`.
          t_start: `[B]`, or one for all: noise levels in [0, 1].
          t_end: `[B]`, or one for all, not above `t_start`.
          substeps: see `sample`.
          solver: see `sample`.

        Returns:
          `[B, *sites, C]`, states at `t_end`.

        Raises:
          ValueError: see `piflow_jax.rollout`, which takes raw times and a time warp.
        """
        for name, t in (("t_start", t_start), ("t_end", t_end)):
            check_between(name, t, 0, 1, slack=ROUNDING)
        return student_rollout(self.settings.train, policy, x, t_start, t_end, substeps, solver)

    def sample(
        self,
        key: int | jax.Array,
        labels: ArrayLike | Mapping[str, ArrayLike],
        *,
        references: Sequence[ArrayLike] | None = None,
        size: tuple[int, int] | None = None,
        nfe: int | None = None,
        substeps: int = 128,
        h: float = 0.0,
        temperature: float = 1.0,
        start: float = 1.0,
        x: ArrayLike | None = None,
        noise: ArrayLike | None = None,
        solver: Solver = "multistep",
        guidance: ArrayLike | None = None,
    ) -> jax.Array:
        """Samples, one for each label or prompt.

        Sample `i` depends on the key, on `i` and on its label or prompt alone: not on how many
        others there are, nor on how many devices. At most 256 samples are drawn at a time on each
        device, and their number is rounded up to a power of two. So a choice of `nfe`, `substeps`,
        `solver` and size compiles at most nine programs, however many samples are asked for and
        whatever the other numbers are, and as many again with `x`, with `noise` and with both.
        Programs of the last 16 choices are kept. Arrays that are passed are left as they are. A
        mesh that is set has no influence.

        Args:
          key: a seed, or one PRNG key, typed or legacy. The generator is Threefry, whatever JAX's
            default is. An `rbg` key gives the samples of the seed that it was made from.
          labels: `[N]`, integers in `[0, num_classes)`. Without conditions, the number `N` of
            samples; with conditions of your own, arrays `[N, ...]`. For a student that reads text,
            embedded prompts: `text[N, L, D]`, padded behind its `text_length[N]` tokens, and for
            FLUX.1 `pooled[N, P]`. `PromptsSource.embedded` reads them from a cached set.
          references: for a student that edits images, the reference images, each of its own size:
            `[N, h, w, C]`, or `[h, w, C]` for all samples, in the space of the samples.
            `piflow_jax.models.vae.picture_encoder` makes latents of pictures. By default those in
            `labels`, where `PromptsSource.embedded` puts the references of a cached set.
          size: for a student that reads text, height and width `(H, W)` of the latents: (128, 128)
            gives 1024x1024 pixels. Students with class labels have one size.
          nfe: network evaluations, at least 1; by default as trained. Other numbers, and a `start`
            below 1, may lead to noise levels at which the network was not trained, with a warning.
          substeps: policy substeps per unit of raw time. A segment's number of them is rounded up,
            as in the pi-Flow release. With `solver="euler"` and 128, samples are the release's.
          h: stochasticity between segments, see `few_step_sample`; none with one evaluation.
          temperature: of the mixture, in all segments but the last; in (0, 1], 1 changes nothing.
          start: noise level at which to start, with `x`.
          x: `[N, H, W, C]`, clean images, about [-1, 1], or latents. Noise is added to them up to
            the level `start`. Without `x`, sampling starts at pure noise.
          noise: `[N, H, W, C]`, initial latents: standard normal noise in place of the key's,
            which is float32 `normal(fold_in(key, i))` whatever the network's dtype.
          solver: of the policy's rollouts, `multistep`, or `euler` as in training; see `rollout`.
          guidance: guidance scale, a number or `[N]`, for a student trained with
            `config.teacher.guidance_range`, by default `config.teacher.guidance_scale`. A scale
            outside it gives a warning. For FLUX.1 and FLUX.2 [dev], the distilled guidance.

        Returns:
          `float32[N, H, W, C]`: images, about [-1, 1], or latents as networks see them. A number
          that one program makes, such as 64, is returned before it is computed; others are put
          together on the host. They are split over `devices` if these divide their number.

        Raises:
          ValueError: the key, labels, `x` or `noise` have a wrong type, shape or value, a number is
            out of range, the student does not take `guidance`, or the call is traced.
        """
        if references is not None:
            if not isinstance(labels, Mapping):
                raise ValueError("references are for a student that reads text: see labels")
            labels = {**labels, "references": references}
        labels = self.network.conditioning.guided(labels, guidance)
        values = (key, labels, x, noise, h, temperature, start)
        traced = any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(values))
        key = None if traced else as_key(key)
        if traced or isinstance(key, jax.core.Tracer):
            raise ValueError(
                "sample compiles programs of its own and cannot be traced: under jit, vmap or grad "
                "call few_step_sample with the student's policy"
            )
        condition, number = self.network.conditioning.checked(labels, self.settings.data)
        size = self._size(size)
        check_number("start", start, 0, 1, open_low=True)
        if (x is None) != (start == 1.0):
            raise ValueError("start below 1 and x go together")
        if x is not None:
            check_no_pixels("x", np.asarray(x))
        shape = (number, *size, self.settings.data.channels)
        given = {name: _checked(name, a, shape) for name, a in (("x", x), ("noise", noise))}
        given = {name: a for name, a in given.items() if a is not None}
        w = condition["guidance"] if self.network.conditioning.guidance else ()
        choice, numbers = self._choice(shape[1:], nfe, substeps, solver, h, temperature, start, w)
        program = _program(*choice)
        parts = []
        mesh = None if self.devices is None else _mesh(self.devices)
        count = 1 if mesh is None else mesh.size
        # Kernels split their batch over the mesh that is set, which is not the caller's.
        with jax.set_mesh(mesh):
            for first in range(0, number, _LARGEST * count):
                part = slice(first, first + _LARGEST * count)
                length = len(range(number)[part])
                padding = count * (1 << (-(-length // count) - 1).bit_length()) - length
                rows = functools.partial(_rows, part=part, padding=padding)
                batch = jax.tree.map(rows, {"condition": condition, **given})
                places = np.arange(first, first + length + padding, dtype=np.uint32)
                where = mesh and NamedSharding(mesh, PartitionSpec("data"))
                batch, places = jax.device_put((batch, places), where)
                others = jax.device_put(numbers)
                parts.append((program(self.params, key, batch, places, *others), length))
            return _joined(parts)

    def export(
        self,
        path: str | os.PathLike,
        *,
        nfe: int | None = None,
        substeps: int = 128,
        solver: Solver = "multistep",
        size: tuple[int, int] | None = None,
        text_length: int = 512,
        platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
        batch: int | None = None,
    ) -> None:
        """Writes the sampler in one file: a program for the given platforms, and the weights.

        `piflow_jax.load_exported(path).sample(key, labels)` makes the samples of `sample` without
        Flax and without this package's networks. Rollouts are plain loops: the kernels, which are
        faster, are programs of one platform. JAX reads an exported program for six months, see
        `piflow_jax.exported`.

        Args:
          path: the file; one that exists is replaced.
          nfe: see `sample`.
          substeps: see `sample`.
          solver: see `sample`.
          size: see `sample`.
          text_length: for a student that reads text, the number of tokens of a prompt.
          platforms: where it is to run, names of `jax.export`: `cpu`, `cuda`, `rocm`, `tpu`.
          batch: number of samples per program; None compiles one program for each number.

        Raises:
          ValueError: a number is out of range, a platform is unknown or has no lowering for this
            network.
          OSError: the folder is not there or cannot be written to.
        """
        attention = self.settings.model.attention
        if attention != "default":
            raise ValueError(
                f"config.model.attention = {attention!r} runs on one platform only: load the "
                "student with 'default' to export it"
            )
        conditioning, data = self.network.conditioning, self.settings.data
        shape = (*self._size(size), data.channels)
        choice, numbers = self._choice(shape, nfe, substeps, solver)
        sampler = _sampler(*choice, implementation="scan")
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.params)
        name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        example = conditioning.example(data, 1, whole("text_length", text_length, 1))
        if isinstance(example, Mapping) and "references" in example:
            raise ValueError(
                "this student edits images, and exported samplers take no references: write its "
                "weights by --mode=export"
            )
        # Conditions whose arrays have names of their own, unlike labels.
        named_by_caller = isinstance(example, Mapping) or bool(data.conditions)
        named = isinstance(example, Mapping) or conditioning.guidance > 0
        # Text in float32, which is its own in bfloat16.
        condition = {
            k: np.zeros(a.shape, np.float32 if a.dtype == jnp.bfloat16 else a.dtype)
            for k, a in (example if isinstance(example, Mapping) else {"labels": example}).items()
            if a is not None
        }
        whole_condition = conditioning.checked(condition, data)[0] if named else condition
        added = {k: float(a[0]) for k, a in whole_condition.items() if k not in condition}

        def sample(weights, key, places, condition):
            params = jax.tree.unflatten(tree, [weights[name(path)] for path, _ in leaves])
            batch = {"condition": condition if named else condition.get("labels")}
            return sampler(params, as_key(key), batch, places, *numbers)

        write_exported(
            path,
            sample,
            {name(path): leaf for path, leaf in leaves},
            whole_condition,
            platforms=platforms,
            batch=None if batch is None else whole("batch", batch, 1),
            settings={
                "shape": shape,
                "nfe": choice[4],
                "substeps": choice[5],
                "solver": solver,
                "num_classes": 0 if named_by_caller else data.num_classes,
                "defaults": added,
                "guidance_range": self.settings.teacher.guidance_range,
            },
        )

    def _choice(
        self,
        shape: tuple[int, ...],
        nfe: int | None,
        substeps: int,
        solver: Solver,
        h: float = 0.0,
        temperature: float = 1.0,
        start: float = 1.0,
        guidance: ArrayLike = (),
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What a program is made of, see `_sampler`, and the numbers that are its arguments."""
        policy, train = self.settings.policy, self.settings.train
        nfe = whole("nfe", train.nfe if nfe is None else nfe, 1)
        substeps = check_substeps(substeps, solver)
        times = student_times(train, nfe, h, start)
        check_number("temperature", temperature, 0, 1, open_low=True)
        sharpened = np.float32(temperature)
        if not POLICIES[policy.kind].tempered:
            if temperature != 1:
                raise ValueError(f"this student's policy ({policy.kind}) has no temperature")
            sharpened = None
        scales = self.settings.teacher.guidance_range
        for caution in sampling_cautions(train, nfe, h, temperature, start, guidance, scales):
            warnings.warn(caution, stacklevel=3)
        choice = (self.network, policy, train, shape, nfe, substeps, solver)
        return choice, (times, sharpened, np.float32(start))

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if self.network.conditioning.reads_text:
            if size is None:
                raise ValueError(
                    "this student has no size of its own: pass size=(H, W), the height and width "
                    "of the latents; (128, 128) gives 1024x1024 pixels"
                )
            if np.shape(size) != (2,):
                raise ValueError(f"size must be (H, W), got {size!r}")
            return tuple(whole("size", side, 1) for side in size)
        *sites, _ = self.settings.data.shape
        if size is not None and (np.ndim(size) != 1 or tuple(size) != tuple(sites)):
            raise ValueError(f"size must be {tuple(sites)}, got {size!r}")
        return tuple(sites)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: weights on the host. Devices do not travel."""
        return vars(self) | {"params": jax.device_get(self.params), "devices": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The student on the default device."""
        vars(self).update(state | {"params": jax.device_put(state["params"])})


def _sampler(
    network: Network,
    policy: PolicyConfig,
    train: TrainConfig,
    shape: tuple[int, ...],
    nfe: int,
    substeps: int,
    solver: Solver,
    implementation: Implementation = "auto",
) -> Callable[..., jax.Array]:
    """The sampler of a choice, for any weights and numbers; `nfe` is how many times it takes."""
    sampler = student_sampler(
        network, policy, train, substeps=substeps, solver=solver, implementation=implementation
    )

    def sample(params, key, batch, places, times, temperature, start):
        keys = index_keys(key, places)
        noise = batch["noise"] if "noise" in batch else index_noise(keys, shape)
        if "x" in batch:
            noise = (1 - start) * batch["x"] + start * noise
        temperature = 1.0 if temperature is None else temperature
        return sampler(params, noise, batch["condition"], times, temperature, keys)

    return sample


@functools.lru_cache(maxsize=_PROGRAMS)
def _program(*choice: Any) -> Callable[..., jax.Array]:
    """The jitted sampler of a choice.

    All that it depends on is in its arguments. Programs that were not used for long are let go,
    which is why `nfe` is among these.
    """
    return jax.jit(_sampler(*choice))


def _rows(array: np.ndarray, part: slice, padding: int) -> np.ndarray:
    """Some rows of an array, the last of them repeated."""
    return np.pad(array[part], ((0, padding), *[(0, 0)] * (array.ndim - 1)), "edge")


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
        on_host = jax.device_get
    else:
        on_host = functools.partial(multihost_utils.process_allgather, tiled=True)
    whole = np.concatenate([on_host(array)[:length] for array, length in parts])
    # Where it was, split as it was if that goes. Arrays that are tied to no device stay so.
    place = samples.sharding if samples.committed else None
    if len(whole) % len(samples.sharding.device_set) or not samples.is_fully_addressable:
        place = samples.addressable_shards[0].device
    return jax.device_put(whole, place)


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def _checked(name: str, values: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The caller's array as float32 of a shape, on the host."""
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
    check_between(name, values)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    check_between(name, values)
    return values
