"""The package as a wheel: all of it is there, and it works where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import piflow_jax

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--quiet"]
SHORT = ["teacher.steps=2", "train.steps=2", "evaluation.num_samples=20", "train.batch_size=8"]
SHORT += ["evaluation.teacher_steps=(1,2)", "teacher.optimizer.warmup_steps=1"]
SHORT += ["train.optimizer.warmup_steps=1", "evaluation.substeps=8", "train.total_substeps=8"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of what it is made of and nothing else."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("piflow_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_has_all_of_the_package_and_its_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = (ROOT / "piflow_jax").rglob("*")
    package = [path for path in found if path.is_file() and path.suffix != ".pyc"]
    wanted = {path.relative_to(ROOT).as_posix() for path in package}
    wanted |= {f"piflow_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert wanted == {name for name in names if name.startswith("piflow_jax/")}
    assert wheel.name.startswith(f"piflow_jax-{piflow_jax.__version__}-")


@pytest.mark.slow
def test_an_installed_wheel_trains_and_samples_from_another_directory(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "elsewhere"
    here.mkdir()
    install = [*PIP, "install", *OFFLINE, "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

    def run(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    keys = [f"--config.{key}" for key in SHORT]
    done = run("-m", "piflow_jax.main", "--config=digits:quick", "--workdir=run", *keys)
    assert done.returncode == 0, done.stderr
    # No commit: there is no checkout.
    assert done.stderr.startswith(f"piflow_jax {piflow_jax.__version__}, jax "), done.stderr
    code = "import piflow_jax as p; print(p.__file__, p.load('run').sample(0, [3]).shape)"
    done = run("-c", code)
    assert done.stdout.strip() == f"{site}/piflow_jax/__init__.py (1, 8, 8, 1)", done.stderr
    missing = run("-m", "piflow_jax.main", "--config=digit", "--workdir=run")
    assert missing.returncode == 2 and "did you mean digits?" in missing.stderr
