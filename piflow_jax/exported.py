"""A student's sampler as a file that needs neither Flax nor this package's networks.

The file is a `.safetensors` file. It holds a program of `jax.export` (StableHLO for several
platforms) as the bytes of the tensor `program`, the weights, which are arguments of the program,
and a description of its other arguments in JSON, as the metadata `piflow_jax_sampler`.

A release of JAX reads programs that were exported up to six months before it. For later releases,
export the student again. Its checkpoint can be read by all of them.

Source: sampling is Alg. 1 of pi-Flow, arXiv 2510.14974.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export
from jax.typing import ArrayLike

from piflow_jax.arguments import (
    as_dtype,
    check_between,
    class_labels,
    guidance_cautions,
    guidance_scales,
    prefixed,
    whole,
)
from piflow_jax.keys import as_key
from piflow_jax.safetensors_files import open_safetensors, write_safetensors

__all__ = ["DESCRIPTION", "ExportedStudent", "load_exported", "write_exported"]

DESCRIPTION = "piflow_jax_sampler"
"""The key of the description in a file's metadata."""

_PROGRAM = "program"
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}  # their backends
_LARGEST = 256  # samples of one call


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedStudent:
    """A student's sampler from a file of `Student.export`.

    Attributes:
      settings: what it was exported with: `nfe`, `substeps`, `solver`, `shape` of a sample, the
        `condition`'s arrays, `num_classes`, `platforms` and the `jax` that exported it.
      weights: arrays by name, on the default device.
      program: `(weights, key, places, condition) -> samples`, jitted: `key` is the key's two words
        `uint32[2]`, `places[B]` the samples' numbers `uint32`, `condition` arrays by name.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, jax.Array]
    program: Callable[..., jax.Array]

    def sample(
        self,
        key: int | jax.Array,
        labels: ArrayLike | Mapping[str, ArrayLike],
        guidance: ArrayLike | None = None,
    ) -> jax.Array:
        """Draws the samples that `Student.sample` draws with the same key and conditions.

        A program is compiled for each number of samples, and at most 256 are drawn at a time. If
        the student was exported with a batch size, there is one program, for that number.

        Args:
          key: a seed, or one PRNG key, typed or legacy.
          labels: `[N]`, integers in `[0, num_classes)`. Without conditions, the number `N`. For
            other students, the arrays of `settings["condition"]` by name, such as embedded prompts.
          guidance: a number or `[N]`, see `Student.sample`.

        Returns:
          `float32[N, *sites, C]`.

        Raises:
          ValueError: the key or the conditions have a wrong type, shape or value, the student does
            not take `guidance`, or the call is traced.
        """
        condition, number = self._checked(labels, guidance)
        words, batch = jax.random.key_data(as_key(key)), self.settings["batch"]
        parts = []
        for first in range(0, number, batch or _LARGEST):
            length = min(number - first, batch or _LARGEST)
            places = np.arange(first, first + (batch or length), dtype=np.uint32)
            rows = {name: a[np.minimum(places, number - 1)] for name, a in condition.items()}
            parts.append(self.program(self.weights, words, places, rows)[:length])
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _checked(self, given: Any, guidance: Any) -> tuple[dict[str, np.ndarray], int]:
        """Conditions by name, in the types that the program takes, and their number."""
        wanted, defaults = self.settings["condition"], self.settings["defaults"]
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((given, guidance))):
            raise ValueError("sample cannot be traced: under jit, call program")
        if guidance is not None and "guidance" not in wanted:
            raise ValueError("this sampler does not take a guidance scale: leave guidance out")
        if not wanted:
            return {}, whole("the number of samples", given, 1)
        classes = self.settings["num_classes"]
        named = isinstance(given, Mapping) and (not classes or "labels" in given)
        given = {**defaults, **(given if named else {"labels": given})}
        if guidance is not None:
            given["guidance"] = guidance
        if not wanted.keys() <= given.keys():
            raise ValueError(f"conditions are arrays by name: {', '.join(wanted)}")
        if classes:
            given["labels"] = class_labels(given["labels"], classes)
        arrays = {
            name: as_dtype(name, np.asarray(given[name]), np.dtype(dtype))
            for name, (dtype, _) in wanted.items()
        }
        number = max(len(a) if a.ndim else 0 for name, a in arrays.items() if name not in defaults)
        for name, (_, shape) in wanted.items():
            if name in defaults:  # of guidance
                arrays[name] = guidance_scales(arrays[name], number)
            if not number or arrays[name].shape != (number, *shape):
                axes, found = ", ".join(map(str, ("N", *shape))), list(arrays[name].shape)
                raise ValueError(f"{name} must be [{axes}], got {found}")
        for name in defaults:
            # Older files do not say for which scales the student was trained.
            for caution in guidance_cautions(arrays[name], self.settings.get("guidance_range", ())):
                warnings.warn(caution, stacklevel=3)
        if {"text", "text_length"} <= wanted.keys():
            check_between("text_length", arrays["text_length"], 0, arrays["text"].shape[1])
        return arrays, number


def load_exported(path: str | os.PathLike) -> ExportedStudent:
    """Loads a student's sampler from a file of `Student.export`.

    Args:
      path: the file, on a disk or in a bucket.

    Returns:
      The sampler, its weights on the default device.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another file, damaged, or was exported for other platforms or by a JAX whose
        programs this one does not read.
    """
    path = epath.Path(path).expanduser()
    arrays, metadata = open_safetensors(path)
    if DESCRIPTION not in metadata or _PROGRAM not in arrays:
        raise ValueError(f"{path} is no file of Student.export; piflow_jax.load reads weight files")
    settings = json.loads(metadata[DESCRIPTION])
    if jax.default_backend() not in [_PLATFORMS[name] for name in settings["platforms"]]:
        raise ValueError(
            f"{path} was exported for {', '.join(settings['platforms'])}, here is "
            f"{jax.default_backend()}: export it with that among platforms"
        )
    try:
        program = jax_export.deserialize(bytearray(np.asarray(arrays.pop(_PROGRAM)).tobytes()))
    except Exception as error:
        raise ValueError(
            f"{path} holds a program of jax {settings['jax']}, which jax {jax.__version__} does "
            f"not read ({error}): export the student anew"
        ) from error
    weights = {name: jnp.asarray(np.asarray(array)) for name, array in arrays.items()}
    return ExportedStudent(settings, weights, jax.jit(program.call))


def write_exported(
    path: str | os.PathLike,
    sampler: Callable[..., jax.Array],
    weights: Mapping[str, Any],
    example: Mapping[str, np.ndarray],
    *,
    platforms: Sequence[str],
    batch: int | None,
    settings: Mapping[str, Any],
) -> None:
    """Writes the file of `load_exported`; see `Student.export`.

    Args:
      path: the file; one that exists is replaced.
      sampler: `(weights, key, places, condition) -> samples`, see `ExportedStudent`.
      weights: arrays by name.
      example: arrays `[1, ...]` like the conditions of one sample.
      platforms: for which it is lowered.
      batch: samples of one call; None for any number.
      settings: what else the file says of itself.

    Raises:
      ValueError: a platform is unknown, or the sampler cannot be lowered for one.
    """
    unknown = sorted(set(platforms) - set(_PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"platforms are some of {', '.join(_PLATFORMS)}, got {unknown or 'none'}")
    numbers = batch or jax_export.symbolic_shape("b")[0]
    conditions = {
        name: jax.ShapeDtypeStruct((numbers, *array.shape[1:]), array.dtype)
        for name, array in example.items()
    }
    like = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()}
    words = [jax.ShapeDtypeStruct((size,), np.uint32) for size in (2, numbers)]
    # The hint of `in_place` to TPUs. A compiler that does not know it may ignore it.
    hint = jax_export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    exporting = jax_export.export(
        jax.jit(sampler), platforms=tuple(platforms), disabled_checks=[hint]
    )
    refused = f"cannot export for {', '.join(platforms)}"
    with prefixed(refused, (NotImplementedError, ValueError)):
        exported = exporting(like, *words, conditions)
    condition = {name: (array.dtype.name, array.shape[1:]) for name, array in example.items()}
    description = {**settings, "condition": condition, "batch": batch}
    description |= {"platforms": list(platforms), "jax": jax.__version__}
    tensors = {**weights, _PROGRAM: np.frombuffer(exported.serialize(), np.uint8)}
    path = epath.Path(path).expanduser()
    write_safetensors(path, tensors, {DESCRIPTION: json.dumps(description)})
