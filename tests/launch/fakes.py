"""Fake gcloud, Slurm and xpk for the tests of the launch scripts, and what they leave behind.

The fakes record their arguments and do on this machine what the real ones do elsewhere: each
worker is a home directory, and the programs started there are real processes that get real signals.
What the real tools do with these arguments is not tested.
"""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOB = [
    "--config=configs/digits.py:gm",
    "--workdir=/mnt/my runs/a",
    "--config.evaluation.teacher_steps=(1,2)",
    '--config.note=it\'s $HOME; `x` & "y" \\ *',
]
TPU = ["--zone=us-east5-a", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
XPK = ["--cluster=c", "--tpu-type=v5litepod-16"]
SCRIPTS = {
    "tpu.sh": ["run", "pod", *TPU],
    "gpu.sh": [],
    "xpk.sh": ["run", "pod", *XPK],
}

# In place of Python with piflow_jax. $FAKE/behaviour has a line per attempt; the last one stays.
# $PPID is worker.sh.
PROGRAM = """#!/usr/bin/env bash
worker="${SLURM_PROCID:-${HOME##*worker}}"
attempt=$(cat "$FAKE/attempt.$worker" 2>/dev/null || echo 0)
echo $((attempt + 1)) >"$FAKE/attempt.$worker"
trap 'echo saved; exit 0' TERM
printf '%s\\0' "$worker" "$@" >"$FAKE/start.$worker.$attempt"
mapfile -t lines <"$FAKE/behaviour"
((attempt < ${#lines[@]})) || attempt=$((${#lines[@]} - 1))
behaviour="${lines[attempt]}"
[[ $behaviour != worker1:* || $worker == 1 ]] || behaviour=wait
behaviour="${behaviour#worker1:}"
case $behaviour in
  finish) exit 0 ;;
  fail) exit 1 ;;
  wait) ;;
  stop) kill -TERM "$PPID" ;;
  preempt) echo PREEMPTED >"$FAKE/vm"; [[ ! -e $FAKE/queue ]] || echo SUSPENDED >"$FAKE/queue"
           kill -TERM "$PPID" ;;
  vanish) kill -KILL "$PPID"; exit 137 ;;
esac
for _ in {1..600}; do sleep-really 0.05; done
"""

GCLOUD = """#!{python} -SE
import json, os, shutil, subprocess, sys
from pathlib import Path
fake = Path(os.environ["FAKE"])
arguments = sys.argv[1:]
with open(fake / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
group, verb = arguments[2:4]
kind = fake / ("vm" if group == "tpu-vm" else "queue")
homes = [fake / f"worker{{i}}" for i in range(2)]
option = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))

def refuse():
    # As often as the file of this verb says.
    left = fake / f"refuse.{{verb}}"
    count = int(left.read_text()) if left.exists() else 0
    if count:
        left.write_text(str(count - 1))
        sys.exit("ERROR: (gcloud.compute.tpus) UNAVAILABLE: try again")

def make_machines():
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        for path, source in [("piflow_env/bin/python", "program"), (".local/bin/uv", "uv")]:
            (home / path).parent.mkdir(parents=True)
            shutil.copy(fake / source, home / path)
    (fake / "vm").write_text("READY\\n")

if verb == "describe":
    if not kind.exists():
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found")
    print(kind.read_text().strip())
elif verb == "create":
    left = fake / "capacity"
    if left.exists():
        count = int(left.read_text())
        left.write_text(str(count - 1))
        if count <= 0:
            sys.exit("ERROR: no capacity")
    make_machines()
    if group == "queued-resources":
        kind.write_text((fake / "grant").read_text() if (fake / "grant").exists() else "ACTIVE")
elif verb == "start":
    refuse()
    make_machines()
elif verb == "delete":
    refuse()
    for path in {{kind, fake / "vm"}}:
        path.unlink(missing_ok=True)
elif verb == "scp":
    source, target = arguments[4:6]
    for home in homes:
        shutil.copy(source, home / target.partition(":")[2])
elif verb == "ssh":
    refuse()
    if (fake / "vm").read_text().strip() != "READY":
        sys.exit("ERROR: cannot connect")
    chosen = homes if option["worker"] == "all" else [homes[int(option["worker"])]]
    codes = []
    for home in chosen:
        environment = os.environ | {{"HOME": str(home)}}
        # To the end of its output, as ssh does: who keeps it open in the background hangs here.
        done = subprocess.run(["bash", "-c", option["command"]], env=environment,
                              stdout=subprocess.PIPE if len(chosen) > 1 else None, text=True)
        print(done.stdout or "", end="", flush=True)
        codes.append(done.returncode)
        if "failed" in (done.stdout or "") and (fake / "late").exists():
            (fake / "late").unlink()
            (fake / "vm").write_text("PREEMPTED")
    sys.exit(max(codes))
else:
    sys.exit(f"unexpected {{arguments}}")
"""

SRUN = """#!{python} -SE
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
ranks = [subprocess.Popen(words, env=os.environ | {{"SLURM_PROCID": str(i)}}) for i in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""

RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$FAKE/{name}.$(ls "$FAKE" | grep -c '^{name}\\.')"
{then}
"""


SLOW_TO_LEAVE = """#!/usr/bin/env bash
trap 'told=1' TERM
touch "$1"
until [[ ${told:-} ]]; do sleep-really 0.05; done
for _ in {1..10}; do sleep-really 0.05; done
exit 0
"""


def install(path, text):
    path.write_text(text)
    path.chmod(0o755)


def environment(fake):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return kept | {"FAKE": str(fake), "PATH": f"{fake / 'bin'}:{os.environ['PATH']}"}


def processes(fake):
    """Living processes that were started under the fake."""
    mark = f"FAKE={fake}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def launch(script, *arguments, fake=None):
    return subprocess.run(
        ["bash", str((fake / "checkout/launch" if fake else LAUNCH) / script), *arguments],
        env=environment(fake) if fake else None,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def behave(fake, *attempts):
    (fake / "behaviour").write_text("".join(f"{line}\n" for line in attempts))


def starts(fake):
    """Arguments of the program per (worker, attempt)."""
    return {
        tuple(path.name.split(".")[1:]): path.read_text().split("\0")[1:-1]
        for path in fake.glob("start.*")
    }


def calls(fake, *verbs):
    """gcloud's (group, verb), those of the given verbs only."""
    lines = (fake / "calls").read_text().splitlines()
    return [tuple(w[2:4]) for w in map(json.loads, lines) if not verbs or w[3] in verbs]


def recorded(fake, name):
    return [
        path.read_text().split("\0")[:-1]
        for path in sorted(fake.glob(f"{name}.*"), key=lambda p: int(p.suffix[1:]))
    ]


def printed(output):
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
