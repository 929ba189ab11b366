"""The documentation says what is so: links, keys, code blocks, and tables made of reports."""

import ast
import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import base_config, parse
from piflow_jax.rivals.base import rival_sampler, rival_setting
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.systems.datasets import load_source, shape_of
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec
from tests import gaussian, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run"


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


collect_reports = load_module(ROOT / "tools" / "collect_reports.py")
collect_rivals = load_module(ROOT / "tools" / "collect_rivals.py")


def page_id(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def python_blocks(path):
    """Code and position of the Python blocks of a page, but for those marked as not run."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^([^\n]*)\n```python[^\n]*\n(.*?)^```$", text, flags=re.M | re.S):
        if not match[1].startswith(NOT_RUN):
            line = text[: match.start(2)].count("\n")
            yield "\n" * line + match[2]  # so that a traceback has the page's line numbers


def execute(code, path, namespace):
    exec(compile(code, str(path), "exec"), namespace)
    return namespace


def anchors(path):
    """Names that links to a page's headings may have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_lead_somewhere(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_mentioned_keys_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w./])(?:--)?config\.([a-z_]\w*(?:\.[a-z_]\w*)*)", text))
    unknown = []
    for name in sorted(names - {"py"}):
        node = base_config()
        for part in name.split("."):
            if not isinstance(node, ml_collections.ConfigDict) or part not in node:
                unknown.append(name)
                break
            node = node[part]
    assert not unknown


def test_mentioned_configs_parse():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    mentioned = set(re.findall(r"configs/(\w+)\.py(?::(\w+))?", text))
    table = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").split("| variant |")[1]
    mentioned |= {("digits", name) for name in re.findall(r"^\| `(\w+)` \|", table, flags=re.M)}
    assert len(mentioned) >= 6
    for name, variant in mentioned:
        get_config = load_module(ROOT / "configs" / f"{name}.py").get_config
        parse(get_config(variant) if variant else get_config())


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    run, test = re.findall(r"```bash\n(.*?)```", text, flags=re.S)[:2]
    main = "python -m piflow_jax.main --config=configs/digits.py --workdir=runs/digits"
    assert run == f"pip install -e . && {main}\n"
    assert test == 'pip install -e ".[test]" && python -m pytest\n'


def test_extending_code_works():
    namespace = {}
    for code in python_blocks(ROOT / "docs" / "extending.md"):
        execute(code, "docs/extending.md", namespace)
    assert namespace["ConstantPolicy"]
    check_rival(namespace["IMITATION"], namespace["imitation_of_velocities"])


def check_rival(rival, loss):
    """What `extending.md` says of its rival: a loss to be tested, and a row that is enough."""
    x0, noise = jax.random.normal(jax.random.key(0), (2, 4, 3))
    t = jnp.linspace(0.1, 1.0, 4)
    assert loss(gaussian.velocity, gaussian.velocity, x0, noise, t) == 0
    assert loss(lambda x, t: gaussian.velocity(x, t) + 1, gaussian.velocity, x0, noise, t) > 0.9
    config = parse(tiny.get_config())
    data = DataShape(name="digits", sample_size=4, channels=1, num_classes=10)
    setting = rival_setting(config, data, rival)
    teacher = setting.teacher.init(jax.random.key(1))
    state = rival.init(setting, jax.random.key(2), teacher)
    images = jax.random.normal(jax.random.key(3), (4, *data.shape))
    batch = {"x": images, "condition": jnp.arange(4)}
    given = {"teacher": jax.tree.map(lambda a: a + 0.1, teacher)}
    state, metrics = jax.jit(rival.step(setting))(state, given, jax.random.key(4), batch)
    assert int(state.step) == 1 and metrics["loss"] > 0 and metrics["grad_norm"] > 0
    sampler = jax.jit(rival_sampler(config, data, rival, 2))
    assert jnp.all(jnp.isfinite(sampler(state.params, images, batch["condition"])))


@pytest.fixture
def digits_run(tmp_path, monkeypatch):
    """A work directory `runs/digits` with an untrained student of the shipped config."""
    config = parse(load_module(ROOT / "configs" / "digits.py").get_config())
    data = shape_of(config, load_source(config.data))
    module = student_network(config.model, config.policy, data)
    params = jax.jit(module.init)(jax.random.key(0))
    workdir = tmp_path / "runs" / "digits"
    with Checkpointer(checkpoint_dir(workdir, "student")) as checkpointer:
        spec = student_spec(config, data)
        checkpointer.save(1, {"ema_params": params}, data_state={}, config={}, spec=spec)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def test_readme_code_works(digits_run):
    (sampling,) = python_blocks(ROOT / "README.md")
    execute(sampling, "README.md", {})
    assert Path("digits.png").exists()


FEWER_STEPS = {
    "teacher.steps": 2,
    "train.steps": 2,
    "train.optimizer.warmup_steps": 1,
    "teacher.optimizer.warmup_steps": 1,
    "evaluation.num_samples": 64,
    "evaluation.teacher_steps": "(1,2)",
}


@pytest.mark.slow
def test_readme_run_leaves_its_picture_and_a_student(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"&& python (-m piflow_jax.main .*)", text)[1].split()
    fewer = [f"--config.{key}={value}" for key, value in FEWER_STEPS.items()]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run([sys.executable, *command, *fewer], check=True)
    assert Path("runs/digits/samples.png").exists()
    (sampling,) = python_blocks(ROOT / "README.md")
    execute(sampling, "README.md", {})
    assert Path("digits.png").exists()


@pytest.mark.slow  # continuous integration has the extra `docs` only then
def test_formulas_of_the_site_are_set():
    pytest.importorskip("latex2mathml")
    site_math = load_module(ROOT / "tools" / "site_math.py")
    formulas = []
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        fences = re.findall(r"^```math\n(.*?)^```$", text, flags=re.M | re.S)
        formulas += [("div", "[", "]", latex) for latex in fences]
        prose = re.sub(r"`[^`]*`", "", without_code(text))
        inline = re.findall(r"(?<!\$)\$([^$\n]+)\$", prose)
        formulas += [("span", "(", ")", latex) for latex in inline]
    assert len(formulas) > 50
    for tag, opening, closing, latex in formulas:
        inside = rf"\{opening}{html.escape(latex)}\{closing}"
        mathml = site_math.on_page_content(f'<{tag} class="arithmatex">{inside}</{tag}>')
        # What the converter does not know, it leaves as text.
        assert "<math" in mathml and "\\" not in mathml and "<mi>&</mi>" not in mathml, latex


@pytest.mark.slow
def test_the_plane_is_distilled_and_drawn(tmp_path):
    concepts = load_module(ROOT / "tools" / "draw_concepts.py")
    names = concepts.plane_example()
    # The text says about 0.04 and 2.0; a student that learned nothing is near the latter.
    assert jnp.mean((names["ours"] - names["many"]) ** 2) < 0.08
    assert 1.9 < jnp.mean((names["once"] - names["many"]) ** 2) < 2.1
    paths = concepts.write(names, tmp_path)
    shown = set()
    for page in ("concepts", "method"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        shown |= set(re.findall(r"\(images/(.*?)\)", text))
    assert shown == {path.name for path in paths}
    for path in paths:
        with Image.open(path) as drawn, Image.open(ROOT / "docs" / "images" / path.name) as kept:
            assert drawn.size == kept.size and drawn.convert("L").getextrema()[0] < 100
    # The weights in them are those of the policy: with them, its x_0.
    x, t = jnp.array([[0.7, -0.4]]), jnp.array([0.4])
    policy = names["policy_at"](names["params"], names["noise"][:1], jnp.ones(1))
    states, times = np.stack([names["noise"][0], x[0]]), np.array([1.0, 0.4])
    _, weights = concepts.component_weights(policy, states, times)
    means, v = np.asarray(policy.offsets + policy.center[:, None])[0], float(policy.variance[0])
    # At s = 1: zeta = ((1 - t) / t)^2 and nu = (1 - t) x / t^2.
    components = (v * 0.6 * np.asarray(x) / 0.16 + means) / (v * (0.6 / 0.4) ** 2 + 1)
    np.testing.assert_allclose(
        x - 0.4 * policy.velocity(x, t), (weights @ components)[None], atol=1e-4
    )


def test_teachers_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distil, describe = python_blocks(ROOT / "docs" / "teachers.md")
    assert execute(distil, "docs/teachers.md", {})["student"].sample(0, 3).shape == (3, 2)
    assert (tmp_path / "runs" / "points" / "samples.png").is_file()
    assert execute(describe, "docs/teachers.md", {})["samples"].shape == (4, 2)


def test_distil_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = python_blocks(ROOT / "docs" / "distil.md")
    names = execute(example, "docs/distil.md", {})
    # Normal noise becomes data of half its spread, by the teacher and by the student.
    assert abs(names["once"].std() - 0.5) < 0.03
    assert abs(names["student"].sample(0, 1000).std() - 0.5) < 0.05
    assert (tmp_path / "runs" / "own" / "samples.png").is_file()


def literals(path):
    """Strings of a module as a user would see them, with an ellipsis for each inserted value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (
                part.value if isinstance(part, ast.Constant) else "..." for part in node.values
            )
            yield "".join(parts).removeprefix("error: ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_has_messages_that_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = {text for path in (ROOT / "piflow_jax").rglob("*.py") for text in literals(path)}
    theirs = {  # of other libraries, or of Python
        "in_specs passed to shard_map",
        "does not match the specs of the input",
        "Unable to initialize backend 'tpu'",
        "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed",
        "No module named 'gradio'",
        "'matplotlib'",
        "'nbclient'",
    }
    messages = [" ".join(m.split()) for m in re.findall(r"\*\*`(.*?)`\*\*", text, flags=re.S)]
    assert len(messages) >= 60 and theirs < set(messages)
    unknown = []
    for message in set(messages) - theirs:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), flags=re.S)
        # Quoted whole, or its beginning: nobody looks for a message by its middle.
        if not any(pattern.match(text) for text in ours):
            unknown.append(message)
    assert not unknown


def table_rows(text, names):
    """Cells of a table's rows whose first one is one of the names, by name."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.M)
    found = {name: cells.split(" | ") for name, cells in rows if name in names}
    assert set(found) == set(names)
    return found


def test_recipes_are_those_of_the_configs_and_reports():
    paper, ours = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("digits:begin")
    imagenet = load_module(ROOT / "configs" / "imagenet.py")
    variants = [name for name in imagenet.VARIANTS if name != "runlocal"]
    for name, cells in table_rows(paper, variants).items():
        config = parse(imagenet.get_config(name))
        train, teacher, policy = config.train, config.teacher, config.policy
        size = f"K = {policy.num_components}" if policy.kind == "gm" else f"N = {policy.num_grid}"
        low, high = teacher.guidance_interval
        assert cells == [
            f"{policy.kind.upper()}, {size}",
            f"{train.gm_dropout}",
            f"{train.window_substeps}",
            f"{teacher.guidance_scale}",
            f"{low:g} to {high:g}",
            f"{train.nfe}",
            f"{train.steps}",
        ]
    digits = load_module(ROOT / "configs" / "digits.py")
    variants = [name for name in digits.VARIANTS if name != "rivals"]  # of which there are many
    for name, (ratio, endpoint) in table_rows(ours, variants).items():
        report = ROOT / "docs" / "results" / f"digits_{name}_seed0.json"
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        (student,) = (row for row in rows if row["system"] == "student")
        (many,) = (row for row in rows if (row["system"], row["nfe"]) == ("teacher", 128))
        frechet = student["figures"]["frechet"] / many["figures"]["frechet"]
        assert (ratio, endpoint) == (f"{frechet:.2f}", f"{student['endpoint_mse']:.4f}")


def test_running_code_works(tmp_path, monkeypatch):
    directory = tmp_path / "runs" / "digits" / "student"
    directory.mkdir(parents=True)
    line = {"step": 20, "stage": "student", "time": 0.0, "loss": 0.5}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.chdir(tmp_path)
    (metrics,) = python_blocks(ROOT / "docs" / "running.md")
    assert execute(metrics, "docs/running.md", {})["losses"] == {20: 0.5}


def test_using_code_works(digits_run):
    names = {}
    for code in python_blocks(ROOT / "docs" / "using.md"):
        execute(code, "docs/using.md", names)
    assert names["images"].shape == names["finer"].shape == (40, 8, 8, 1)
    sampled = names["student"].sample(0, np.arange(4), noise=names["x"])
    np.testing.assert_allclose(names["end"], sampled, atol=1e-5)


def test_the_scaling_table_is_that_of_its_results(monkeypatch):
    monkeypatch.setattr(
        os, "environ", dict(os.environ)
    )  # the benchmark is for a process of its own
    monkeypatch.syspath_prepend(str(ROOT))
    scaling = load_module(ROOT / "benchmarks" / "scaling.py")
    table = scaling.table(json.loads(scaling.RESULT.read_text(encoding="utf-8")))
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_tables_are_what_the_reports_say():
    assert collect_reports.main(["--check"]) == 0
    assert collect_rivals.main(["--check"]) == 0


def rivals_report(seeds=(0, 1)):
    """A comparison of two methods whose figures are easy to recompute."""

    def row(frechet, **others):
        figures = {"frechet": frechet, "precision": 0.5, "recall": 0.25, "diversity": 4.0}
        return others | {"figures": figures, "endpoint_mse": None}

    spent = {"steps": 1234, "train_seconds": 12.0}
    rows = [
        row(base + seed, method=method, nfe=1, seed=seed, teacher_seconds=extra, **spent)
        for method, base, extra in (("meanflow", 3.0, 0.0), ("gm", 1.0, 30.0))
        for seed in seeds
    ]
    settings = {"seconds": 12.0}
    times = {"settings": settings, "clock": "cores", "device": "cpu", "cores": 2, "jax": "0.10"}
    return {
        "rows": rows,
        "teacher": [row(0.75, nfe=32)],
        "times": times,
        "data_diversity": 5.5,
        "floor": {"frechet": 0.46, "precision": 0.91, "recall": 0.92},
        "protocol": {"samples": 5000, "real_images": 1797, "seed": list(seeds)},
    }


def test_rivals_are_tabulated_by_distance(tmp_path, capsys):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    page, report = tmp_path / "docs" / "rivals.md", rivals_report()
    names = ("digits", "mnist", "ablation")
    page.write_text("".join(f"<!-- rivals:{n} -->\n<!-- rivals:{n}:end -->\n" for n in names))
    path = tmp_path / "docs" / "results" / "rivals_digits.json"
    path.write_text(json.dumps(report))
    text = collect_rivals.render(tmp_path)
    first = text.index("| 1 | **pi-Flow, GM** | 1.50 ± 0.71 | 0.500 | 0.250 | 4.00 | - | 1,234 |")
    second = text.index("| 1 | MeanFlow | 3.50 ± 0.71 |")
    assert first < second
    assert "| 12 | 42 |" in text and "| 12 | 12 |" in text
    assert "| digits | plain | 1 | 2.00 | 0.250 | - |" in text
    assert "mnist -->\nNot run yet." in text
    del report["rows"][0]
    path.write_text(json.dumps(report))
    assert collect_rivals.main(["--check", "--root", str(tmp_path)]) == 2
    assert "meanflow at 1 NFE has the seeds [1]" in capsys.readouterr().err


def report(seed, frechet):
    def row(system, nfe, scale, mse):
        figures = {"frechet": frechet * scale, "precision": 0.9, "recall": 0.8, "diversity": 5.0}
        row = {"system": system, "nfe": nfe, "figures": figures}
        return row | {"endpoint_mse": mse, "seconds": 1.25}

    return {
        "rows": [
            row("teacher", 1, 20.0, 0.5),
            row("teacher", 128, 1.0, None),
            row("student", 1, 1.5, 0.0071),
        ],
        "data_diversity": 5.5,
        "floor": {"frechet": 0.46, "precision": 0.91, "recall": 0.92},
        "protocol": {
            "data": "digits",
            "real_images": 1797,
            "samples": 5000,
            "features_sha256": "ab" * 32,
            "guidance": [1.0, 0.0, 1.0],
            "device": "cpu",
            "jax": f"0.{seed}",
            "seed": seed,
        },
    }


@pytest.fixture
def repository(tmp_path):
    """A root with a README and two seeds of a variant; a function writes further reports."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    readme = f"before\n{collect_reports.BEGIN}\nold\n{collect_reports.END}\nafter\n"
    (tmp_path / "README.md").write_text(readme)
    begin, end = collect_reports.COMPILED_BEGIN, collect_reports.COMPILED_END
    (tmp_path / "docs" / "imagenet.md").write_text(f"over\n{begin}\nold\n{end}\nunder\n")

    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "docs" / "results" / name).write_text(text)
        return ["--root", str(tmp_path)]

    write("digits_gm_seed1.json", report(1, 0.6))
    write("digits_gm_seed0.json", report(0, 0.4))
    return tmp_path, write


def test_tables_hold_means_and_ratios(repository):
    root, write = repository
    root_flag = write("digits_gm_2nfe_seed0.json", report(0, 0.4))
    assert collect_reports.main([*root_flag, "--check"]) == 1
    assert collect_reports.main(root_flag) == 0
    assert collect_reports.main([*root_flag, "--check"]) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "mean over seeds 0, 1" in readme
    assert "| **student** | 1 | 0.750 | 0.900 | 0.800 | 5.00 | 0.0071 |" in readme
    assert "| teacher | 128 | 0.500 | 0.900 | 0.800 | 5.00 | - |" in readme
    ratios = "is 1.50 times the teacher's at 128 NFE and 0.075 times the teacher's at 1 NFE."
    assert f"The student's Frechet distance at 1 NFE {ratios}" in readme
    page = (root / "docs" / "results.md").read_text()
    assert page.index("digits.py, gm\n") < page.index("digits.py, gm_2nfe\n")
    assert "| 1 | 0.900 | 0.600 | 12.000 | 1.500 | 0.075 | 0.000 | 0.000 | 0.0071 |" in page
    assert "| mean | 0.750 | 0.500 | 10.000 | 1.500 | 0.075 | 0.000 | 0.000 | 0.0071 |" in page
    assert "| data, half against half | - | 0.460 | 0.910 | 0.920 | 5.50 | - | - |" in page
    assert "| jax | 0.0, 0.1 |" in page and "| guidance | [1.0, 0.0, 1.0] |" in page
    (root / "docs" / "results.md").write_text(page + "edited")
    assert collect_reports.main([*root_flag, "--check"]) == 1


def compiled(topology, **settings):
    shares = {"teacher": 0.4, "student": 0.35, "policy": 0.2, "optimizer": 0.04, "other": 0.01}
    return {
        "topology": topology,
        "devices": 16,
        "batch_per_device": 256,
        "microbatches": 16,
        "remat": "none",
        "moment_dtype": "float32",
        "memory_bytes": {"peak": 13 * 2**30, "chip": 16 * 2**30},
        "flops": {"counted": 3.25e18, "ratio": 0.995},
        "cycles": {"total": 123456789, "shares": shares, "rollouts": 1},
        "jax": "0.1",
        "libtpu": "0.2",
    } | settings


def test_compiled_steps_have_a_table(repository):
    root, write = repository
    page = root / "docs" / "imagenet.md"
    root_flag = ["--root", str(root)]
    assert collect_reports.main(root_flag) == 0
    assert "No step has been compiled yet." in page.read_text()
    write("compile_gm_repa-v6e_4x4.json", compiled("v6e:4x4", remat="dots"))
    small = {"peak": 17 * 2**30, "chip": 16 * 2**30}
    halved = compiled("v5e:4x4", moment_dtype="bfloat16", memory_bytes=small)
    halved["libtpu_flags"] = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 --other=1"
    write("compile_gm_repa-v5e_4x4_bfloat16.json", halved)
    write("compile_gm_repa-v5e_4x4.json", compiled("v5e:4x4"))
    assert collect_reports.main([*root_flag, "--check"]) == 1
    assert collect_reports.main(root_flag) == 0
    assert collect_reports.main([*root_flag, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("over\n") and text.endswith("under\n") and "old" not in text
    first, second, third = (line for line in text.splitlines() if line.startswith("| `gm_repa`"))
    assert first == (
        "| `gm_repa` | v5e:4x4 | 16 | 256 in 16 | none | float32 | on | 13.00 of 16 | 3.250e+18 "
        "| 0.995 | 1.235e+08 | 40.0% | 35.0% | 20.0% | 4.0% | 1.0% | loop |"
    )
    assert "bfloat16 | off | 17.00 of 16, does not fit |" in second
    assert "v6e:4x4" in third and "| dots | float32 | on |" in third
    assert "Compiled with jax 0.1, libtpu 0.2." in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("digits.json", report(0, 1.0), "is not called <config>_<variant>_seed<k>.json"),
        ("digits_dx_seed3.json", report(2, 1.0), "says that its seed is 2"),
        ("mnist_gm_seed0.json", report(0, 1.0), "says that its data is digits"),
        ("digits_dx_seed0.json", "{", "is not a report (JSONDecodeError"),
        ("digits_dx_seed0.json", {"rows": []}, "is not a report (KeyError: 'floor')"),
        (
            "compile_v5e.json",
            compiled("v5e:4x4"),
            "is not called compile_<variant>-<anything>.json",
        ),
        ("compile_gm-v5e.json", {"cycles": {}}, "is not a report (KeyError: 'memory_bytes')"),
    ],
)
def test_unusable_reports_are_named(repository, capsys, name, content, message):
    _, write = repository
    assert collect_reports.main(write(name, content)) == 2
    error = capsys.readouterr().err
    assert name in error and message in error


def test_seeds_of_other_protocols_are_not_averaged(repository, capsys):
    _, write = repository
    other = report(2, 0.5)
    other["protocol"]["samples"] = 1000
    assert collect_reports.main(write("digits_gm_seed2.json", other)) == 2
    assert "seeds 0 and 2 of digits_gm differ in samples" in capsys.readouterr().err
