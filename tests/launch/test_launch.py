"""The launch scripts: their dry runs, and whole runs against fake gcloud, Slurm and xpk.

The fakes record their arguments and do on this machine what the real ones do elsewhere: each
worker is a home directory, and the programs started there are real processes that get real signals.
What the real tools do with these arguments is not tested.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
elif verb == "delete":
    for path in {{kind, fake / "vm"}}:
        path.unlink(missing_ok=True)
elif verb == "scp":
    source, target = arguments[4:6]
    for home in homes:
        shutil.copy(source, home / target.partition(":")[2])
elif verb == "ssh":
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


@pytest.fixture
def fake(tmp_path):
    """A directory with a checkout, the fakes' executables in `bin` and what they leave behind."""
    tools = tmp_path / "bin"
    tools.mkdir()
    python = sys.executable
    # The scripts send what is committed: here, what is being tested.
    checkout = tmp_path / "checkout"
    shutil.copytree(LAUNCH, checkout / "launch")
    shutil.copy(ROOT / "setup.py", checkout)
    git = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    install(tmp_path / "program", PROGRAM)
    install(tmp_path / "uv", "#!/bin/sh\nexit 0\n")
    install(tools / "python", PROGRAM)
    install(tools / "pip", "#!/bin/sh\nexit 0\n")
    install(tools / "sleep", '#!/bin/sh\necho "$1" >>"$FAKE/slept"\nexec sleep-really 0.2\n')
    (tools / "sleep-really").symlink_to(shutil.which("sleep"))
    install(tools / "gcloud", GCLOUD.format(python=python))
    install(tools / "srun", SRUN.format(python=python))
    install(
        tools / "sbatch", RECORD.format(name="sbatch", then='cat >"$FAKE/batch"; echo "7;here"')
    )
    install(tools / "squeue", '#!/bin/sh\ncat "$FAKE/slurm" 2>/dev/null || echo RUNNING\n')
    install(tools / "scontrol", RECORD.format(name="scontrol", then=""))
    keep_code = 'for a; do case $a in --script-dir=*) cp -r "${a#*=}" "$FAKE/image" ;; esac; done'
    install(tools / "xpk", RECORD.format(name="xpk", then=keep_code))
    yield tmp_path
    for pid in processes(tmp_path):  # of a failed test
        with contextlib.suppress(ProcessLookupError):  # it may be about to go
            os.kill(pid, signal.SIGKILL)


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


# --- all scripts


def test_shellcheck():
    checker = Path(sys.executable).parent / "shellcheck"
    checker = checker if checker.exists() else shutil.which("shellcheck")
    assert checker, "pip install -e '.[test]' brings shellcheck"
    files = sorted(map(str, LAUNCH.glob("*.sh")))
    assert len(files) == 5
    done = subprocess.run([checker, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_and_executable(script):
    path = LAUNCH / script
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, "worker.sh"])
def test_help(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert not done.stderr


BAD_FOR_ALL = [
    (["--nonsense", "--", *JOB], "unknown argument '--nonsense'"),
    ([], "no arguments of the run"),
    (["--"], "no --config"),
    (["--", JOB[0]], "no --workdir"),
    (["--", JOB[1]], "no --config"),
    (["--", "--config=", JOB[1]], "no --config"),
    (["--", *JOB, "stray"], "'stray' is no argument"),
    (["--", *JOB, "--config.a=1\n2"], "line break"),
    (["--max-restarts=many", "--", *JOB], "--max-restarts must be a whole number, got 'many'"),
]
BAD = [
    *(
        (script, [*start, *bad], why)
        for script, start in SCRIPTS.items()
        for bad, why in BAD_FOR_ALL
    ),
    ("tpu.sh", [], "the first argument must be"),
    ("tpu.sh", ["fly", "pod"], "not 'fly'"),
    ("tpu.sh", ["run", *TPU, "--", *JOB], "no name"),
    ("tpu.sh", ["run", "a", "b", *TPU, "--", *JOB], "two names, 'a' and 'b'"),
    ("tpu.sh", ["run", "Pod", *TPU, "--", *JOB], "the name must be lower-case"),
    ("tpu.sh", ["run", "pod", *TPU[1:], "--", *JOB], "no --zone"),
    ("tpu.sh", ["run", "pod", *TPU[::2], "--", *JOB], "no --type"),
    ("tpu.sh", ["run", "pod", *TPU[:2], "--", *JOB], "no --version"),
    ("tpu.sh", ["run", "pod", *TPU, "--", JOB[0], "--workdir=runs/a"], "must be absolute"),
    ("tpu.sh", ["run", "pod", *TPU, "--poll=0", "--", *JOB], "--poll must be at least 1"),
    ("tpu.sh", ["delete", "pod"], "no --zone"),
    ("tpu.sh", ["stop", "pod", "--zone=z", "--", *JOB], "stop takes no arguments of a run"),
    ("gpu.sh", ["--nodes=0", "--", *JOB], "must be at least 1"),
    ("gpu.sh", ["--gpus-per-node=", "--", *JOB], "--gpus-per-node must be a whole number"),
    ("gpu.sh", ["--job-name=a b", "--", *JOB], "--job-name may have"),
    ("xpk.sh", [], "the first argument must be"),
    ("xpk.sh", ["run", "pod", XPK[1], "--", *JOB], "no --cluster"),
    ("xpk.sh", ["run", "pod", XPK[0], "--", *JOB], "no --tpu-type"),
    (
        "xpk.sh",
        ["run", "pod", *XPK, "--image=a", "--base-image=b", "--", *JOB],
        "exclude each other",
    ),
    ("xpk.sh", ["run", "pod", *XPK, "--", *JOB, "--config.a=$(HOME)"], "Kubernetes would change"),
    ("xpk.sh", ["logs", "pod", "--cluster=c", "--", *JOB], "logs takes no arguments of a run"),
    ("worker.sh", ["run"], "no command"),
    ("worker.sh", ["state"], "no --dir"),
    ("worker.sh", ["fly"], "not 'fly'"),
]


@pytest.mark.parametrize(("script", "arguments", "why"), BAD)
def test_bad_arguments(script, arguments, why):
    done = launch(script, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    first, usage = done.stderr.split("\n", 1)
    assert first.startswith(f"{script}: ") or "line break" in why
    assert why in done.stderr
    assert "usage: " in usage


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing(script, fake):
    done = launch(script, *SCRIPTS[script], "--dry-run", "--", *JOB, fake=fake)
    assert done.returncode == 0
    assert not done.stderr
    assert not (fake / "calls").exists() and not list(fake.glob("*.0"))


# --- worker.sh


def test_worker_says_how_it_ended(fake):
    def worker(behaviour, *options):
        behave(fake, behaviour)
        (fake / "attempt.0").unlink(missing_ok=True)
        words = ["bash", str(LAUNCH / "worker.sh"), "run", *options, str(fake / "bin/python")]
        home = environment(fake) | {"HOME": "/worker0"}
        return subprocess.run(words, env=home, capture_output=True, timeout=60).returncode

    assert worker("finish") == 0
    assert worker("stop") == 143
    assert worker("fail") == 1
    notes = fake / "notes"
    for behaviour, status, line in [
        ("finish", 0, "finished"),
        ("stop", 0, "stopped"),
        ("fail", 1, "failed 1"),
    ]:
        assert worker(behaviour, f"--dir={notes}") == status
        assert (notes / "0").read_text() == f"{line}\n"
        assert launch("worker.sh", "state", f"--dir={notes}").stdout == f"worker: {line}\n"


def test_a_worker_that_ends_while_it_is_looked_at_is_not_lost(fake):
    notes = fake / "notes"
    notes.mkdir()
    (notes / "0.pid").write_text("1\n")
    install(fake / "bin/ps", '#!/usr/bin/env bash\necho stopped >"$FAKE/notes/0"\n')
    assert launch("worker.sh", "state", f"--dir={notes}", fake=fake).stdout == "worker: stopped\n"


def test_a_second_sigterm_does_not_end_the_wait(fake):
    """Clusters signal the supervisor and the program; neither may leave the other behind."""
    program = fake / "slow"
    install(program, SLOW_TO_LEAVE)
    words = ["bash", str(LAUNCH / "worker.sh"), "run", str(program), str(fake / "up")]
    with subprocess.Popen(words, env=environment(fake)) as worker:
        until((fake / "up").exists)
        worker.terminate()
        time.sleep(0.2)
        worker.terminate()
        assert worker.wait(30) == 143
    assert not processes(fake)


# --- tpu.sh


def remote(command):
    """The words of the program in the command that starts it on a worker."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";")
    lexer.whitespace_split = True
    words = list(lexer)
    at = words.index("piflow_jax.main")
    return words[at - 2 : words.index(";", at)]


def test_tpu_dry_run():
    options = ["--spot", "--project=p", "--delete", "--create-flag=--network=my net"]
    options += ["--setup=mount it", "--dry-run"]
    done = launch("tpu.sh", "run", "pod", *TPU, *options, "--", *JOB)
    lines = printed(done.stdout)
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    place = ["--zone=us-east5-a", "--project=p"]
    describe = [*vm, "describe", "pod", *place, "--format=value(state)"]
    assert lines[0][:2] == ["git", "-C"]
    assert lines[1] == describe
    assert lines[2] == [*vm, "create", "pod", *place, "--accelerator-type=v5litepod-16",
                        "--version=v2-alpha-tpuv5-lite", "--spot", "--network=my net"]  # fmt: skip
    assert lines[4][3:5] == ["tpu-vm", "scp"]
    assert lines[4][6] == "pod:piflow_code.tar.gz"
    assert lines[5][:-1] == [*vm, "ssh", "pod", *place, "--quiet", "--worker=all"]
    assert lines[5][-1].endswith("; mount it")
    assert lines[6][:-1] == lines[5][:-1]
    assert remote(lines[6][-1]) == [
        "$HOME/piflow_env/bin/python", "-m", "piflow_jax.main", *JOB,
    ]  # fmt: skip
    assert lines[8] == describe
    assert lines[-1] == lines[-2] == [*vm, "delete", "pod", *place, "--quiet"]


def test_tpu_dry_run_queued():
    done = launch("tpu.sh", "run", "pod", *TPU, "--queued", "--dry-run", "--", *JOB)
    lines = printed(done.stdout)
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    assert [*queue, "describe", "pod", TPU[0], "--format=value(state.state)"] in lines
    assert [*queue, "create", "pod", TPU[0], "--node-id=pod", "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite"] in lines  # fmt: skip
    assert [*queue, "delete", "pod", TPU[0], "--force", "--quiet"] in lines


@pytest.mark.parametrize(
    ("action", "verbs"),
    [("status", ["describe", "ssh"]), ("logs", ["ssh"]), ("stop", ["ssh"]), ("delete", ["delete"])],
)
def test_tpu_other_actions(action, verbs):
    done = launch("tpu.sh", action, "pod", "--zone=z", "--worker=3", "--dry-run")
    assert [line[4] for line in printed(done.stdout)] == verbs
    if action == "logs":
        assert "--worker=3" in printed(done.stdout)[0]


def tpu(fake, *options, job=JOB):
    return launch("tpu.sh", "run", "pod", *TPU, *options, "--", *job, fake=fake)


def test_tpu_runs_to_the_end(fake):
    behave(fake, "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert starts(fake) == {(w, "0"): ["-m", "piflow_jax.main", *JOB] for w in "01"}
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]
    # The worker's copy is the committed code.
    assert (fake / "worker1/piflow_code/setup.py").exists()
    assert set((fake / "slept").read_text().split()) == {"30"}
    assert not processes(fake)


def test_tpu_deletes_when_asked(fake):
    behave(fake, "finish")
    assert tpu(fake, "--delete").returncode == 0
    assert calls(fake, "create", "delete") == [("tpu-vm", "create"), ("tpu-vm", "delete")]


def test_tpu_restarts_after_a_preemption(fake):
    behave(fake, "preempt", "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert calls(fake, "create", "delete") == [
        ("tpu-vm", "create"),
        ("tpu-vm", "delete"),
        ("tpu-vm", "create"),
    ]
    assert starts(fake).keys() == {(w, a) for w in "01" for a in "01"}
    assert len({tuple(words) for words in starts(fake).values()}) == 1
    assert not processes(fake)


def test_tpu_takes_a_crash_before_a_preemption_for_one(fake):
    behave(fake, "fail", "finish")
    (fake / "late").touch()  # the TPU's state changes just after the workers' failure was seen
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert "preempted; restart 1" in done.stderr


def test_tpu_restarts_queued_resources(fake):
    behave(fake, "preempt", "finish")
    done = tpu(fake, "--queued")
    assert done.returncode == 0, done.stderr
    assert [group for group, _ in calls(fake, "create", "delete")] == ["queued-resources"] * 3


def test_tpu_gives_up_on_a_failed_request(fake):
    behave(fake, "finish")
    (fake / "grant").write_text("FAILED")
    done = tpu(fake, "--queued")
    assert done.returncode == 1
    assert "the queued resource pod failed" in done.stderr
    assert not starts(fake)


def test_tpu_restarts_on_the_same_machine(fake):
    """SIGTERM without a pre-emption: stopped is not finished."""
    behave(fake, "stop", "finish")
    done = tpu(fake)
    assert done.returncode == 0, done.stderr
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]
    assert len(starts(fake)) == 4


@pytest.mark.parametrize("behaviour", ["fail", "worker1:fail"])
def test_tpu_does_not_restart_a_failure(fake, behaviour):
    behave(fake, behaviour)
    done = tpu(fake)
    assert done.returncode == 1
    assert "the program failed on pod" in done.stderr
    assert starts(fake).keys() == {("0", "0"), ("1", "0")}
    assert calls(fake, "create", "delete") == [("tpu-vm", "create")]


def test_tpu_restarts_are_bounded(fake):
    behave(fake, "preempt")
    done = tpu(fake, "--max-restarts=2")
    assert done.returncode == 1
    assert "not restarted after 2 restarts" in done.stderr
    assert len(starts(fake)) == 6


def test_tpu_vanished_programs_are_bounded(fake):
    behave(fake, "vanish")
    done = tpu(fake)
    assert done.returncode == 1
    assert "vanished 4 times" in done.stderr
    assert len(starts(fake)) == 8


def test_tpu_capacity(fake):
    """Lacking at first, it is an error; lacking after a pre-emption, it is waited for."""
    behave(fake, "preempt", "finish")
    (fake / "capacity").write_text("0")
    done = tpu(fake)
    assert done.returncode == 1
    assert "cannot create pod" in done.stderr
    (fake / "capacity").write_text("1")
    done = tpu(fake, "--max-restarts=4")
    assert done.returncode == 1
    assert "not restarted after 4 restarts" in done.stderr
    assert calls(fake, "create").count(("tpu-vm", "create")) == 1 + 1 + 4


def test_tpu_is_watched_again_and_stopped(fake):
    behave(fake, "wait", "finish")
    words = ["bash", str(fake / "checkout/launch/tpu.sh"), "run", "pod", *TPU, "--", *JOB]
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(fake), **streams) as first:
        until(lambda: len(starts(fake)) == 2)
        # Bash forgets an interrupt that it alone got while a program ran in its foreground.
        until(lambda: first.send_signal(signal.SIGINT) or first.poll() is not None)
        assert first.returncode == 130
    with subprocess.Popen(words, env=environment(fake), **streams) as again:
        lines = []
        while "running already" not in "".join(lines):
            lines.append(again.stderr.readline())
            assert lines[-1], lines
        status = launch("tpu.sh", "status", "pod", "--zone=z", fake=fake)
        assert status.stdout.split("\n")[:3] == ["READY", "worker: running", "worker: running"]
        assert launch("tpu.sh", "stop", "pod", "--zone=z", fake=fake).returncode == 0
        assert again.wait(90) == 0
        assert "stopped on request" in again.stderr.read()
    assert len(starts(fake)) == 2
    assert "saved" in (fake / "worker0/piflow_run/log").read_text()
    until(lambda: not processes(fake))


# --- gpu.sh


def submit(fake, *options):
    done = launch("gpu.sh", f"--logs={fake / 'my logs'}", *options, "--", *JOB, fake=fake)
    assert done.returncode == 0, done.stderr
    assert "job 7;" in done.stderr
    (words,) = recorded(fake, "sbatch")
    return words


def slurm(fake, restarts=0):
    """Runs the batch script as Slurm does; returns its status and output."""
    variables = {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
    done = subprocess.run(
        ["bash", str(fake / "batch")],
        env=environment(fake) | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_gpu_dry_run_is_what_is_submitted(fake):
    options = ["--nodes=2", "--gpus-per-node=4", "--cpus-per-task=12", "--time=1-0", "--qos=q",
               "--grace=60", "--job-name=job", "--sbatch-flag=--comment=a b"]  # fmt: skip
    words = submit(fake, *options)
    logs = fake / "my logs"
    assert words == [
        "--parsable", "--job-name=job", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4",
        "--signal=TERM@60", "--requeue", "--open-mode=append", f"--output={logs}/%x-%j.log",
        "--time=1-0", "--qos=q", "--comment=a b", "--cpus-per-task=12",
    ]  # fmt: skip
    dry = launch("gpu.sh", f"--logs={logs}", *options, "--dry-run", "--", *JOB, fake=fake).stdout
    mkdir, sbatch, script = dry.split("\n", 2)
    assert shlex.split(mkdir) == ["mkdir", "-p", str(logs)]
    assert shlex.split(sbatch) == ["sbatch", *words, "<<END_OF_BATCH_SCRIPT"]
    assert script == (fake / "batch").read_text() + "END_OF_BATCH_SCRIPT\n"
    (line,) = re.findall(r"^srun .*", script, flags=re.M)
    assert shlex.split(line)[:12] == [
        "srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12", "bash", "launch/worker.sh",
        "run", "--dir=$status", "python", "-m", "piflow_jax.main", JOB[0],
    ]  # fmt: skip
    assert shlex.split(line)[11:15] == JOB


def test_gpu_batch_script_passes_shellcheck(fake):
    submit(fake)
    checker = Path(sys.executable).parent / "shellcheck"
    checker = checker if checker.exists() else shutil.which("shellcheck")
    done = subprocess.run(
        [checker, "--exclude=SC2016", fake / "batch"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_gpu_finishes(fake):
    submit(fake, "--setup=export SET_UP=1")
    behave(fake, "finish")
    code, output = slurm(fake)
    assert code == 0 and "launch: finished" in output
    assert starts(fake) == {(w, "0"): ["-m", "piflow_jax.main", *JOB] for w in "01"}
    assert not recorded(fake, "scontrol")


def test_gpu_goes_back_into_the_queue(fake):
    submit(fake)
    behave(fake, "stop", "finish")
    assert slurm(fake)[0] == 0
    assert recorded(fake, "scontrol") == [["requeue", "7"]]
    code, output = slurm(fake, restarts=1)
    assert code == 0 and "launch: finished" in output
    assert len(recorded(fake, "scontrol")) == 1
    assert starts(fake).keys() == {(w, a) for w in "01" for a in "01"}


def test_gpu_does_not_restart_a_failure(fake):
    submit(fake)
    behave(fake, "worker1:fail")
    (fake / "bin/srun").write_text(  # as --kill-on-bad-exit does
        (fake / "bin/srun").read_text().replace(
            "sys.exit(", "import time\nwhile ranks[1].poll() is None: time.sleep(.05)\n"
            "ranks[0].terminate()\nsys.exit("
        )
    )  # fmt: skip
    code, output = slurm(fake)
    assert code == 1 and "not restarted" in output
    assert not recorded(fake, "scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_gpu_leaves_a_cancelled_job_alone(fake, state):
    submit(fake)
    behave(fake, "stop")
    (fake / "slurm").write_text(state)
    assert slurm(fake)[0] == 0
    assert not recorded(fake, "scontrol")


def test_gpu_restarts_are_bounded(fake):
    submit(fake, "--max-restarts=2")
    behave(fake, "stop")
    assert slurm(fake, restarts=1)[0] == 0
    assert len(recorded(fake, "scontrol")) == 1
    code, output = slurm(fake, restarts=2)
    assert code == 1 and "not restarted after 2 restarts" in output
    assert len(recorded(fake, "scontrol")) == 1


def test_gpu_needs_the_processes_statuses(fake):
    submit(fake)
    install(fake / "bin/srun", "#!/bin/sh\nexit 0\n")
    code, output = slurm(fake)
    assert code == 1 and "no process left its status" in output


# --- xpk.sh


def test_xpk_submits_the_committed_code(fake):
    (fake / "checkout/scratch").touch()
    done = launch("xpk.sh", "run", "pod", *XPK, "--num-slices=2", "--zone=z", "--max-restarts=5",
                  "--xpk-flag=--storage=my disk", "--", *JOB, fake=fake)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (words,) = recorded(fake, "xpk")
    assert words[:8] == [
        "workload", "create", "--workload=pod", "--cluster=c", "--tpu-type=v5litepod-16",
        "--num-slices=2", "--max-restarts=5", "--termination-grace-period-seconds=180",
    ]  # fmt: skip
    assert words[8:10] == ["--zone=z", "--base-docker-image=python:3.12"]
    stage = words[10].removeprefix("--script-dir=")
    assert not Path(stage).exists(), "the staged code is removed"
    assert (fake / "image/launch/worker.sh").exists()
    assert not (fake / "image/scratch").exists()
    assert "warning: changes that are not committed" in done.stderr
    command = words[11].removeprefix("--command=")
    start = [
        "pip",
        "install",
        "-q",
        "-e",
        ".[tpu]",
        "&&",
        "exec",
        "bash",
        "launch/worker.sh",
        "run",
    ]
    assert shlex.split(command) == [*start, "python", "-m", "piflow_jax.main", *JOB]
    assert words[12:] == ["--storage=my disk"]


def test_xpk_dry_run_and_a_ready_image():
    done = launch("xpk.sh", "run", "pod", *XPK, "--image=gcr.io/p/i", "--dry-run", "--", *JOB)
    (words,) = printed(done.stdout)
    assert words[:5] == ["xpk", "workload", "create", "--workload=pod", "--cluster=c"]
    assert "--docker-image=gcr.io/p/i" in words
    assert shlex.split(words[-1].removeprefix("--command="))[-4:] == JOB
    done = launch("xpk.sh", "run", "pod", *XPK, "--dry-run", "--", *JOB)
    assert [words[0] for words in printed(done.stdout)] == ["mkdir", "git", "tar", "xpk"]


@pytest.mark.parametrize(
    ("action", "start"),
    [
        ("status", "xpk workload list --cluster=c --filter-by-job=pod"),
        ("delete", "xpk workload delete --workload=pod --cluster=c --force"),
        (
            "logs",
            "kubectl logs --follow --all-containers --selector=jobset.sigs.k8s.io/jobset-name=pod",
        ),
    ],
)
def test_xpk_other_actions(action, start):
    done = launch("xpk.sh", action, "pod", "--cluster=c", "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith(start)


def test_xpk_container_status_decides_about_the_restart(fake):
    """xpk restarts on 42 and 127 to 255, so a stop must be 143 and an error stay what it is."""
    assert launch("xpk.sh", "run", "pod", *XPK, "--", *JOB, fake=fake).returncode == 0
    command = recorded(fake, "xpk")[0][-1].removeprefix("--command=")
    behave(fake, "finish", "fail", "wait")
    # As in the container: SIGTERM goes to the subshell only.
    shell = f"({command}) & child=$!; echo $child >$FAKE/child; wait $child"
    container = {"cwd": fake / "image", "env": environment(fake) | {"HOME": "/worker0"}}
    assert subprocess.run(["bash", "-c", shell], **container).returncode == 0
    assert subprocess.run(["bash", "-c", shell], **container).returncode == 1
    with subprocess.Popen(["bash", "-c", shell], **container) as pod:
        until((fake / "start.0.2").exists)
        os.kill(int((fake / "child").read_text()), signal.SIGTERM)
        assert pod.wait(30) == 143
    assert not processes(fake)
