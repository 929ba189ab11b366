"""What `docs/extending.md` adds to the package works, and touches no more files than it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layering import PACKAGE, faults

ROOT = PACKAGE.parent
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```(python|diff) title="([^"\n]+)"\n(.*?)^```$', flags=re.M | re.S)
# By section: the files at most, and what the page's table calls it.
MOST = {
    "A new policy": (5, "policy"),
    "A new network": (6, "network"),
    "New data": (4, "data"),
    "A new rival": (2, "rival"),
}

# In a process of its own, as the package is a copy.
SCRIPT = """
import sys
import numpy as np
import piflow_jax
from piflow_jax import modes
from piflow_jax.rivals import find_method
from tests import tiny

config = tiny.get_config()
config.model = piflow_jax.config.base_config().model
config.data.name, config.policy.kind, config.model.network = "rings", "constant", "mlp"
config.model.mlp.width = 8
config.train.gm_dropout = 0.0
assert modes.run("train", config, sys.argv[1]) == 0
samples = np.asarray(piflow_jax.load(sys.argv[1]).sample(0, np.zeros(2, int)))
assert samples.shape == (2, 8, 8, 1) and np.isfinite(samples).all()
assert find_method("imitation").given == "teacher"
print(piflow_jax.__file__)
"""


def additions(section):
    """`(file, its text or hunks)` of a section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)[1]
    for language, file, content in BLOCK.findall(body):
        yield file, content if language == "python" else content.split("@@\n")


def patched(text, hunk):
    """A file after a hunk, whose old lines it has once."""
    lines = hunk.splitlines(keepends=True)
    old, new = (
        "".join(line[1:] or "\n" for line in lines if line[0] in kept) for kept in (" -", " +")
    )
    assert text.count(old) == 1, f"the file has {text.count(old)} times:\n{old}"
    return text.replace(old, new)


def add(section, root):
    """Adds what a section of the page says to a copy of the repository's package."""
    for file, content in additions(section):
        path = root / file
        if isinstance(content, str):
            assert not path.exists()
            path.write_text(f'"""Of docs/extending.md."""\n\n{content}')
        else:
            for hunk in content:
                path.write_text(patched(path.read_text(encoding="utf-8"), hunk))


@pytest.mark.parametrize("section", MOST)
def test_no_more_files_are_touched_than_the_page_says(section):
    most, name = MOST[section]
    files = {file for file, _ in additions(section)}
    row = re.search(rf"^\| {name} \| (\d+)(.*?) \| `(\w+)`", PAGE.read_text("utf-8"), flags=re.M)
    assert len(files) == int(row[1]) <= most
    assert [int(n) for n in re.findall(r"or (\d+)", row[2])] == [most] * (most > len(files))


def test_all_of_the_page_is_trained_with(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "piflow_jax", ignore=ignored)
    for section in MOST:
        add(section, tmp_path)
    assert not faults(tmp_path / "piflow_jax")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.split()[-1]).is_relative_to(tmp_path)
