"""Cached prompts: the text encoders' embeddings, and the latents of images and references.

A set is a `ShardedSet` (see `piflow_jax.data.shards`) with the manifest `prompts.json`: which
encoders and list, how many prompts of each aspect ratio. A record is a `.safetensors` file of one
prompt: its text tokens in bfloat16, as many as there are and not padded, the pooled embedding where
the encoders make one, the prompt itself, and an image's latents where the list names images. The
last record is the empty prompt, for guidance.

A prompt that edits images also has the latents of these references and their names. If the text
encoder has seen the references, it has the empty prompt's tokens with them too.

Prompts of one aspect ratio and of references of the same sizes, a bucket, stand together, in the
order of their list. So what bucket a prompt is in is known without reading it.

Source: the caches of pi-Flow (arXiv 2510.14974, section 5.2), made once before training.
"""

import bisect
import collections
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Collection, Sequence
from typing import Any, SupportsIndex

import ml_dtypes
import numpy as np
from etils import epath

from piflow_jax.buckets import located
from piflow_jax.data.plans import Plan
from piflow_jax.data.records import Records
from piflow_jax.data.shards import ShardedSet, ShardsError
from piflow_jax.data.source import stacked

__all__ = [
    "MANIFEST",
    "NAME",
    "PromptTexts",
    "PromptsError",
    "PromptsPlan",
    "PromptsSource",
    "load_prompts_source",
]

NAME = "prompts"
MANIFEST = "prompts.json"

_TEXT_DTYPE = ml_dtypes.bfloat16
# Latents are a few standard deviations: float16 keeps three more bits of them than bfloat16.
_LATENTS_DTYPE = np.float16
# Of the autoencoders of FLUX.1 and Qwen-Image.
_LATENT_CHANNELS = 16
_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "I32": np.int32,
    "U8": np.uint8,
}


class PromptsError(ShardsError):
    """A cached set of prompts is unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsPlan(Plan):
    """What a set is, fixed before its first shard is written.

    `num_examples` is one more than there are prompts: the last record is the empty prompt.

    Attributes:
      encoder: Identity of the text encoders, a hash of their weights and how they are used.
      compute: How they were evaluated, for the record.
      source: What the prompts are, with a hash of their list.
      buckets: `(H, W)` of latents, one for each aspect ratio.
      bucket_sizes: Number of prompts of each.
      text_features: Width of the text embeddings.
      pooled_features: Width of the pooled embedding; 0 if the encoders make none.
      max_length: Tokens beyond which a prompt was cut off.
      latent_channels: Channels of the images' latents; 0 if the list names no images.
      latents: Identity of the autoencoder of all latents; empty if there are none.
      tokenizer: Identity of what takes prompts apart; empty in older sets.
      cut_off: Number of prompts that are longer than `max_length`; 0 in older sets.
      references: `(h, w)` of the latents of each reference image, for each bucket; empty if no
        prompt has any.
      reference_channels: Channels of the references' latents; 0 if there are none.
      with_references: The text encoder sees the references.

    Raises:
      ValueError: If a number is out of range or the buckets do not add up.
    """

    stem = "prompts"

    encoder: str
    compute: str
    source: str
    buckets: tuple[tuple[int, int], ...]
    bucket_sizes: tuple[int, ...]
    text_features: int
    pooled_features: int
    max_length: int
    latent_channels: int = 0
    latents: str = ""
    tokenizer: str = ""
    cut_off: int = 0
    references: tuple[tuple[tuple[int, int], ...], ...] = ()
    reference_channels: int = 0
    with_references: bool = False

    def __post_init__(self):  # noqa: D105
        super().__post_init__()
        object.__setattr__(self, "buckets", tuple(tuple(size) for size in self.buckets))
        object.__setattr__(self, "bucket_sizes", tuple(self.bucket_sizes))
        self.check_positive("text_features", "max_length")
        channels = self.latent_channels, self.reference_channels
        if self.pooled_features < 0 or min(channels) < 0:
            raise ValueError("pooled_features and channels of latents must not be negative")
        if any(channels) != bool(self.latents):
            raise ValueError(f"{max(channels)} channels of latents by {self.latents!r}")
        references = self.references or ((),) * len(self.buckets)
        sizes = [*self.buckets, *itertools.chain(*references)]
        if min((side for size in sizes for side in size), default=1) < 1:
            raise ValueError(f"buckets must be positive, got {self.buckets}, {references}")
        if len(references) != len(self.buckets) or any(references) != bool(channels[1]):
            raise ValueError(f"buckets {self.buckets} have references {references}")
        if len(self.buckets) != len(self.bucket_sizes) or min(self.bucket_sizes, default=0) < 1:
            raise ValueError(f"buckets {self.buckets} have sizes {self.bucket_sizes}")
        if sum(self.bucket_sizes) + 1 != self.num_examples:
            raise ValueError(
                f"buckets of {self.bucket_sizes} prompts and the empty one are not "
                f"{self.num_examples} examples"
            )

    def without(self, indices: Collection[int]) -> "PromptsPlan":
        """The plan of a set that lacks some prompts, by their `indices` in this one."""
        ends = list(itertools.accumulate(self.bucket_sizes))
        lost = collections.Counter(bisect.bisect_right(ends, index) for index in indices)
        sizes = [size - lost[bucket] for bucket, size in enumerate(self.bucket_sizes)]
        references = tuple(r for r, size in zip(self.references, sizes, strict=False) if size)
        some = any(references)
        return dataclasses.replace(
            self,
            num_examples=self.num_examples - len(indices),
            buckets=tuple(b for b, size in zip(self.buckets, sizes, strict=True) if size),
            bucket_sizes=tuple(size for size in sizes if size),
            references=references if some else (),
            reference_channels=self.reference_channels if some else 0,
            latents=self.latents if some or self.latent_channels else "",
        )


class PromptTexts(Sequence[str]):
    """The prompts themselves by index, each read from its record when it is asked for.

    Args:
      records: The set's records, arrays by name.
      length: Number of prompts.
    """

    def __init__(self, records: Sequence[dict[str, np.ndarray]], length: int):
        self._records = records
        self._length = length

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """Returns one prompt, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        index = range(self._length)[index]  # negative ones, and IndexError
        return self._records[index]["prompt"].tobytes().decode()


class PromptsSource:
    """A finished set by index, for `piflow_jax.data.batches`; made by `load_prompts_source`.

    Examples have `condition`: `text: bfloat16[L, D]`, zeros beyond the prompt's own tokens,
    `text_length: int32[]`, their number, and `pooled: bfloat16[P]` where the encoders make one;
    `index: int32[]`, the prompt's place in its list; and `x: float16[H, W, C]`, the image's
    latents. In a set without images `x` is `float32[H, W, 0]`: its shape alone says what size the
    prompt is for. With reference images, a condition also has `references`, a tuple of latents
    `float16[h, w, C]`, and `null`, text of the empty prompt, if the text encoder sees them.

    Attributes:
      name: `prompts`.
      text_length: `L`, the most tokens that a prompt of the set has.
      text_features: `D`.
      pooled_features: `P`; 0 if there is no pooled embedding.
      latent_channels: `C`; 0 if there are no latents.
      vae: Identity of the autoencoder of the latents; empty if there are none.
      references: Largest number of reference images of a prompt.
      buckets: `(H, W)` of latents, for each aspect ratio.
      bucket_sizes: Number of prompts of each; they come bucket by bucket.
      null: The empty prompt: `text`, `text_length` and, where there is one, `pooled`.
      prompts: The prompts themselves.
      manifest: All that is known of the set, `prompts.json`.
    """

    def __init__(
        self, directory: epath.Path, manifest: dict[str, Any], cache_gib: float = math.inf
    ):
        self.name = NAME
        self.manifest = manifest
        self.text_length = max(shard["text_length"] for shard in manifest["shards"])
        if not 1 <= self.text_length <= manifest["max_length"]:
            raise PromptsError(
                f"{directory / MANIFEST} is damaged: texts of {self.text_length} tokens, of which "
                f"max_length allows {manifest['max_length']}"
            )
        self.text_features = manifest["text_features"]
        self.pooled_features = manifest["pooled_features"]
        self.latent_channels = manifest["latent_channels"]
        self.vae = manifest["latents"]
        self.references = max(map(len, manifest["references"]), default=0)
        self.buckets = tuple(tuple(size) for size in manifest["buckets"])
        self.bucket_sizes = tuple(manifest["bucket_sizes"])
        self._ends = list(itertools.accumulate(self.bucket_sizes))
        shards = manifest["shards"]
        self._records = Records(directory, shards, self._parsed, PromptsError, cache_gib)
        self.stage = self._records.stage
        self.prompts = PromptTexts(self._records, len(self))
        self.null = self._embedding(self._records[len(self)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(S, S, C)`, where `S` is the longest side of any latents.

        In a set without latents, `C` is 16, as for FLUX.1 and Qwen-Image, see `has_latents`.
        """
        side = max(max(size) for size in self.buckets)
        channels = self.latent_channels or self.manifest["reference_channels"]
        return side, side, channels or _LATENT_CHANNELS

    @property
    def has_latents(self) -> bool:
        """Whether the set has latents, of images or of references, and so knows their channels."""
        return bool(self.latent_channels or self.manifest["reference_channels"])

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return self.manifest["num_examples"] - 1

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns one example, `0 <= index < len(self)`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[dict[str, np.ndarray]]:
        """Returns several examples, read at once."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"there are {len(self)} prompts, no number {index}")
        examples = zip(indices, self._records.__getitems__(indices), strict=True)
        return [self._example(index, arrays) for index, arrays in examples]

    def bucket(self, index: SupportsIndex) -> int:
        """Returns the bucket of a prompt; reads nothing.

        Args:
          index: `0 <= index < len(self)`.

        Returns:
          The place of its shape in `buckets`.
        """
        return bisect.bisect_right(self._ends, index)

    def find(
        self,
        prompts: Sequence[str],
        shapes: Sequence[tuple[int, int] | None] | None = None,
        references: Sequence[Sequence[str]] | None = None,
    ) -> list[int | None]:
        """Where prompts stand; the set is read from its beginning until all are found.

        Args:
          prompts: `N` prompts.
          shapes: `(H, W)` of latents, one for each prompt. A prompt that the set does not have in
            its shape is found in another one. Without shapes, and for None, the first match counts.
          references: Names of the reference images of each prompt, as in the list: a name or a list
            of names. They must be the same. Without this argument, any references match.

        Returns:
          An index for each, None for those that the set does not have.

        Raises:
          ValueError: One of them is a single text, or there are references of another number.
        """
        count, names = len(prompts), [None] * len(prompts)
        if references is not None:
            names = [tuple([own] if isinstance(own, str) else own) for own in references]
        if str in (type(prompts), type(references)) or len(names) != count:
            raise ValueError("prompts must be a list of texts, references as many lists of names")
        wanted = list(zip(prompts, names, shapes or [None] * count, strict=True))
        texts, missing = set(prompts), set(wanted)
        found = {}
        for index, text in enumerate(self.prompts):
            if not missing:
                break
            if text in texts:
                name = None if references is None else self.reference_names(index)
                for shape in (None, self.buckets[self.bucket(index)]):
                    found.setdefault((text, name, shape), index)
                    missing.discard((text, name, shape))
        return [found.get(key, found.get((*key[:2], None))) for key in wanted]

    def reference_names(self, index: SupportsIndex) -> tuple[str, ...]:
        """Returns the names of a prompt's reference images, as its list had them.

        Args:
          index: `0 <= index < len(self)`.

        Returns:
          The names, in order; empty if there are none.
        """
        names = self._records[index].get("reference_names")
        return () if names is None else tuple(json.loads(names.tobytes()))

    def embedded(
        self, prompts: Sequence[str], references: Sequence[Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """Embeddings of some of the prompts, as `Student.sample` takes them.

        Args:
          prompts: `N` prompts.
          references: Names of the reference images of each, see `find`.

        Returns:
          `text: bfloat16[N, L, D]`, `text_length: int32[N]` and, where the encoders make one,
          `pooled: bfloat16[N, P]`; with reference images those of the class too, see above.

        Raises:
          PromptsError: One is not in the set; it is named. Or reference images differ in number or
            size, which takes several calls.
        """
        found = self.find(prompts, references=references)
        if None in found:
            first = found.index(None)
            edited = "" if references is None else f" with the references {references[first]!r}"
            raise PromptsError(f"the set has no embeddings of {prompts[first]!r}{edited}")
        rows = [self._embedding(self._records[index]) for index in found]
        shapes = [[r.shape for r in row.get("references", ())] for row in rows]
        if any(shape != shapes[0] for shape in shapes):
            raise PromptsError(
                f"reference images of these prompts differ in number or size, {shapes}: ask for "
                "those of one size at a time"
            )
        return stacked(rows) if rows else {}

    def _example(
        self, index: SupportsIndex, arrays: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        height, width = self.buckets[self.bucket(index)]
        x = arrays["latents"] if self.latent_channels else np.zeros((height, width, 0), np.float32)
        return {"x": x, "condition": self._embedding(arrays), "index": arrays["index"]}

    def _parsed(self, record: bytes) -> dict[str, np.ndarray]:
        arrays = _arrays(record)
        length, width = arrays["text"].shape
        if not 1 <= length <= self.text_length or width != self.text_features:
            raise ValueError(f"its text has shape {(length, width)}")
        pooled = arrays.get("pooled", np.zeros(0)).shape
        if pooled != (self.pooled_features,):
            raise ValueError(f"its pooled embedding has shape {pooled}")
        return arrays

    def _embedding(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        embedding = self._padded(arrays["text"])
        if self.pooled_features:
            embedding["pooled"] = arrays["pooled"]
        names = (f"reference_{number}" for number in range(self.references))
        references = tuple(arrays[name] for name in names if name in arrays)
        if references:
            embedding["references"] = references
        if "null" in arrays:
            embedding["null"] = self._padded(arrays["null"])
        return embedding

    def _padded(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        text = np.zeros((self.text_length, self.text_features), _TEXT_DTYPE)
        text[: len(tokens)] = tokens
        return {"text": text, "text_length": np.asarray(len(tokens), np.int32)}


def load_prompts_source(
    directory: str | os.PathLike,
    *,
    expect_encoder: str | None = None,
    verify: bool = True,
    cache_gib: float = math.inf,
) -> PromptsSource:
    """Opens a finished set.

    Args:
      directory: Its directory.
      expect_encoder: Identity of the text encoders that it must come from; None takes any.
      verify: Compare all checksums, which reads the whole set. Without it only lengths of files are
        compared; a damaged record then raises when it is read.
      cache_gib: Most GiB of the copies that a process makes of a set in a bucket.

    Returns:
      The source.

    Raises:
      PromptsError: If the set is unfinished, a file is missing or differs from the manifest (the
        message names it), or it was made with other encoders.
    """
    manifest = PROMPTS.open(directory)
    if expect_encoder is not None and manifest["encoder"] != expect_encoder:
        raise PromptsError(
            f"{directory} was made with encoder {manifest['encoder']!r}, "
            f"but {expect_encoder!r} was asked for"
        )
    PROMPTS.verify(directory, manifest["shards"], checksums=verify)
    return PromptsSource(located(directory), manifest, cache_gib)


def _serialized(
    plan: PromptsPlan, index: int, example: dict[str, Any], notes: dict[str, int]
) -> bytes:
    from safetensors.numpy import save

    bucket = bisect.bisect_right(list(itertools.accumulate(plan.bucket_sizes)), index)
    arrays = _checked(plan, example, bucket)
    texts = [len(arrays[name]) for name in ("text", "null") if name in arrays]
    notes["text_length"] = max(notes["text_length"], *texts)
    return save(arrays)


def _checked(plan: PromptsPlan, example: dict[str, Any], bucket: int) -> dict[str, np.ndarray]:
    """Arrays of a record, all as the plan says; the empty prompt is behind the last bucket."""
    prompt, of_bucket = example["prompt"], slice(bucket, bucket + 1)
    references = [size for sizes in plan.references[of_bucket] for size in sizes]
    arrays, expected = {}, {}
    for name in ("text", "null") if references and plan.with_references else ("text",):
        arrays[name] = text = np.asarray(example[name], _TEXT_DTYPE)
        if text.shape[1:] != (plan.text_features,) or not 1 <= len(text) <= plan.max_length:
            raise PromptsError(
                f"{name} of {prompt!r} has shape {text.shape}, expected [1 to {plan.max_length}, "
                f"{plan.text_features}]"
            )
    if plan.pooled_features:
        expected["pooled"] = (_TEXT_DTYPE, (plan.pooled_features,))
    for size in plan.buckets[of_bucket] if plan.latent_channels else ():
        expected["latents"] = (_LATENTS_DTYPE, (*size, plan.latent_channels))
    for number, size in enumerate(references):
        shape = (*size, plan.reference_channels)
        expected[f"reference_{number}"] = (_LATENTS_DTYPE, shape)
    for name, (dtype, shape) in expected.items():
        arrays[name] = np.asarray(example[name], dtype)
        if arrays[name].shape != shape:
            raise PromptsError(
                f"{name} of {prompt!r} has shape {arrays[name].shape}, expected {shape}"
            )
    for name, array in arrays.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise PromptsError(f"{name} of {prompt!r} is not finite in {array.dtype.name}")
    if references:
        names = json.dumps(example["reference_names"])
        arrays["reference_names"] = np.frombuffer(names.encode(), np.uint8)
    arrays["prompt"] = np.frombuffer(prompt.encode(), np.uint8)
    arrays["index"] = np.asarray(example["index"], np.int32)
    return arrays


def _arrays(record: bytes) -> dict[str, np.ndarray]:
    """Arrays of a record; `safetensors.numpy` knows no bfloat16."""
    import safetensors

    return {
        name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(record)
    }


PROMPTS = ShardedSet(
    manifest=MANIFEST,
    format=1,
    plan=PromptsPlan,
    error=PromptsError,
    contents="prompts",
    notes=("text_length",),
    added=("tokenizer", "cut_off", "references", "reference_channels", "with_references"),
    serialize=_serialized,
)
"""Sets of prompts.

Their examples, in the set's order, have `prompt: str`; `index: int`, its place in the list; `text`:
`[L, text_features]` with the prompt's own length `1 <= L <= max_length`; `pooled`:
`[pooled_features]`, where the plan has it; `latents`: `[H, W, latent_channels]` of the prompt's
bucket, where the plan has them (the empty prompt has none). Prompts of a bucket with references
have `reference_0: [h, w, reference_channels]` and so on, `reference_names: list[str]`, and where
the text encoder sees them `null`, of the empty prompt, like `text`.
"""
