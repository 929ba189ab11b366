"""A trained student in a notebook: `piflow_jax.load(path).sample(seed, labels)`."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from piflow_jax.config import parse
from piflow_jax.flow.policies import Policy
from piflow_jax.flow.sampling import few_step_sample
from piflow_jax.flow.schedule import TimeWarp
from piflow_jax.models import DiT
from piflow_jax.training.networks import (
    IMAGENET_LATENTS,
    StudentSettings,
    abstract_params,
    student_network,
    student_settings,
)
from piflow_jax.training.objectives import make_policy_factory

__all__ = ["Student", "load"]

_LARGEST = 256
_SIZES = ("patch_size", "in_channels", "hidden", "depth", "mlp_ratio", "num_classes")


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A network that predicts policies, with its weights and the settings it was trained with.

    Attributes:
      module: the network.
      params: its averaged weights.
      settings: model, policy, training and data, as its checkpoint has them.
    """

    module: DiT
    params: Any
    settings: StudentSettings
    _samplers: dict = dataclasses.field(default_factory=dict, repr=False)

    def policy(self, x: jax.Array, t: jax.Array, labels: jax.Array, params: Any = None) -> Policy:
        """One network evaluation; composes with jit, vmap, grad and shard_map.

        Args:
          x: `[B, H, W, C]`, states at `t`.
          t: `[B]`, noise levels in (0, 1].
          labels: `[B]`, integers.
          params: weights in place of the student's own, to differentiate by them for instance.

        Returns:
          The policy, for `piflow_jax.rollout(policy, x, ...)` from `t` down.
        """
        params = self.params if params is None else params
        factory = make_policy_factory(self.settings.policy, self.settings.train, sampling=True)
        return factory(self.module.apply(params, x, t, labels), x, t)

    def sample(
        self,
        key: int | jax.Array,
        labels: ArrayLike,
        *,
        nfe: int | None = None,
        substeps: int = 128,
        h: float = 0.0,
        temperature: float = 1.0,
        start: float = 1.0,
        x: ArrayLike | None = None,
    ) -> jax.Array:
        """Samples, one for each label.

        Sample `i` depends on the key, on `i` and on its label alone: not on how many others there
        are. Numbers of samples are rounded up to powers of two, at most 256 at a time, so that few
        programs are compiled however many are asked for.

        Args:
          key: a seed, or a PRNG key, typed or legacy.
          labels: `[N]`, integers in `[0, num_classes)`.
          nfe: network evaluations; by default as trained.
          substeps: policy substeps per unit of raw time.
          h: stochasticity between segments, see `few_step_sample`.
          temperature: of the mixture, in all segments but the last.
          start: noise level at which to start, with `x`.
          x: `[N, H, W, C]`, clean images or latents of which noise is made up to `start`; without
            it sampling starts at pure noise.

        Returns:
          `float32[N, H, W, C]`: images, about [-1, 1], or latents as networks see them.

        Raises:
          ValueError: labels, `x` or a number are not what they should be.
        """
        train, data = self.settings.train, self.settings.data
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise ValueError(f"labels must be integers [N], got {labels.dtype}{list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= data.num_classes:
            raise ValueError(
                f"labels must be in [0, {data.num_classes}), got {labels.min()} to {labels.max()}"
            )
        if (x is None) != (start == 1.0):
            raise ValueError("start below 1 and x go together")
        x = np.zeros((len(labels), *data.shape), np.float32) if x is None else np.asarray(x)
        if x.shape != (len(labels), *data.shape):
            raise ValueError(f"x must be {[len(labels), *data.shape]}, got {list(x.shape)}")
        options = (nfe or train.nfe, substeps, float(h), float(temperature), float(start))
        if options not in self._samplers:
            self._samplers[options] = jax.jit(self._sampler(*options))
        parts, key = [], _typed(key)
        for first in range(0, len(labels), _LARGEST):
            part = slice(first, first + _LARGEST)
            count = len(labels[part])
            padding = (1 << (count - 1).bit_length()) - count
            parts.append(
                self._samplers[options](
                    self.params,
                    key,
                    np.uint32(first),
                    np.pad(labels[part].astype(np.int32), (0, padding), "edge"),
                    np.pad(x[part].astype(np.float32), ((0, padding), *[(0, 0)] * 3)),
                )[:count]
            )
        return jnp.concatenate(parts)

    def _sampler(
        self, nfe: int, substeps: int, h: float, temperature: float, start: float
    ) -> Callable[..., jax.Array]:
        train = self.settings.train

        def sample(params, key, first, labels, x):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(
                jnp.arange(len(labels), dtype=jnp.uint32)
            )
            # The stream of `index_noise`: a seed gives the samples that a report has measured.
            noise = jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], jnp.float32))(keys)
            return few_step_sample(
                lambda x, sigma: self.policy(x, sigma, labels, params),
                (1 - start) * x + start * noise,
                nfe,
                TimeWarp(train.shift),
                total_substeps=substeps,
                final_step_size_scale=train.final_step_size_scale,
                h=h,
                temperature=temperature,
                key=keys,
                start=start,
            )

        return sample


def load(path: str | os.PathLike, config: Any = None, dtype: str = "float32") -> Student:
    """Loads a student.

    Args:
      path: a run's work directory, a directory of checkpoints, or a `.safetensors` file: one that
        `--mode=export` wrote, or an official one, for which `config` is needed.
      config: the `ConfigDict` of an official file, such as `configs.imagenet.get_config()`; other
        files know their settings.
      dtype: compute dtype of the network, `float32` or `bfloat16`; policies stay in float32.

    Returns:
      The student, on the default device.

    Raises:
      FileNotFoundError: there is nothing at the path.
      CheckpointError: the checkpoint is unusable, or not a student's.
      ValueError: the file is not a student's, or `config` is missing or does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint or file")
    if path.is_file():
        return _from_file(path, config, dtype)
    # Orbax takes a second to load, which a notebook without checkpoints need not wait for.
    from piflow_jax.training.checkpoint import read_spec, restore_subtree

    places = (path / "student" / "checkpoints", path / "checkpoints", path)
    directory = next((place for place in places if place.is_dir()), path)
    step, spec, _ = read_spec(directory)
    settings, module = _network(student_settings(spec), dtype)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(module),
    )
    return Student(module, restore_subtree(directory, "ema_params", like, step), settings)


def _network(settings: StudentSettings, dtype: str) -> tuple[StudentSettings, DiT]:
    model = dataclasses.replace(settings.model, dtype=dtype)
    settings = dataclasses.replace(settings, model=model)
    return settings, student_network(model, settings.policy, settings.data)


def _from_file(path: Path, config: Any, dtype: str) -> Student:
    from piflow_jax.convert import load_torch_state, open_weights

    weights = open_weights(path)
    spec = weights.metadata.get("piflow_jax")
    if spec is not None:
        settings = student_settings(json.loads(spec))
    elif config is not None:
        parsed = parse(config)
        settings = StudentSettings(
            model=parsed.model, policy=parsed.policy, train=parsed.train, data=IMAGENET_LATENTS
        )
    else:
        raise ValueError(
            f"{path} does not say how its student samples; pass its configuration, such as "
            "config=configs.imagenet.get_config('gm_repa')"
        )
    settings, module = _network(settings, dtype)
    _, params = load_torch_state(
        weights,
        f"{settings.policy.kind}_dit",
        num_heads=module.num_heads,
        sample_size=module.sample_size,
        time_scale=module.time_scale,
        place=lambda _, leaf: jnp.asarray(leaf, jnp.float32),
        **{size: getattr(module, size) for size in _SIZES},
    )
    return Student(module, params, settings)


def _typed(key: int | jax.Array) -> jax.Array:
    """A typed key of a seed, a legacy key or a typed key."""
    if isinstance(key, int | np.integer):
        return jax.random.key(key)
    key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
