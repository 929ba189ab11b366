"""How fast cached latents are read: examples per second and core through `piflow_jax.data.batches`.

`python benchmarks/latents_input.py` writes a synthetic set with the sizes of ImageNet's latents
(32x32x4, both mirror images, 32 KiB an example in float16), reads shuffled batches, and prints one
line of JSON. `examples_per_cpu_second` divides by the processor time of all threads, so that it
tells how many cores a training run's input needs; `examples_per_second` by the clock's. The files
are in the page cache: the figures are of decoding, not of a disk.
"""

import argparse
import json
import os
import tempfile
import time

import numpy as np

from piflow_jax.data import batches
from piflow_jax.data.latents import (
    LatentsPlan,
    finalize_latents,
    load_latents_source,
    start_latents,
    write_shard,
)


def write_synthetic(directory: str, examples: int, shard_size: int, dtype: str) -> None:
    """Writes random latents of the shape of ImageNet's."""
    plan = LatentsPlan(
        vae="synthetic",
        compute="none",
        source="random numbers",
        num_examples=examples,
        num_classes=1000,
        image_size=256,
        latent_shape=(32, 32, 4),
        shard_size=shard_size,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)

    def example(index):
        moments = rng.standard_normal((2, 2, 32, 32, 4), np.float32).astype(dtype)
        return {"mean": moments[0], "std": moments[1], "label": index % 1000, "key": str(index)}

    start_latents(directory, plan)
    for shard in range(plan.num_shards):
        write_shard(directory, plan, shard, map(example, plan.shard_range(shard)))
    finalize_latents(directory)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--shard_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_synthetic(directory, args.examples, args.shard_size, args.dtype)
        start = time.perf_counter()
        source = load_latents_source(directory)
        opening = time.perf_counter() - start
        iterator = batches(source, batch_size=args.batch_size, seed=0)
        next(iterator)  # starts the threads and opens the shards
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(args.batches):
            next(iterator)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    count = args.batches * args.batch_size
    figures = {
        **vars(args),
        "examples_per_second": round(count / seconds),
        "examples_per_cpu_second": round(count / cpu_seconds),
        "cores_of_machine": os.cpu_count(),
        "seconds_to_open_and_verify": round(opening, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
