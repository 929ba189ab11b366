"""`report.html`: one file that holds what a run leaves, and asks for nothing else."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from piflow_jax.config import parse
from piflow_jax.distillation import page
from piflow_jax.distillation.page import write_page
from piflow_jax.evaluation import Report, Row
from piflow_jax.evaluation.evaluator import Figures
from piflow_jax.evaluation.floor import Floor
from tests import tiny

FIGURES = Figures(frechet=1.25, precision=0.5, recall=0.25, diversity=5.0)
REPORT = Report(
    rows=[Row(system="student", nfe=1, figures=FIGURES, endpoint_mse=0.004, seconds=1.0)],
    data_diversity=5.5,
    floor=Floor(frechet=0.5, precision=0.9, recall=0.9, frechet_std=0.1, half_size=9, splits=2),
    protocol={"features": "digits", "features_sha256": "0" * 64, "steps": {"student": 400}},
)


class Reader(html.parser.HTMLParser):
    """What a browser would fetch, the pictures, and whether every tag is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.links, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            data = attributes["src"].removeprefix("data:image/png;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def workdir(tmp_path):
    """A run with 400 lines of metrics, a look at every hundredth step, and a line cut short."""
    workdir = tmp_path / "a <b> & c"
    for stage in ("teacher", "student"):
        (workdir / stage).mkdir(parents=True)
        with (workdir / stage / "metrics.jsonl").open("w") as lines:
            for step in range(1, 401):
                values = {"step": step, "stage": stage, "loss": 1 / step}
                if stage == "student" and step % 100 == 0:
                    values["eval_frechet"] = 100 / step
                lines.write(json.dumps(values) + "\n")
            lines.write('{"step": 401, "loss": "NaN"}\n[3]\n{"step": 402, "lo')
    (workdir / "samples.png").write_bytes(png((60, 40)))
    return workdir


def test_a_page_has_all_of_a_run_and_opens_offline(workdir, monkeypatch):
    looks = [(step, png((step, 10))) for step in range(10, 210, 10)]
    monkeypatch.setattr(page, "logged_images", lambda directory: looks)
    config = tiny.get_config()
    path = write_page(parse(config), workdir, REPORT)
    assert path == workdir / "report.html"
    text = path.read_text()
    read = Reader(text)
    assert all(link.startswith("data:") for link in read.links) and "http" not in text
    # The samples, and of 20 looks eight from the first to the last.
    assert [picture.size[0] for picture in read.pictures][:2] == [60, 10]
    assert len(read.pictures) == 9 and read.pictures[-1].size[0] == 200
    for expected in (
        *("digits: a student of 1 evaluation", "1.250", "0.0040", "data, half against half"),
        *("Loss of the teacher", "Loss of the student", "Frechet distance of the student"),
        *("train.batch_size", "8", "steps.student", "step 400", "step 200"),
    ):
        assert expected in read.texts, expected
    assert "<b>" not in text and any("a <b> & c" in words for words in read.texts)


def test_a_line_goes_from_its_first_value_to_its_last():
    steps = np.arange(1.0, 11)
    plot = page._plot("Loss", steps, 10.0 ** (1 - steps))  # falls evenly on a logarithmic axis
    (line,) = [part for part in plot.split("<path ") if part.startswith('class="line"')]
    x, y = np.array(
        [point.split() for point in line.split('d="M')[1].split('"')[0].split("L")], float
    ).T
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)
    np.testing.assert_allclose(np.diff(y), np.diff(y)[0], atol=0.11)
    assert (y[0], y[-1]) == (page._TOP, page._HEIGHT - page._BOTTOM)
    assert x[-1] == page._WIDTH - page._RIGHT
    assert ">1<" in plot and ">1e-09<" in plot


@pytest.mark.parametrize("values", [[0.0, 0.0], [45.49, 45.48], [3.0], [-1.0, 2.0]])
def test_any_values_can_be_drawn(values):
    plot = page._plot("Loss", np.arange(1.0, len(values) + 1), np.array(values))
    assert "nan" not in plot and "inf" not in plot
    labels = page._labels(np.linspace(45.48, 45.49, 4))
    assert len(set(labels)) == 4


def test_a_run_without_figures_or_looks_has_a_page_too(workdir):
    (workdir / "teacher" / "metrics.jsonl").unlink()
    read = Reader(write_page(parse(tiny.get_config()), workdir, None).read_text())
    assert "Figures" not in read.texts and "Loss of the teacher" not in read.texts
    assert "Loss of the student" in read.texts and len(read.pictures) == 1
