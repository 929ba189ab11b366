"""Reading cached latents, against a plain PyTorch `DataLoader` over the same examples.

    python -m benchmarks.data

writes a synthetic set with the sizes of ImageNet's latents (32x32x4, both mirror images, 32 KiB an
example in float16) and reads shuffled batches of it, from the page cache: what is timed is
decoding, not a disk. PyTorch reads a file for each example, as its loops of cached latents do, in
the main process and in as many workers as there are cores. How many examples one core reads in a
second, by the processor time of all threads, is kept too: it tells how many a run's input needs.
No accelerator is used if there is one: what is measured, and what bounds it, is the host's.
"""

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before JAX is imported, here and in the processes of the readers.
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from benchmarks import harness
from piflow_jax.data import batches
from piflow_jax.data.latents import (
    LATENTS,
    LatentsPlan,
    load_latents_source,
)

SHAPE = (32, 32, 4)


def moments(index: int, dtype: str) -> np.ndarray:
    """Mean and standard deviation of an example and of its mirror image, `[2, 2, H, W, C]`."""
    rng = np.random.default_rng(index)
    return rng.standard_normal((2, 2, *SHAPE), np.float32).astype(dtype)


def write_latents(directory: str, examples: int, shard_size: int, dtype: str) -> None:
    """Writes random latents of the shape of ImageNet's."""
    plan = LatentsPlan(
        vae="synthetic",
        compute="none",
        source="random numbers",
        num_examples=examples,
        num_classes=1000,
        image_size=256,
        latent_shape=SHAPE,
        shard_size=shard_size,
        dtype=dtype,
    )

    def example(index):
        mean, std = np.swapaxes(moments(index, dtype), 0, 1)
        return {"mean": mean, "std": std, "label": index % 1000, "key": str(index)}

    LATENTS.start(directory, plan)
    for shard in range(plan.num_shards):
        LATENTS.write(directory, plan, shard, map(example, plan.shard_range(shard)))
    LATENTS.finalize(directory)


class Files:
    """A map-style PyTorch dataset: one `.npy` an example, one mirror image of it at random."""

    def __init__(self, directory: str, examples: int):
        self.directory, self.examples = directory, examples

    def __len__(self) -> int:
        """Examples."""
        return self.examples

    def __getitem__(self, index: int) -> dict:
        """One example."""
        both = np.load(f"{self.directory}/{index}.npy")
        mean, std = both[np.random.randint(2)]
        moments = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
        return {"x": moments, "condition": index % 1000}


def endless(loader):
    """Epoch after epoch."""
    while True:
        yield from loader


def torch_batches(directory: Path, options, workers: int):
    """The endless batches of a `DataLoader`."""
    from torch.utils.data import DataLoader

    return endless(
        DataLoader(
            Files(str(directory), options.examples),
            batch_size=options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            # JAX's threads do not survive a fork.
            multiprocessing_context="spawn" if workers else None,
        )
    )


def our_batches(directory: Path, options) -> Iterator:
    """Ours."""
    return batches(load_latents_source(str(directory)), batch_size=options.batch_size, seed=0)


def reading(make: Callable[[], Iterator], count: int) -> Callable:
    """A call that reads `count` batches."""
    iterator = make()

    def read():
        for _ in range(count):
            batch = next(iterator)
        return np.asarray(batch["x"]["mean"])

    return read


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8, help="in a call")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    options = parser.parse_args()
    harness.tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        shards, files = Path(folder) / "shards", Path(folder) / "files"
        shards.mkdir()
        files.mkdir()
        write_latents(str(shards), options.examples, options.shard_size, options.dtype)
        start = time.perf_counter()
        load_latents_source(str(shards))
        opening = time.perf_counter() - start
        readers = {"piflow_jax": functools.partial(our_batches, shards, options)}
        if harness.torch_device():
            for index in range(options.examples):
                np.save(files / f"{index}.npy", moments(index, options.dtype))
            for workers in sorted({0, harness.machine()["cores"]}):
                name = f"PyTorch DataLoader, {workers} workers"
                readers[name] = functools.partial(torch_batches, files, options, workers)
        ours = readers["piflow_jax"]()
        next(ours)  # starts the threads and opens the shards
        cpu = time.process_time()
        for _ in range(options.rounds * options.batches):
            next(ours)
        cpu = (time.process_time() - cpu) / options.rounds
        del ours

        count = options.batches * options.batch_size
        example = 2 * 4 * int(np.prod(SHAPE))
        # One after the other: by turns, each would read ahead while the others are timed.
        case = harness.compare_apart(
            {
                name: functools.partial(reading, reader, options.batches)
                for name, reader in readers.items()
            },
            harness.Work(items=count, unit="examples", bytes=count * example),
            harness.measured_peaks(("float32",)),
            rounds=options.rounds,
        )
        harness.save(
            "data",
            f"latents of ImageNet's size, {options.dtype}, batch {options.batch_size}",
            case,
            examples_per_core_second=round(count / cpu),
            seconds_to_open_and_verify=round(opening, 3),
        )


if __name__ == "__main__":
    main()
