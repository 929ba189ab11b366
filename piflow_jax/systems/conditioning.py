"""Conditioning of networks: classes, text, a user's own arrays, or nothing.

A *condition* is the value under `condition` in an example of a source. It is either labels `int[B]`
or embedded captions. Captions are a mapping of `text[B, L, D]`, padded behind its `text_length[B]`
tokens, and `pooled[B, P]` if the encoders make one. For editing it holds `references`, a tuple of
reference images `[B, h, w, C]` in the space of samples, and `null`, the empty caption's entries
where an encoder of text has seen the references. All code except the network passes a condition on
unchanged. A `Conditioning` turns it into the keyword arguments of one of our networks.

Some networks take a guidance scale as an input: FLUX.1, FLUX.2 [dev], and students that were
trained for a range of scales. Their condition is a mapping, which may hold `guidance[B]`, and
`labels[B]` for networks with classes. `Conditioning.guided` adds the scale. Without it, the scale
is the network's default.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from piflow_jax.arguments import (
    as_dtype,
    check_between,
    check_no_pixels,
    class_labels,
    guidance_scales,
    whole,
)
from piflow_jax.flow.guidance import Null, nothing_of
from piflow_jax.systems.shapes import DataShape

_CLASSES = "this student is conditioned on classes: pass labels, integers [N]"
_PLAIN = "a condition must be an array of numbers, or a mapping of such arrays"
_NO_GUIDANCE = (
    "this student does not take a guidance scale: leave guidance out, or train a student with "
    "config.teacher.guidance_range"
)

Condition = Any
"""Arrays `[B, ...]` in any structure."""


class Conditioning(abc.ABC):
    """Turns conditions into the arguments of a network.

    Attributes:
      reads_text: True if conditions are embedded captions. Samples then have no size of their own.
      references: largest number of reference images of a sample; 0 if the network edits no images.
      guidance: default of the guidance scale that the network takes; 0 if it has no such input.
      guidance_range: smallest and largest scale of training; empty for a single one.
    """

    reads_text: ClassVar[bool] = False
    references = 0
    guidance: float = 0.0
    guidance_range: tuple[float, ...] = ()

    @abc.abstractmethod
    def __call__(self, condition: Condition) -> dict[str, jax.Array]:
        """The network's keyword arguments."""

    def null(self, data: DataShape, caption: Condition | None) -> Null | None:
        """The null condition; `caption` is the empty caption of a set of captions."""
        return caption

    @abc.abstractmethod
    def example(self, data: DataShape, batch: int, length: int) -> Condition:
        """Shapes of a condition; `length` is the number of tokens of text."""

    @abc.abstractmethod
    def checked(self, condition: Condition, data: DataShape) -> tuple[Condition, int]:
        """A caller's condition as arrays on the host, and the number of samples that it describes.

        A ValueError says what the condition should be.
        """

    def guided(self, condition: Condition, scale: ArrayLike | None) -> Condition:
        """The condition with a guidance scale, a number or `[B]`; None leaves the default.

        Raises ValueError if the network has no such input.
        """
        if scale is None:
            return condition
        if not self.guidance:
            raise ValueError(_NO_GUIDANCE)
        named = condition if isinstance(condition, Mapping) else {"labels": condition}
        return {**named, "guidance": scale}

    def _scales(self, condition: Condition, number: int) -> jax.Array:
        """The guidance scales `[number]` of a condition, for the network; checked if known."""
        scale = condition.get("guidance", self.guidance)
        check_between("guidance", scale, 0)
        return jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (number,))

    def _checked_scales(self, condition: Condition, number: int) -> np.ndarray:
        """The guidance scales `[number]` of a caller's condition, on the host."""
        return guidance_scales(condition.get("guidance", self.guidance), number)


@dataclasses.dataclass(frozen=True)
class ClassLabels(Conditioning):
    """Labels in `[0, num_classes)`; label `num_classes` is the null label.

    Attributes:
      guidance: see `Conditioning`.
      guidance_range: see `Conditioning`.
    """

    guidance: float = 0.0
    guidance_range: tuple[float, ...] = ()

    def _named(self, condition):
        """Labels, and a guidance scale if the condition has one, by name."""
        if not isinstance(condition, Mapping):
            return {"labels": condition}
        if "labels" not in condition:
            raise ValueError(_CLASSES)
        if not self.guidance:
            raise ValueError(_NO_GUIDANCE if "guidance" in condition else _CLASSES)
        return condition

    def __call__(self, condition):
        """See `Conditioning`."""
        named = self._named(condition)
        labels = named["labels"]
        labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        if not self.guidance:
            return {"labels": labels}
        if labels.ndim != 1:
            raise ValueError(f"labels must be [B], got {list(labels.shape)}")
        return {"labels": labels, "guidance": self._scales(named, labels.shape[0])}

    def null(self, data, caption):
        """See `Conditioning`."""
        return np.int32(data.num_classes)

    def example(self, data, batch, length):
        """See `Conditioning`."""
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def checked(self, condition, data):
        """See `Conditioning`."""
        named = self._named(condition)
        labels = class_labels(named["labels"], data.num_classes)
        number = len(labels)
        if not self.guidance:
            return labels, number
        return {"labels": labels, "guidance": self._checked_scales(named, number)}, number


@dataclasses.dataclass(frozen=True)
class Unconditional(Conditioning):
    """Samples without a condition. The caller gives their number instead."""

    def __call__(self, condition):
        """See `Conditioning`."""
        return {}

    def null(self, data, caption):
        """See `Conditioning`."""

    def example(self, data, batch, length):
        """See `Conditioning`."""

    def checked(self, condition, data):
        """See `Conditioning`."""
        return None, whole("the number of samples", condition, 1)


@dataclasses.dataclass(frozen=True)
class Arrays(Conditioning):
    """Arrays of any names and shapes, for networks of a user's own; see `DataShape.conditions`."""

    def __call__(self, condition):
        """See `Conditioning`; a condition that is a single array is named `condition`."""
        return dict(condition) if isinstance(condition, Mapping) else {"condition": condition}

    def example(self, data, batch, length):
        """See `Conditioning`."""
        # Checkpoints name the caller's dtype. JAX computes in 32 bits where float64 is not enabled.
        shapes = {
            name: jax.ShapeDtypeStruct((batch, *shape), jax.dtypes.canonicalize_dtype(dtype))
            for name, dtype, shape in map(_read, data.conditions)
        }
        return shapes.get("", shapes)

    def checked(self, condition, data):
        """See `Conditioning`."""
        wanted = {name: (dtype, shape) for name, dtype, shape in map(_read, data.conditions)}
        given = condition if isinstance(condition, Mapping) else {"": condition}
        arrays = {name: np.asarray(values) for name, values in given.items()}
        number = min((len(a) if a.ndim else 0 for a in arrays.values()), default=0)
        fits = arrays.keys() == wanted.keys() and all(
            a.shape == (number, *wanted[name][1]) for name, a in arrays.items()
        )
        if not (fits and number):
            shapes = {name: list(a.shape) for name, a in arrays.items()}
            axes = {name: ["N", *shape] for name, (_, shape) in wanted.items()}
            raise ValueError(f"conditions must be arrays {axes} with one N, got {shapes}")
        arrays = {
            name: as_dtype(name or "condition", a, wanted[name][0]) for name, a in arrays.items()
        }
        return arrays.get("", arrays), number


def described(condition: Condition) -> tuple[str, ...]:
    """Names, dtypes and shapes of one example's condition; see `DataShape.conditions`."""
    arrays = condition if isinstance(condition, Mapping) else {"": condition}
    try:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
    except ValueError as error:  # ragged
        raise ValueError(f"{_PLAIN}: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biufV" or array.dtype.names:  # V: those of ml_dtypes
            raise ValueError(f"{_PLAIN}: {name or 'the condition'} is of dtype {array.dtype}")
    return tuple(f"{name}:{a.dtype}:{'x'.join(map(str, a.shape))}" for name, a in arrays.items())


def _read(text: str) -> tuple[str, np.dtype, tuple[int, ...]]:
    name, dtype, shape = text.rsplit(":", 2)
    return name, jnp.dtype(dtype), tuple(int(size) for size in shape.split("x") if size)


def conditioning_of(data: DataShape) -> Conditioning:
    """The conditioning of a user's own network, from the conditions of its data."""
    if data.conditions:
        return Arrays()
    return ClassLabels() if data.num_classes else Unconditional()


@dataclasses.dataclass(frozen=True)
class Text(Conditioning):
    """Embedded captions.

    Attributes:
      pooled: the network also takes the pooled embedding.
      masked: padding is hidden from the network; otherwise the network reads all of the text.
      guidance: distilled guidance scale for the network; 0 if it has no such input.
      references: see `Conditioning`.
    """

    pooled: bool = False
    masked: bool = False
    guidance: float = 0.0
    references: int = 0
    reads_text = True

    @property
    def _axes(self) -> dict[str, int]:
        """Entries of captions, with the number of axes of each."""
        return {"text": 3, "text_length": 1} | ({"pooled": 2} if self.pooled else {})

    def _check(self, condition):
        if not isinstance(condition, Mapping) or not self._axes.keys() <= condition.keys():
            raise ValueError(
                "this student reads text: pass embedded prompts, a mapping with "
                f"{', '.join(self._axes)}, such as PromptsSource.embedded(prompts)"
            )
        references = condition.get("references", ())
        if not isinstance(references, Sequence):
            raise ValueError(
                "references must be a list of arrays, one for each reference image, got "
                f"{type(references).__name__}"
            )
        if len(references) > self.references:
            raise ValueError(
                f"this network takes at most {self.references} reference images, got "
                f"{len(references)}: its `references` in config.model says for how many it is"
            )

    def __call__(self, condition):
        """See `Conditioning`."""
        self._check(condition)
        text = jnp.asarray(condition["text"])
        arguments = {"text": text}
        if self.masked:
            positions = jnp.arange(text.shape[1])[None, :]
            arguments["mask"] = positions < jnp.asarray(condition["text_length"])[:, None]
        if self.pooled:
            arguments["pooled"] = jnp.asarray(condition["pooled"])
        if self.guidance > 0:
            arguments["guidance"] = self._scales(condition, text.shape[0])
        if condition.get("references"):
            arguments["references"] = tuple(map(jnp.asarray, condition["references"]))
        return arguments

    def null(self, data, caption):
        """See `Conditioning`; references stay, and a condition's own `null` comes first."""
        if caption is None:
            return None
        return functools.partial(_unprompted, {name: caption[name] for name in self._axes})

    def example(self, data, batch, length):
        """See `Conditioning`."""
        shapes = {
            "text": jax.ShapeDtypeStruct((batch, length, data.text_features), jnp.bfloat16),
            "text_length": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }
        if data.pooled_features:
            shapes["pooled"] = jax.ShapeDtypeStruct((batch, data.pooled_features), jnp.float32)
        if self.references:
            reference = jax.ShapeDtypeStruct((batch, *data.shape), jnp.float32)
            shapes["references"] = (reference,) * self.references
        return shapes

    def checked(self, condition: Mapping[str, ArrayLike], data: DataShape):
        """See `Conditioning`."""
        self._check(condition)
        axes = self._axes
        arrays = {name: np.asarray(condition[name]) for name in axes}
        number = len(arrays["text"]) if arrays["text"].ndim else 0
        fits = all(a.ndim == axes[name] and len(a) == number for name, a in arrays.items())
        if not number or not fits or arrays["text"].shape[-1] != data.text_features:
            shapes = {name: list(a.shape) for name, a in arrays.items()}
            raise ValueError(
                f"embedded prompts must be text[N, L, {data.text_features}], text_length[N]"
                + (f", pooled[N, {data.pooled_features}]" if self.pooled else "")
                + f", got {shapes}"
            )
        lengths = arrays["text_length"]
        if not np.issubdtype(lengths.dtype, np.integer):
            raise ValueError(f"text_length must be integers [N], got {lengths.dtype}")
        check_between("text_length", lengths, 0, arrays["text"].shape[1])
        for name in axes.keys() - {"text_length"}:
            check_between(name, arrays[name])
        if self.guidance > 0:
            arrays["guidance"] = self._checked_scales(condition, number)
        if condition.get("references"):
            arrays["references"] = tuple(
                _checked_reference(f"references[{i}]", reference, number, data.channels)
                for i, reference in enumerate(condition["references"])
            )
        return arrays, number


def _unprompted(caption: Condition, condition: Condition) -> Condition:
    """The conditions `[B, ...]` without their prompts."""
    given = {name: condition[name] for name in caption}
    null = condition.get("null")
    return {**condition, **(nothing_of(given, caption) if null is None else null)}


def _checked_reference(name: str, values: ArrayLike, number: int, channels: int) -> np.ndarray:
    """A reference image of each sample, float32 on the host."""
    given = values = np.asarray(values)
    check_no_pixels(name, values)
    if values.ndim == 3:  # one for all samples
        values = np.broadcast_to(values, (number, *values.shape))
    if values.ndim != 4 or values.shape[-1] != channels or len(values) != number:
        pictures = ", and pictures become latents by piflow_jax.models.vae.picture_encoder"
        raise ValueError(
            f"{name} must be [{number}, h, w, {channels}] or [h, w, {channels}] like samples"
            f"{pictures if channels > 4 else ''}, got {list(given.shape)}"
        )
    check_between(name, values)
    return values.astype(np.float32)
