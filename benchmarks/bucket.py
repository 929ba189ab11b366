"""A run in a bucket against the same run on a disk: how long the training loop waits.

    python -m benchmarks.bucket [--config=configs/digits.py:quick] [--delay=0.1] [KEY=VALUE ...]

starts the tests' emulator of Google Cloud Storage, which needs `".[test]"`, and trains twice, with
`--workdir` on a disk and then in the bucket, where each request takes `--delay` seconds. It prints
for each stage what the loop took, the seconds of it for which it waited for the bucket, and those
for which the stage's end then waits for its last checkpoint. It fails if files or figures of the
two runs differ. The emulator shares the machine's cores with the run. Results go to
`benchmarks/results/bucket.json`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from benchmarks import harness
from piflow_jax.runs.workdir import user_path
from tests import buckets

STAGES = ("teacher", "student")
# Of a line of metrics, what does not depend on the clock.
FIGURES = ("step", "stage", "loss", "grad_norm")
_LAST = r"{}  waited ([0-9.]+) s for its last checkpoint"


def train(config: str, workdir: str, overrides: Sequence[str]) -> tuple[float, str]:
    """Trains; returns the seconds and what was logged."""
    command = [sys.executable, "-m", "piflow_jax.main", f"--config={config}"]
    command += [f"--workdir={workdir}", *(f"--config.{word}" for word in overrides)]
    began = time.perf_counter()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began, done.stderr


def metrics(workdir: str, stage: str) -> list[dict]:
    """The lines of a stage."""
    text = (user_path(workdir) / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def waits(lines: list[dict], stage: str, said: str) -> dict[str, float]:
    """Seconds of a stage's loop, those of them that it waited for the bucket, and its end's."""
    steps = [0, *(line["step"] for line in lines)]
    pairs = zip(steps, lines, strict=False)
    last = re.search(_LAST.format(stage), said)
    return {
        "loop": sum(line["step_seconds"] * (line["step"] - before) for before, line in pairs),
        "waited": sum(line["bucket_wait"] for line in lines),
        "end": float(last[1]) if last else 0.0,
        "repeats": sum(line["bucket_repeats"] for line in lines),
    }


def table(found: dict) -> str:
    """The waits as Markdown."""
    lines = [
        f"**{found['config']}**, {found['delay']:g} s a request, {harness.where(found)}: "
        f"{found['seconds']['disk']:.0f} s on a disk and {found['seconds']['bucket']:.0f} s in the "
        f"bucket, {found['requests']:,} requests.",
        "",
        "| stage | loop, s | of it waiting for the bucket, s | share | last checkpoint, s |",
        "| --- |" + " ---: |" * 4,
    ]
    for stage, row in found["stages"].items():
        lines.append(
            f"| {stage} | {row['loop']:.1f} | {row['waited']:.2f} "
            f"| {row['waited'] / row['loop']:.2%} | {row['end']:.1f} |"
        )
    return "\n".join(lines)


def left(workdir: str) -> dict:
    """What a run leaves that another one of the same settings has to leave too."""
    root = user_path(workdir)
    names = {stage: buckets.names(root / stage) for stage in STAGES}
    found = {"files": {key: [re.sub(r"\.\d+\..*", "", n) for n in names[key]] for key in names}}
    found["files"]["run"] = [name for name in buckets.names(root) if name != "run.lock"]
    for stage in STAGES:
        found[stage] = [{k: line[k] for k in FIGURES} for line in metrics(workdir, stage)]
        steps = root / stage / "checkpoints"
        last = max(int(name) for name in buckets.names(steps) if name.isdigit())
        found[f"{stage} {last}"] = json.loads((steps / str(last) / "meta/metadata").read_text())
    report = json.loads((root / "report.json").read_text())
    for row in report["rows"]:
        del row["seconds"]
    return found | {"report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py:quick")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds of a request")
    parser.add_argument("overrides", nargs="*", help="such as train.steps=200")
    options = parser.parse_args(arguments)
    service, bucket = buckets.service(), f"gs://{buckets.BUCKET}/run"
    with tempfile.TemporaryDirectory() as disk:
        on_disk, _ = train(options.config, disk, options.overrides)
        service.delay = options.delay
        service.asked.clear()
        in_bucket, said = train(options.config, bucket, options.overrides)
        requests, service.delay = len(service.asked), 0.0
        here, there = left(disk), left(bucket)
    different = [name for name in here | there if here.get(name) != there.get(name)]
    if different:
        sys.exit(f"different on the disk and in the bucket: {', '.join(different)}")
    found = {
        "machine": harness.machine(),
        "versions": {"jax": jax.__version__},
        "config": " ".join([options.config, *options.overrides]),
        "delay": options.delay,
        "requests": requests,
        "seconds": {"disk": on_disk, "bucket": in_bucket},
        "stages": {stage: waits(metrics(bucket, stage), stage, said) for stage in STAGES},
    }
    harness.write("bucket", found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
