"""The machine that the launch scripts' tests run them on."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.launch.fakes import (
    GCLOUD,
    LAUNCH,
    PROGRAM,
    RECORD,
    ROOT,
    SRUN,
    install,
    processes,
)


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
