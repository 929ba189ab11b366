"""The main job of several checkouts: processor seconds and wall time, in turns in one run.

    python -m benchmarks.main_job 81be43c=../old now=. [--config=configs/digits.py] [--rounds=1]

Each word is a name and a checkout of this repository. Its job runs with this Python and with the
code of that checkout, compiles everything anew, and measures teacher and student. Results go to
`benchmarks/results/main_job.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import jax

from benchmarks import harness


def job(checkout: Path, config: str) -> dict:
    """Runs the job of a checkout; returns its seconds and its figures.

    The seconds are `processor`, of all cores and child processes together, and `wall`. The figures
    are the Frechet distances of the `teacher` at most evaluations and of the `student`.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "piflow_jax.main", f"--config={config}"]
    with tempfile.TemporaryDirectory() as workdir:
        began, before = time.perf_counter(), os.times()
        subprocess.run(
            [*command, f"--workdir={workdir}"], cwd=checkout, env=environment, check=True
        )
        wall, after = time.perf_counter() - began, os.times()
        rows = json.loads((Path(workdir) / "report.json").read_text())["rows"]
    distances = {row["system"]: row["figures"]["frechet"] for row in rows}  # the last of each
    processor = sum(after[2:4]) - sum(before[2:4])  # of children, in and out of the kernel
    return {"processor": processor, "wall": wall, **distances}


def table(found: dict) -> str:
    """The jobs as Markdown, relative to the first."""
    lines = [
        f"**{found['config']}**, rounds: {found['rounds']}, {harness.where(found)}:",
        "",
        "| code | processor, s | relative | wall, s | relative | teacher, Frechet | student |",
        "| --- |" + " ---: |" * 6,
    ]
    first = next(iter(found["jobs"].values()))
    for name, row in found["jobs"].items():
        seconds = [
            f"{row[clock]:.0f} | {row[clock] / first[clock]:.2f}" for clock in ("processor", "wall")
        ]
        lines.append(
            f"| {name} | {' | '.join(seconds)} | {row['teacher']:.3f} | {row['student']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", metavar="NAME=CHECKOUT")
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=1, help="jobs of each checkout")
    options = parser.parse_args(arguments)
    checkouts = dict(word.split("=", 1) for word in options.checkouts)
    jobs = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            jobs[name].append(job(Path(checkout).resolve(), options.config))
    found = {
        "config": options.config,
        "rounds": options.rounds,
        "machine": harness.machine(),
        "versions": {"jax": jax.__version__},
        "jobs": {
            name: {key: median(run[key] for run in runs) for key in runs[0]}
            for name, runs in jobs.items()
        },
    }
    harness.write("main_job", found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
