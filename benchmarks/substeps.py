"""How many substeps a trained student's rollouts need, by solver.

    python -m benchmarks.substeps NAME=WORKDIR...

samples each run's student at its trained NFE with the same noise and 4 to 128 substeps, and
measures the root mean square distance of the samples from those of 1,024 second-order substeps. It
keeps the figures in `benchmarks/results/substeps.json` and draws `docs/images/substeps.png`.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import piflow_jax

HERE = Path(__file__).parent
SOLVERS = ("euler", "multistep")
SUBSTEPS = (4, 8, 16, 32, 64, 128)
FINEST = 1024
SAMPLES = 64


def measure(workdir: str) -> dict:
    """Errors of one student, by solver."""
    student = piflow_jax.load(workdir)
    labels = np.arange(SAMPLES) % student.settings.data.num_classes

    def sample(substeps, solver):
        return student.sample(0, labels, substeps=substeps, solver=solver)

    limit = sample(FINEST, "multistep")
    found = {
        solver: [float(jnp.sqrt(jnp.mean((sample(n, solver) - limit) ** 2))) for n in SUBSTEPS]
        for solver in SOLVERS
    }
    return {
        "policy": student.settings.policy.kind,
        "nfe": student.settings.train.nfe,
        "rms": float(jnp.sqrt(jnp.mean(limit**2))),
        "substeps": SUBSTEPS,
        "samples": SAMPLES,
        "finest": FINEST,
        "errors": found,
    }


def draw(results: dict[str, dict], path: Path) -> None:
    """The figure: a panel for each student."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(4 * len(results), 3.4), squeeze=False, layout="constrained"
    )
    for axes, (name, found) in zip(panels[0], results.items(), strict=True):
        for solver, marker in zip(SOLVERS, "os", strict=True):
            axes.loglog(found["substeps"], found["errors"][solver], f"{marker}-", label=solver)
        axes.set(title=name, xlabel="substeps", ylabel="RMS distance from the limit")
        axes.set_xticks(found["substeps"], [str(n) for n in found["substeps"]], minor=False)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, keeps and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="NAME=WORKDIR")
    runs = dict(run.split("=", 1) for run in parser.parse_args().runs)
    results = {name: measure(workdir) for name, workdir in runs.items()}
    found = {"jax": jax.__version__, "students": results}
    (HERE / "results" / "substeps.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(results, HERE.parent / "docs" / "images" / "substeps.png")
    for name, found in results.items():
        print(name, json.dumps(found["errors"]))


if __name__ == "__main__":
    main()
