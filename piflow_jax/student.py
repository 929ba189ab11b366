"""A trained student in a notebook: `piflow_jax.load(path).sample(seed, labels or prompts)`.

Students are those of pi-Flow, arXiv 2510.14974; sampling is its Alg. 1.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from piflow_jax.flow.policies import Policy
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.flow.substeps import Solver
from piflow_jax.systems.networks import Network
from piflow_jax.systems.policies import policy_factory
from piflow_jax.systems.spec import StudentSettings

__all__ = ["Student"]

_LARGEST = 256  # samples a device draws at a time


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
        factory = policy_factory(self.settings.policy, self.settings.train, sampling=True)
        return factory(self.network.apply(params, x, t, labels), x, t)

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
          the host. They are split over `devices` if these divide their number.

        Raises:
          ValueError: the key, labels, `x` or `noise` are not what they should be, or a number is
            out of range: `nfe` below 1, `temperature` outside (0, 1].
        """
        train = self.settings.train
        condition = self.network.conditioning.checked(labels, self.settings.data)
        size = self._size(size)
        number = len(jax.tree.leaves(condition)[0])
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
            rows = functools.partial(_rows, part=part, padding=padding)
            batch = jax.tree.map(rows, {"condition": condition, **given})
            if mesh is not None:
                batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
            # Kernels split their batch over the mesh that is set.
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                samples = self._samplers[program](self.params, key, np.uint32(first), batch)
            parts.append((samples, length))
        return _joined(parts)

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if self.network.conditioning.reads_text:
            if size is None:
                raise ValueError(
                    "this student has no size of its own: pass size=(H, W) in sites of latents; "
                    "(128, 128) are 1024x1024 pixels"
                )
            return tuple(size)
        *sites, _ = self.settings.data.shape
        if size is not None and tuple(size) != tuple(sites):
            raise ValueError(f"size must be {tuple(sites)}, got {tuple(size)}")
        return tuple(sites)

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
            condition = batch["condition"]
            number = len(jax.tree.leaves(condition)[0])
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
                lambda x, sigma: self.policy(x, sigma, condition, params),
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
        on_host = np.asarray
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
