"""Time and memory of loading official weights, beside what reading the file takes.

    python -m benchmarks.weights_load

writes four blocks of Qwen-Image at full width under official names, random numbers in bfloat16 (3
GB in a temporary folder, `--blocks`), and loads them in a process of its own, three times. "Memory"
is the most that the process held while it loaded, less what it held before; "reading" is the same
file read into memory, from the system's cache as well. Results go to
`benchmarks/results/weights_load.json`.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness


def _qwen(blocks: int):
    """The network of `configs/qwen_image.py` with fewer blocks."""
    from configs import qwen_image
    from piflow_jax.config import parse
    from piflow_jax.systems.networks import NETWORKS, teacher_network

    config = qwen_image.get_config("datafree")
    config.model.qwen_image.depth = blocks
    config = parse(config, None)
    return teacher_network(config.model, NETWORKS["qwen_image"].official)


def write(path: Path, blocks: int) -> None:
    """Random weights under official names."""
    import jax
    import ml_dtypes
    import numpy as np

    from piflow_jax.convert import to_torch_state, write_safetensors
    from piflow_jax.systems.network import abstract_variables

    network, rng = _qwen(blocks), np.random.default_rng(0)
    few = rng.normal(scale=0.02, size=2**20).astype(ml_dtypes.bfloat16)
    params = jax.tree.map(lambda leaf: np.resize(few, leaf.shape), abstract_variables(network))
    write_safetensors(path, to_torch_state(network.module, params))


def load(path: Path, blocks: int) -> None:
    """Loads them as the command line does."""
    import jax

    from piflow_jax.convert import open_weights
    from piflow_jax.loading.weights import converted
    from piflow_jax.parallel import local_mesh, replicated

    network = _qwen(blocks)
    weights = converted(open_weights(path), network, "qwen_image", replicated(local_mesh()))
    jax.block_until_ready(weights)


def read(path: Path, blocks: int) -> None:
    """Reads the file."""
    import numpy as np

    del blocks
    np.fromfile(path, np.uint8)


def measured(call: Callable[[Path, int], None], path: Path, blocks: int) -> tuple[float, float]:
    """Seconds, and bytes at the most; in a process of its own."""
    import jax

    from piflow_jax import loading  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    call(path, blocks)
    seconds = time.perf_counter() - start
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"

        def apart(call):
            with context.Pool(1) as pool:
                return pool.apply(measured, (call, path, options.blocks))

        with context.Pool(1) as pool:
            pool.apply(write, (path, options.blocks))
        size = path.stat().st_size
        # By turns, so that what else the machine does falls on both.
        rounds = [(apart(read), apart(load)) for _ in range(options.rounds)]
    median = statistics.median
    result = {
        "blocks": options.blocks,
        "bytes": size,
        "machine": harness.machine(),
        "seconds": median(ours[0] for _, ours in rounds),
        "seconds_of_reading": median(plain[0] for plain, _ in rounds),
        "time_over_reading": median(ours[0] / plain[0] for plain, ours in rounds),
        "memory_over_size": median(ours[1] / size for _, ours in rounds),
    }
    harness.write("weights_load", result)
    print(
        f"{size / 1e9:.2f} GB: {result['seconds']:.2f} s, {result['time_over_reading']:.2f} times "
        f"reading; memory {result['memory_over_size']:.2f} times the size"
    )


if __name__ == "__main__":
    main()
