"""The benchmark of the main job, on checkouts that only write a report."""

import json

from benchmarks import harness, main_job

# Takes half a second of a processor, and notes in `turns` that it was its turn.
JOB = """
import json, pathlib, sys, time
workdir = next(word for word in sys.argv if word.startswith("--workdir=")).split("=")[1]
while time.process_time() < 0.5:
    pass
rows = [("teacher", 1, 9.0), ("teacher", 32, {teacher}), ("student", 1, {student})]
rows = [dict(system=s, nfe=n, figures=dict(frechet=value)) for s, n, value in rows]
(pathlib.Path(workdir) / "report.json").write_text(json.dumps(dict(rows=rows)))
with open("../turns", "a") as file:
    file.write("{name}")
"""


def test_checkouts_take_turns_and_have_their_own_figures(tmp_path, monkeypatch, capsys):
    figures = {"a": (0.5, 0.6), "b": (0.2, 0.3)}
    for name, (teacher, student) in figures.items():
        package = tmp_path / name / "piflow_jax"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        code = JOB.format(name=name, teacher=teacher, student=student)
        (package / "main.py").write_text(code)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert main_job.main([*(f"{name}={tmp_path / name}" for name in figures), "--rounds=2"]) == 0
    assert (tmp_path / "turns").read_text() == "abab"
    jobs = json.loads((tmp_path / "main_job.json").read_text())["jobs"]
    assert {name: (job["teacher"], job["student"]) for name, job in jobs.items()} == figures
    assert all(min(job["processor"], job["wall"]) >= 0.5 for job in jobs.values())
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("| a | ") and first.count("| 1.00 |") == 2
    assert second.startswith("| b | ") and second.endswith("| 0.200 | 0.300 |")
