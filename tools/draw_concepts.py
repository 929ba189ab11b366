"""Draws the figures of docs/concepts.md and docs/method.md: teacher and student in the plane.

    python tools/draw_concepts.py            # writes docs/images/concept_*.png; a minute on a core

The script runs `examples/plane.py` and draws its networks, policies and rollouts. Intervals are
those of the package. Needs `pip install -e ".[notebooks]"` (Matplotlib).
"""

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from piflow_jax.flow.imitation import intervals_from_uniforms
from piflow_jax.flow.schedule import TimeWarp, sampling_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
TEACHER, STUDENT = "tab:blue", "tab:orange"
LIMIT = 2.9
MODES = "modes of the data"


def plane_example() -> dict[str, Any]:
    """Names of `examples/plane.py` after it has run: `teacher`, `policy_at`, `params`, ..."""
    return runpy.run_path(str(ROOT / "examples" / "plane.py"))


def path_of(velocity, x: jax.Array, steps: int = 128) -> np.ndarray:
    """States `[steps + 1, B, 2]` of Euler's method from noise to data."""
    times = jnp.linspace(1, 0, steps + 1)

    def step(x, ends):
        t, after = ends
        x = x + (after - t) * velocity(x, jnp.full(len(x), t))
        return x, x

    _, states = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return np.concatenate([x[None], states])


def plane(ax, names: Mapping[str, Any], title: str) -> None:
    """The teacher's six modes, and the common frame of all panels."""
    ax.plot(*names["centres"].T, "o", ms=13, mfc="none", mec="0.6", zorder=0, label=MODES)
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)


def draw_trajectories(names: Mapping[str, Any]):
    """The same noise by many evaluations, by one, and by the policy of one."""
    noise, teacher = names["noise"][:40], names["teacher"]
    policy = names["policy_at"](names["params"], noise, jnp.ones(len(noise)))
    paths = {
        "teacher, 128 evaluations": (path_of(teacher, noise), TEACHER),
        "teacher, 1 evaluation": (path_of(teacher, noise, 1), TEACHER),
        "student, 1 evaluation": (path_of(policy.velocity, noise), STUDENT),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.0), layout="constrained")
    for ax, (title, (path, color)) in zip(axes, paths.items(), strict=True):
        plane(ax, names, title)
        ax.plot(*np.moveaxis(path, -1, 0), color=color, lw=0.8, alpha=0.7)
        ax.plot(*path[0].T, "o", color=color, mfc="white", ms=3.5, mew=0.8, label="noise")
        ax.plot(*path[-1].T, ".", color="black", ms=5, label="end of the path")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_mixture(names: Mapping[str, Any]):
    """The prediction of one evaluation for one noise, and the leading component over time."""
    start = jnp.array([[0.25, 0.35]])
    policy = names["policy_at"](names["params"], start, jnp.ones(1))
    path, times = path_of(policy.velocity, start)[:-1, 0], np.linspace(1, 0, 129)[:-1]
    weights = np.asarray(policy.weights(jnp.asarray(path), jnp.asarray(times)))
    means = np.asarray(policy.offsets + policy.center[:, None])[0]
    colors = plt.get_cmap("tab10").colors[: len(means)]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    plane(left, names, "the mixture over $x_0$, and the policy's path")
    for mean, weight, color in zip(means, weights[0], colors, strict=True):
        radius = 2 * float(policy.variance[0]) ** 0.5
        left.add_patch(plt.Circle(mean, radius, color=color, alpha=0.2 + 0.6 * weight, lw=0))
        # Outside of the circle of modes, where no disc and no path is.
        left.annotate(f"{weight:.2f}", 1.28 * mean, ha="center", va="center", fontsize=8)
    left.plot(*path.T, color="black", lw=1.2)
    left.plot(*path[0], "o", color="black", ms=4)
    right.stackplot(times, weights.T, colors=colors, alpha=0.7)
    right.set(xlim=(1, 0), ylim=(0, 1), xlabel="t: from noise to data", ylabel="weights $w_k$")
    right.set_title("the components' weights along that path", fontsize=10)
    return figure


def draw_imitation(names: Mapping[str, Any]):
    """How policy and teacher share the way to the queried states, by the mixing ratio."""
    del names
    figure, ax = plt.subplots(figsize=(9, 3), layout="constrained")
    states, window, one = 3, 0.08, jnp.ones(1)
    uniforms = jnp.array([[0.15, 0.45, 0.85]]), jnp.array([[0.3, 0.7]])
    for row, ratio in enumerate((1.0, 0.5, 0.0)):
        found = intervals_from_uniforms(*uniforms, one, jnp.full(1, window), ratio)
        tau = 1.0
        for i in range(states):
            ask = tau - float(found.student[0, i])
            after = ask - float(found.teacher[0, i])
            bar = {"height": 0.36, "lw": 0}
            ax.barh(row, tau - ask, left=ask, color=STUDENT, **bar)
            ax.barh(row, ask - after, left=after, color=TEACHER, **bar)
            ax.barh(row + 0.26, window, left=after - window, height=0.1, color="0.6", lw=0)
            ax.plot(ask, row, "o", color="black", ms=5)
            tau = after
    names_of_bars = (
        (STUDENT, "the policy walks, without gradient"),
        (TEACHER, "the teacher's velocity walks"),
        ("0.6", "window: the policy's mean velocity reaches here"),
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color, _ in names_of_bars]
    handles.append(plt.Line2D([], [], color="black", marker="o", ls="", ms=5))
    labels = [*(text for _, text in names_of_bars), "the teacher is asked"]
    ax.legend(handles, labels, fontsize=8, loc="upper center", ncols=2, frameon=False)
    ax.set(
        xlim=(1.02, -0.02),
        ylim=(-0.5, 3.4),
        xlabel="raw time of one segment with M = 3 states, from noise to data",
    )
    ax.set_yticks(range(3), ["r = 1", "r = 0.5", "r = 0"])
    return figure


def draw_segments(names: Mapping[str, Any]):
    """Where the network is evaluated, in noise level, for the recipes' schedules."""
    del names
    rows = [
        ("ImageNet, 1 evaluation", 1, 1.0, 1.0),
        ("ImageNet, 2 evaluations", 2, 1.0, 1.0),
        ("FLUX and Qwen-Image, 4:\nshift 3.2, last segment half as long", 4, 3.2, 0.5),
    ]
    figure, ax = plt.subplots(figsize=(9, 2.7), layout="constrained")
    for row, (_, nfe, shift, last) in enumerate(rows):
        times = sampling_times(nfe, TimeWarp(shift), last)
        for src, to in zip(times.src, times.to, strict=True):
            ax.barh(-row, src - to, left=to, height=0.45, color=STUDENT, ec="white", lw=2)
            ax.plot(src, -row, "o", color="black", ms=5)
            ax.annotate(f"{src:.2g}", (src, -row + 0.28), ha="center", va="bottom", fontsize=8)
    ax.set_yticks([-row for row in range(len(rows))], [name for name, *_ in rows], fontsize=9)
    ax.set(xlim=(1.02, -0.02), ylim=(-2.5, 0.75), xlabel="t: from noise to data")
    bars = plt.Rectangle((0, 0), 1, 1, color=STUDENT)
    dots = plt.Line2D([], [], color="black", marker="o", ls="", ms=5)
    names = ["a segment: the policy is rolled out", "the network is evaluated"]
    figure.legend([dots, bars], names[::-1], loc="outside upper center", ncols=2, frameon=False)
    return figure


FIGURES = {
    "concept_trajectories": draw_trajectories,
    "concept_mixture": draw_mixture,
    "concept_imitation": draw_imitation,
    "concept_segments": draw_segments,
}


def write(names: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws all figures.

    Args:
        names: see `plane_example`.
        folder: where the PNG files go.

    Returns:
        The files.
    """
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(names)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return paths


def main() -> int:
    """The command line."""
    print(*write(plane_example(), ROOT / "docs" / "images"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
