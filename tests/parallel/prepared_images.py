"""Prepares pixels as one of several processes: `prepare` or `train`, the pictures, the place.

`train` does what precedes training, and prints what a batch holds.
"""

import hashlib
import sys

from piflow_jax.config import parse
from piflow_jax.data import batches, images
from piflow_jax.modes import run
from piflow_jax.modes.prepare_images import prepare_missing
from piflow_jax.parallel import processes
from piflow_jax.systems.datasets import load_source
from tests import tiny

SHARD = 2


def settings_of(pictures, place):
    settings = tiny.get_config()
    data = {"name": "images", "images": pictures, "data_dir": place, "image_size": 8}
    settings.data.update(data)
    settings.processes.update({"heartbeat_seconds": 5, "start_seconds": 60})
    return settings


if __name__ == "__main__":
    mode, pictures, place = sys.argv[1:]
    images._SHARD_IMAGES = SHARD
    settings = settings_of(pictures, place)
    if mode == "prepare":
        sys.exit(run("prepare", settings, place))
    config = parse(settings)
    processes.start(config.processes)
    prepare_missing(config, place)
    batch = next(batches(load_source(config.data), batch_size=7, seed=0))
    print(hashlib.sha256(batch["x"].tobytes()).hexdigest())
    sys.exit(processes.end(0))
