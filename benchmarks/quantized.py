"""What a frozen base in few bits changes in the miniatures of FLUX.1 and Qwen-Image.

    python -m piflow_jax.main --config=configs/flux.py:runlocal --workdir=runs/flux_local
    python -m benchmarks.quantized flux runs/flux_local

loads the run's teacher and student on bases of each dtype. "Output" is the error of the teacher's
velocity at noised images, relative to its size, against the base in bfloat16. "Endpoints" is that
of the student's samples from the same noise, against the same. "To the teacher" is the mean squared
distance of these samples to the teacher's at 64 evaluations in float32. `--trained DTYPE=DIR` adds
the distance of a student that was trained on a base of this dtype, by a run with this teacher
(`config.teacher.checkpoint`). Results go to `benchmarks/results/quantized.json`, by network.
"""

import argparse
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from piflow_jax.config import parse
from piflow_jax.data import stacked
from piflow_jax.keys import index_keys, index_noise, seed_key
from piflow_jax.loading.runs import load_student, load_teacher
from piflow_jax.models.lora import TRAINED
from piflow_jax.systems.assembly import Systems
from piflow_jax.systems.datasets import load_source, shape_of

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "int4")
EXAMPLES = 128
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
TEACHER_STEPS = 64


class Miniature:
    """A run of `runlocal` on a base of a dtype.

    Args:
      network: `flux` or `qwen_image`.
      teacher: work directory of the run that trained the teacher.
      dtype: of the base.
    """

    def __init__(self, network: str, teacher: str, dtype: str):
        config = importlib.import_module(f"configs.{network}").get_config("runlocal")
        # A run's own checkpoint is in float32.
        config.model[network].base_dtype = "float32" if dtype == "bfloat16" else dtype
        config.teacher.checkpoint = teacher
        self.config = parse(config)
        source = load_source(self.config.data)
        self.data = shape_of(self.config, source)
        self.systems = Systems.of(self.config, self.data, source.null)
        self.base = load_teacher(self.config, self.data, teacher)
        if dtype == "bfloat16":
            params = self.base["params"]
            rounded = jax.tree.map(lambda a: a.astype(dtype), params)
            self.base = {"params": rounded | {name: params[name] for name in TRAINED}}
        examples = stacked([source[i] for i in range(EXAMPLES)])
        self.images, self.condition = examples["x"], examples["condition"]
        self.noise = index_noise(index_keys(seed_key(0), np.arange(EXAMPLES)), self.data.shape)

    def output(self) -> np.ndarray:
        """The teacher's velocities at noised images of all levels."""
        apply = jax.jit(self.systems.teacher_network.apply)
        found = [
            apply(
                self.base,
                (1 - t) * self.images + t * self.noise,
                jnp.full(EXAMPLES, t),
                self.condition,
            )
            for t in LEVELS
        ]
        return np.stack([np.asarray(u, np.float64) for u in found])

    def endpoints(self, workdir: str) -> np.ndarray:
        """Samples of the student of a run."""
        network = self.systems.student_network
        trained = network.trained(load_student(self.config, self.data, workdir))
        sample = jax.jit(self.systems.student_sampler())
        params = network.with_base(trained, self.base)
        return np.asarray(sample(params, self.noise, self.condition), np.float64)

    def targets(self) -> np.ndarray:
        """Samples of the teacher."""
        sample = jax.jit(self.systems.teacher_sampler(TEACHER_STEPS))
        return np.asarray(sample(self.base, self.noise, self.condition), np.float64)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def measured(network: str, workdir: str, trained: dict[str, str]) -> dict[str, dict[str, float]]:
    """Errors by the dtype of the base; see the module's text."""
    runs = {dtype: Miniature(network, workdir, dtype) for dtype in DTYPES}
    targets = runs["float32"].targets()
    output, endpoints = runs["bfloat16"].output(), runs["bfloat16"].endpoints(workdir)
    rows = {}
    for dtype, run in runs.items():
        samples = run.endpoints(workdir)
        rows[dtype] = {
            "output": relative(run.output(), output),
            "endpoints": relative(samples, endpoints),
            "to_teacher": float(np.mean((samples - targets) ** 2)),
        }
        if dtype in trained:
            own = run.endpoints(trained[dtype])
            rows[dtype]["trained_to_teacher"] = float(np.mean((own - targets) ** 2))
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The errors as a Markdown table."""
    heads = {"output": "output", "endpoints": "endpoints", "to_teacher": "to the teacher"}
    if any("trained_to_teacher" in row for row in rows.values()):
        heads["trained_to_teacher"] = "trained on it"
    lines = [f"| base | {' | '.join(heads.values())} |", "| --- |" + " ---: |" * len(heads)]
    for dtype, row in rows.items():
        cells = [f"{row[key]:.2%}" for key in ("output", "endpoints")]
        cells += [f"{row[key]:.5f}" if key in row else "-" for key in list(heads)[2:]]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=("flux", "qwen_image"))
    parser.add_argument("workdir")
    parser.add_argument("--trained", action="append", default=[], metavar="DTYPE=DIR")
    options = parser.parse_args()
    trained = dict(given.split("=", 1) for given in options.trained)
    rows = measured(options.network, options.workdir, trained)
    harness.write("quantized", harness.load("quantized") | {options.network: rows})
    print(table(rows))


if __name__ == "__main__":
    main()
