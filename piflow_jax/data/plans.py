"""What a set of records is going to hold, and how it is cut into shards."""

import dataclasses
from collections.abc import Collection
from typing import ClassVar

__all__ = ["Plan"]

_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a set is, fixed before its first shard is written; sets add fields of their own.

    Attributes:
      stem: What names of shards begin with.
      num_examples: Number of examples.
      shard_size: Examples in each shard; the last may have fewer.

    Raises:
      ValueError: If a number is not positive.
    """

    stem: ClassVar[str]

    num_examples: int
    shard_size: int

    def __post_init__(self):  # noqa: D105
        self.check_positive("num_examples", "shard_size")

    def check_positive(self, *names: str) -> None:
        """Raises a `ValueError` if a field of `names` is no positive number of 32 bits."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if getattr(self, name) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST:,}, got {getattr(self, name)}")

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_examples // self.shard_size)

    def shard_name(self, shard: int) -> str:
        """Name of the file of a `shard`, counted from 0, as TFDS wants it."""
        return f"{self.stem}.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def shard_range(self, shard: int) -> range:
        """Indices of the examples of a `shard`, counted from 0."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def without(self, indices: Collection[int]) -> "Plan":
        """The plan of a set that lacks some examples, by their `indices` in this one."""
        return dataclasses.replace(self, num_examples=self.num_examples - len(indices))
