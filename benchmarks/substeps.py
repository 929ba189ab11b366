"""How many substeps a trained student's rollouts need, by solver.

    python -m benchmarks.substeps NAME=WORKDIR...

samples each run's student at its trained NFE with the same noise and 4 to 128 substeps, and
measures the root mean square distance of the samples from those of 1,024 second-order substeps. It
keeps the figures in `benchmarks/results/substeps.json` and draws `docs/images/substeps.png`. Most
of the time goes into compiling 13 samplers for each student.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
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


def table(results: dict[str, dict]) -> str:
    """The errors as Markdown, and from how many substeps `multistep` is as near as Euler's most."""
    lines = [
        f"| student | policy | NFE | solver | {' | '.join(map(str, SUBSTEPS))} | as near from |",
        "| --- | --- | ---: | --- |" + " ---: |" * (len(SUBSTEPS) + 1),
    ]
    for name, found in results.items():
        errors = found["errors"]
        enough = [
            substeps
            for substeps, error in zip(SUBSTEPS, errors["multistep"], strict=True)
            if error <= errors["euler"][-1]
        ]
        for solver in SOLVERS:
            head = f"{name} | {found['policy']} | {found['nfe']}" if solver == "euler" else " | |"
            values = " | ".join(f"{error:.4f}" for error in errors[solver])
            last = "" if solver == "euler" else str(min(enough, default="-"))
            lines.append(f"| {head} | {solver} | {values} | {last} |")
    return "\n".join(lines)


def draw(results: dict[str, dict], path: Path) -> None:
    """The figure: a panel for each student, on the same axes."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    columns = min(len(results), 3)
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 2.9 * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.ravel()[len(results) :]:
        axes.axis("off")
    for axes, (name, found) in zip(panels.ravel(), results.items(), strict=False):
        for solver, marker in zip(SOLVERS, "os", strict=True):
            axes.loglog(found["substeps"], found["errors"][solver], f"{marker}-", label=solver)
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(found["substeps"], [str(n) for n in found["substeps"]])
        axes.grid(alpha=0.3)
    figure.supxlabel("substeps", fontsize=10)
    figure.supylabel("RMS distance from the limit", fontsize=10)
    lines, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False)
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
    print(table(results))


if __name__ == "__main__":
    main()
