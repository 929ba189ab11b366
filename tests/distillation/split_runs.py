"""A teacher and a student of a caller's network on whatever devices there are; prints JSON.

Arguments are a work directory and the number of parts that parameters are split into.
"""

import json
import sys

import jax
import numpy as np
from flax import linen as nn

import piflow_jax
from piflow_jax.config import ProcessesConfig
from piflow_jax.parallel import processes

CLASSES = 2
rng = np.random.default_rng(0)
IMAGES = np.tanh(rng.normal(0, 0.5, (64, 8, 8, 1))).astype(np.float32)


class Network(nn.Module):
    """Convolutions as anybody writes them, and running averages."""

    outputs: int

    @nn.compact
    def __call__(self, x, t, labels):
        h = nn.Conv(16, (3, 3))(x) + nn.Dense(16)(t[:, None])[:, None, None]
        h = h + nn.Embed(CLASSES + 1, 16)(labels)[:, None, None]
        average = self.variable("averages", "mean", lambda: np.zeros(16, np.float32))
        if self.is_mutable_collection("averages"):
            average.value = 0.9 * average.value + 0.1 * h.mean((0, 1, 2))
        return nn.Conv(self.outputs, (3, 3))(nn.silu(h))


def settings(parts):
    config = piflow_jax.base_config()
    config.mesh.fsdp = parts
    config.log_every = config.checkpoint_every = 2
    return config


def run(workdir, parts, steps=4):
    """Losses, the student's samples and what its running averages came to."""
    given = {"source": (IMAGES, np.arange(64) % CLASSES)}
    config = settings(parts)
    config.teacher.steps, config.teacher.batch_size = 4, 16
    config.teacher.optimizer.warmup_steps = 1
    teacher, params = piflow_jax.train_teacher(config, workdir, network=Network(1), **given)
    config = settings(parts)
    config.policy.num_components = 2
    config.train.steps, config.train.batch_size, config.train.total_substeps = steps, 16, 8
    config.train.optimizer.warmup_steps = 1
    config.evaluation.num_samples, config.evaluation.batch_size = 16, 16
    config.evaluation.teacher_steps, config.evaluation.substeps = (1,), 8
    config.evaluation.every, config.evaluation.every_samples = 2, 16
    outputs = piflow_jax.policy_outputs(config, 1)
    student = piflow_jax.distill(
        config,
        workdir,
        teacher=teacher,
        teacher_params=params,
        network=Network(outputs),
        initial_params=params,
        **given,
    )
    samples = student.sample(0, [0, 1, 1, 0])
    averages = jax.tree.leaves(student.params["carried"])[0]
    return {
        "samples": np.asarray(samples).ravel().tolist(),
        "averages": np.asarray(averages).tolist(),
    }


if __name__ == "__main__":
    processes.start(ProcessesConfig(start_seconds=60))
    workdir, parts = sys.argv[1:]
    print(json.dumps(run(workdir, int(parts))))
    sys.exit(processes.end(0))
