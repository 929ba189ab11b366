"""The documentation says what is so: links, keys and code blocks."""

import ast
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import piflow_jax
from piflow_jax.config import base_config, parse
from piflow_jax.rivals.base import rival_sampler, rival_setting
from piflow_jax.runs.checkpoint import Checkpointer
from piflow_jax.runs.loop import checkpoint_dir
from piflow_jax.systems.datasets import load_source, shape_of
from piflow_jax.systems.networks import student_network
from piflow_jax.systems.shapes import DataShape
from piflow_jax.systems.spec import student_spec
from tests import gaussian, tiny
from tests.modules import load_module
from tests.students import moved

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run"


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
def test_imported_names_exist(path):
    """In blocks that are not run too."""
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"^(?:from|import) piflow_jax.*$", text, re.M):
        execute(line, path, {})


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_mentioned_keys_exist(path):
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w./])(?:--)?config\.([a-z_]\w*(?:\.[a-z_]\w*)*)", text))
    unknown = []
    for name in sorted(names - {"py", "json"}):
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
    teacher = jax.jit(setting.teacher.init)(jax.random.key(1))
    state = jax.jit(lambda: rival.init(setting, jax.random.key(2), teacher))()
    images = jax.random.normal(jax.random.key(3), (4, *data.shape))
    batch = {"x": images, "condition": jnp.arange(4)}
    given = {"teacher": moved(teacher)}
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


def test_readme_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (sampling,) = python_blocks(ROOT / "README.md")
    execute(sampling, "README.md", {})
    assert Path("clothes.png").exists()


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
    assert 'piflow_jax.load("runs/digits")' in text
    assert piflow_jax.load("runs/digits").sample(0, np.arange(4)).shape == (4, 8, 8, 1)


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
    weights = np.asarray(policy.weights(x, t))[0]
    means, v = np.asarray(policy.offsets + policy.center[:, None])[0], float(policy.variance[0])
    # At s = 1: zeta = ((1 - t) / t)^2 and nu = (1 - t) x / t^2.
    components = (v * 0.6 * np.asarray(x) / 0.16 + means) / (v * (0.6 / 0.4) ** 2 + 1)
    np.testing.assert_allclose(
        x - 0.4 * policy.velocity(x, t), (weights @ components)[None], atol=1e-4
    )


def test_teachers_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (describe,) = python_blocks(ROOT / "docs" / "teachers.md")
    assert execute(describe, "docs/teachers.md", {})["samples"].shape == (4, 2)


def test_a_network_in_pytorch_is_distilled(tmp_path):
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    code = text.split("<!-- not run without PyTorch -->\n```python\n")[1].split("```")[0]
    names = execute(code, "docs/teachers.md", {})
    teacher, teacher_params = names["teacher"], names["teacher_params"]
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    labels = jnp.arange(4) % 2
    weight = np.moveaxis(names["net"].weight.detach().numpy(), (0, 1), (3, 2))
    bias = names["net"].bias.detach().numpy()
    expected = jax.lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    velocity = jax.jit(teacher.velocity)(teacher_params, x, jnp.ones(4), labels)
    np.testing.assert_allclose(velocity, np.asarray(expected) + bias, atol=1e-5)

    config = base_config()
    config.policy.num_components = 2
    config.train.steps, config.train.batch_size = 2, 4
    config.train.optimizer.warmup_steps = 1
    config.train.data_free = True
    config.evaluation.num_samples = config.evaluation.batch_size = 4
    config.evaluation.teacher_steps = (1, 2)

    class Network(nn.Module):
        outputs: int

        @nn.compact
        def __call__(self, x, t, labels):
            return nn.Dense(self.outputs)(x) + t[:, None, None, None]

    student = piflow_jax.distill(
        config,
        tmp_path,
        teacher=teacher,
        teacher_params=teacher_params,
        network=Network(piflow_jax.policy_outputs(config, channels=3)),
        source=(np.asarray(x), np.asarray(labels)),
    )
    assert np.isfinite(student.sample(0, labels)).all()


def test_distil_code_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = python_blocks(ROOT / "docs" / "distil.md")
    names = execute(example, "docs/distil.md", {})
    # Normal noise becomes data of half its spread, by the teacher and by the student.
    assert abs(names["many"].std() - 0.5) < 0.03
    student, one_step = (jnp.mean((names[x] - names["many"]) ** 2) for x in ("ours", "once"))
    assert student < 0.004 and 0.2 < one_step < 0.3  # the text says about 0.002 and 0.25
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
    beyond = ("runlocal", "gm_repa_corrected")
    variants = [name for name in imagenet.VARIANTS if name not in beyond]
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
    # More than one student, number of evaluations or guidance scale.
    several = ("rivals", "gm_any_nfe", "gm_any_guidance")
    variants = [name for name in digits.VARIANTS if name not in several]
    for name, (ratio, endpoint) in table_rows(ours, variants).items():
        report = ROOT / "docs" / "results" / f"digits_{name}_seed0.json"
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        (student,) = (row for row in rows if row["system"] == "student")
        many = [row for row in rows if row["system"] == "teacher"][-1]
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
