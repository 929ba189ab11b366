"""Endless, shuffled, sharded, resumable batches of any random access source.

The order is a pure function of `(seed, length, position)`. Epoch `e` visits the examples in the
order that sorts `length` words of the counter-based generator Philox with key `(seed, e)`; NumPy
keeps that stream fixed between versions, unlike the one of `Generator.permutation`. Global batch
`i` is positions `[i B, (i + 1) B)` of the endless concatenation of epochs, so an epoch may end
inside a batch. A process takes those of its rows that its devices need, so what a step trains on
does not depend on how many processes share the work. The whole position is therefore one integer,
the number of batches taken.

A source whose examples have several shapes keeps those of one shape together, in buckets. Then each
batch is of one bucket, which on every process is the same: every bucket has an endless order of its
own, and `BucketSchedule` says which bucket's turn it is.

Grain reads: a `MapDataset` over whole batches, by threads ahead of the consumer for sources on
disk, in the calling thread and by one gather for sources in memory (0.1 ms for 256 digits). Grain's
own `shuffle`, one call for each example, costs about 30 us an example, 8 ms for such a batch.
"""

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from piflow_jax.arguments import differing
from piflow_jax.data.source import Source, mapped, stacked
from piflow_jax.keys import shuffled

_READ_THREADS = 4
# Philox's second key is the epoch, with the bucket above it; the last stream shuffles turns.
_STREAM_BITS = 40
_TURNS = 2**23


class Order:
    """The endless shuffled order of a data set.

    Args:
      length: Number of examples.
      seed: Any integer in [0, 2**64).
      stream: Orders of different streams are independent.
    """

    def __init__(self, length: int, seed: int, stream: int = 0):
        self.length = length
        self.seed = seed
        self._stream = stream << _STREAM_BITS
        self._cached = functools.lru_cache(maxsize=2)(shuffled)  # readers straddle two epochs
        self._lock = threading.Lock()

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the permutation int64[length] of one epoch; do not write to it."""
        with self._lock:
            return self._cached(self.length, (self.seed, self._stream + epoch))

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Returns the examples int64[stop - start] at positions `start <= i < stop`."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.length)
            part = self.epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


class BucketSchedule:
    """Whose turn it is: the endless sequence of buckets, in proportion to their sizes.

    Before round `r` bucket `b` has had `floor(r n_b / B)` turns, so in the long run as many as its
    examples fill batches; within a round turns are shuffled. A single bucket has all turns.

    Args:
      sizes: Numbers of examples `n_b` of the buckets.
      batch_size: Examples `B` of a batch.
      seed: Any integer in [0, 2**64).
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int):
        self.sizes = tuple(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self._round = functools.lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, batch: int) -> tuple[int, int]:
        """Returns the bucket of a batch and how many turns that bucket had before."""
        if len(self.sizes) == 1:
            return 0, batch
        # Turns are rounded down, so it is this round or a later one.
        round_ = batch * self.batch_size // sum(self.sizes)
        while sum(self._turns(round_ + 1)) <= batch:
            round_ += 1
        before, buckets = self._turns(round_), self._round(round_)
        place = batch - sum(before)
        bucket = int(buckets[place])
        return bucket, before[bucket] + int(np.sum(buckets[:place] == bucket))

    def _shuffled(self, round_: int) -> np.ndarray:
        turns = np.subtract(self._turns(round_ + 1), self._turns(round_))
        buckets = np.repeat(np.arange(len(turns)), turns)
        return buckets[shuffled(len(buckets), (self.seed, (_TURNS << _STREAM_BITS) + round_))]

    def _turns(self, round_: int) -> list[int]:
        return [round_ * size // self.batch_size for size in self.sizes]


class _Batches:
    """The endless sequence of one process's batches, as a source for Grain."""

    def __init__(self, source: Source, seed: int, batch_size: int, rows: np.ndarray):
        sizes = bucket_sizes(source)
        self._source = source
        self._schedule = BucketSchedule(sizes, batch_size, seed)
        self._orders = [Order(size, seed, bucket) for bucket, size in enumerate(sizes)]
        self._starts = np.cumsum((0, *sizes))
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        bucket, turn = self._schedule(batch)
        start = turn * self._batch_size
        whole = self._orders[bucket](start, start + self._batch_size)
        return self._read(self._starts[bucket] + whole[self._rows])

    def like(self, batch: int) -> dict[str, np.ndarray]:
        bucket, _ = self._schedule(batch)
        example = self._read(self._starts[bucket : bucket + 1])
        rows = len(self._rows)
        return mapped(lambda leaf: np.broadcast_to(leaf, (rows, *leaf.shape[1:])), example)

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if hasattr(self._source, "gather"):
            return self._source.gather(indices)
        if hasattr(self._source, "__getitems__"):  # ArrayRecord reads many at once
            examples = self._source.__getitems__(indices.tolist())
        else:
            examples = [self._source[index] for index in indices.tolist()]
        return stacked(examples)


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Endless iterator over one process's batches, made by `batches`.

    Each item is an example of the source, see `Source`, with the process's rows in front: for
    labelled images `x: float32[rows, H, W, C]` and `condition: int32[rows]`.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int, rows: np.ndarray):
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "length": len(source),
        }
        if len(bucket_sizes(source)) > 1:
            self._identity["buckets"] = list(bucket_sizes(source))
        if hasattr(source, "stage"):
            source.stage()
        self._threads = 0 if hasattr(source, "gather") else _READ_THREADS
        self._source = _Batches(source, seed, batch_size, rows)
        self._start(0)

    def _start(self, position: int) -> None:
        import grain  # here, for a light `import piflow_jax.data`

        self._position = position
        dataset = grain.MapDataset.source(self._source).slice(slice(position, None))
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=2 * self._threads
        )
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch; never ends."""
        batch = next(self._iterator)
        self._position += 1
        return batch

    def like(self) -> dict[str, np.ndarray]:
        """Returns one example, repeated to the shapes of the next batch, which is not read."""
        return self._source.like(self._position)

    @property
    def epoch(self) -> float:
        """How many times the data set has been passed over so far, with its fraction."""
        return self._position * self._identity["batch_size"] / self._identity["length"]

    def get_state(self) -> dict[str, int]:
        """Returns the position and what it is a position in, ready for JSON.

        It is the same on every process.
        """
        return {"position": self._position, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken, exactly.

        Args:
          state: What `get_state` returned, from this iterator or from one made alike.

        Raises:
          ValueError: If the state is not one, or belongs to a pipeline with another seed, batch
            size or data set length; the message says what differs.
        """
        expected = {"position", *self._identity}
        # Older states have the process count, on which batches do not depend.
        if not isinstance(state, dict) or set(state) - {"process_count"} != expected:
            raise ValueError(f"a data state has the keys {sorted(expected)}, got {state!r}")
        saved = {key: state[key] for key in self._identity}
        differences = differing(saved, self._identity, "{} was {} and is now {}")
        if differences:
            raise ValueError(
                "the saved data position belongs to another pipeline: " + "; ".join(differences)
            )
        position = state["position"]
        if not _is_int(position) or position < 0:
            raise ValueError(f"position must be a non-negative integer, got {position!r}")
        self._start(int(position))


def batches(
    source: Source, *, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> BatchIterator:
    """Endless shuffled batches of a source, for one of several processes.

    Every epoch is a fresh permutation that covers each example exactly once; no example is dropped
    at its end, the next epoch fills the batch. The batches depend on `seed` alone. For images held
    in memory (`ArraySource`) nothing runs in the background; other sources are read ahead by a few
    threads.

    Args:
      source: Anything with `__len__` and `__getitem__(i) -> dict` of arrays; a method
        `gather(indices)` that returns a stacked batch marks it as held in memory. Examples may
        have several shapes if they come bucket by bucket and `bucket_sizes` says how many of each.
      batch_size: Global batch size. It may exceed the data set.
      seed: Integer in [0, 2**64).
      rows: Rows of each global batch that this process reads, such as `parallel.local_rows` says;
        by default all. Global batches do not depend on how they are shared.

    Returns:
      An iterator with `get_state` and `set_state`; batches have the rows, in their order.

    Raises:
      ValueError: If an argument is out of its range; the message names it.
    """
    if len(source) == 0:
        raise ValueError("source is empty")
    if not _is_int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    inside = rows.ndim == 1 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not inside or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows must be integers in [0, {batch_size}), at least one, got {rows}")
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    return BatchIterator(
        source,
        batch_size=int(batch_size),
        seed=int(seed),
        rows=rows,
    )


def bucket_sizes(source: Source) -> tuple[int, ...]:
    """Numbers of examples of equal shapes, in order; one number where all shapes are equal."""
    return tuple(getattr(source, "bucket_sizes", (len(source),)))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
