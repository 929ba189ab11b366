"""The page: what a call may send, and what it is answered.

A case is one line: values of the controls, a request, flags. The page of these tests draws nothing:
it notes what it is asked to draw.
"""

import io
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from piflow_jax.demo import main, make_page, serve
from piflow_jax.demo.drawings import Drawing, Row
from piflow_jax.demo.server import _Guard
from piflow_jax.demo.views import views_of

pytest.importorskip("gradio", reason='needs pip install -e ".[demo]"')

HOST = "127.0.0.1"
FRIEND = "https://example.org"


DATA = SimpleNamespace(name="digits", num_classes=10, channels=1, sample_size=8)


class Notes:
    """A drawer that notes, and waits as long as `free` is not set."""

    title, names, nfe, trained = "digits", tuple("0123456789"), 1, (1,)
    edited_from = 0.6, 1
    prompts, guidance, tempered, edits, teacher = None, 0.0, True, True, object()
    guidance_range = ()
    student = SimpleNamespace(settings=SimpleNamespace(data=DATA))

    def __init__(self):
        self.drawn, self.free = [], threading.Event()
        self.free.set()

    def samples(self, **values):
        yield "Compiling the student."
        self.free.wait(60)
        self.drawn.append(values)
        pictures = np.zeros((1, 4, 4, 1))
        facts = {"student": "digits", "seed": 0, "other_seed": 1, "nfe": 1}
        return Drawing(("3",), (Row("student", 1, pictures, pictures, 0.1),), (), facts)

    edit = morph = path = samples


@pytest.fixture(scope="module")
def served():
    """The drawer, and the address at which its page listens."""
    drawer = Notes()
    page = make_page(drawer)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    try:
        serve(page, HOST, port, origins=[FRIEND], prevent_thread_lock=True, quiet=True)
        yield drawer, f"http://{HOST}:{port}"
    finally:
        drawer.free.set()
        page.close()


def post(url, body, headers=()):
    """Status and text of the answer."""
    headers = {"Content-Type": "application/json"} | dict(headers)
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def called(url, values, name="draw"):
    """What a call comes to: the text of its events."""
    body = json.dumps({"data": values}).encode()
    status, text = post(f"{url}/gradio_api/call/{name}", body)
    assert status == 200, text
    return events_of(f"{url}/gradio_api/call/{name}", text)


def events_of(call, text):
    """The events of a call that was answered, until it is complete."""
    place = f"{call}/{json.loads(text)['event_id']}"
    with urllib.request.urlopen(place, timeout=60) as events:
        return events.read().decode()


NAMES = "label", "seed", "nfe", "substeps", "temperature", "teacher_nfe"
# Class, seed, the student's evaluations, substeps, temperature, the teacher's evaluations; and what
# is drawn, or what is said.
GOOD = (3, 5, 1, 16, 1.0, 4)
LONG = "x" * 1000
VALUES = [
    (GOOD, GOOD),
    ((3.0, 5.0, 1.0, 16.0, 1, 4.0), GOOD),
    ((3, 5, 1.4, 17.3, 0.3333, 4.9), (3, 5, 1, 16, 0.3, 5)),
    ((0, 2**31 - 1, 99, 1e9, 0.0, -7), (0, 2**31 - 1, 8, 512, 0.1, 0)),
    ((-1, 5, 3.1, 16, 1.0, 4), (-1, 5, 4, 16, 1.0, 4)),
    ((3, 2**31, 1, 16, 1.0, 4), "seed must be a whole number from 0 to 2147483647, got 2147483648"),
    ((3, -1, 1, 16, 1.0, 4), "seed must be a whole number from 0 to 2147483647, got -1"),
    ((3, 1.5, 1, 16, 1.0, 4), "seed must be a whole number"),
    ((3, 1e300, 1, 16, 1.0, 4), "seed must be a whole number"),
    ((10, 5, 1, 16, 1.0, 4), "class must be a whole number from -1 to 9, got 10"),
    ((-2, 5, 1, 16, 1.0, 4), "class must be a whole number from -1 to 9, got -2"),
    (("3", 5, 1, 16, 1.0, 4), "class must be a number, got '3'"),
    (([3], 5, 1, 16, 1.0, 4), "class must be a number"),
    ((3, None, 1, 16, 1.0, 4), "seed must be a number, got 'None'"),
    ((3, True, 1, 16, 1.0, 4), "seed must be a number, got 'True'"),
    ((3, 5, {"path": "/etc/passwd"}, 16, 1.0, 4), "student's evaluations must be a number"),
    ((3, 5, 1, float("nan"), 1.0, 4), "substeps must be a number"),
    ((3, 5, 1, 16, float("inf"), 4), "policy temperature must be a number"),
    ((3, 5, 1, 16, 1.0, LONG), "teacher's evaluations must be a number"),
]


@pytest.mark.parametrize(("sent", "came"), VALUES, ids=lambda v: str(v)[:30])
def test_values_are_put_to_the_controls_or_refused(served, sent, came):
    drawer, url = served
    drawer.drawn.clear()
    events = called(url, sent)
    if isinstance(came, str):
        assert "event: error" in events and came in events.replace("\\u0027", "'"), events
        assert len(events) < 600 and not drawer.drawn
    else:
        assert "event: complete" in events, events
        assert drawer.drawn == [dict(zip(NAMES, came, strict=True))]
        # What is compiling is said before.
        assert events.index("Compiling the student.") < events.index("event: complete")


CALL = "/gradio_api/call/draw", json.dumps({"data": GOOD}).encode()
UPLOAD = (
    "/gradio_api/upload",
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n',
)
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
# Path and body, headers, the status that answers, words.
REQUESTS = [
    (CALL, {}, 200, "event_id"),
    (CALL, {"Origin": "{url}"}, 200, "event_id"),
    (CALL, {"Origin": FRIEND}, 200, "event_id"),
    (
        CALL,
        {"Origin": "https://evil.example"},
        403,
        "calls from https://evil.example are let in by",
    ),
    (CALL, {"Origin": "null"}, 403, "--origin"),
    (CALL, {"Origin": "http://["}, 403, "--origin"),
    (CALL, {"Origin": "http://127.0.0.1:1"}, 403, "--origin"),
    ((CALL[0], b" " * 2**17), {}, 413, "at most 65536 bytes"),
    (UPLOAD, FORM, 200, "[]"),  # this page takes pictures, see below
    (UPLOAD, FORM | {"Content-Length": "10551297"}, 413, "at most 10551296 bytes"),
    (UPLOAD, FORM | {"Origin": "https://evil.example"}, 403, "--origin"),
    (("/gradio_api/component_server", b"{}"), {}, 404, "no files"),
    (("/gradio_api/call/predict", b"{}"), {}, 404, "no files"),
    (("/gradio_api//upload", b""), {}, 404, ""),
    (("/gradio_api/process_recording", b"{}"), {}, 404, "no files"),
    (("/gradio_api/stream/x", b"{}"), {}, 404, "no files"),
    (("/", b"{}"), {}, 404, "no files"),
]


@pytest.mark.parametrize(("call", "headers", "status", "words"), REQUESTS)
def test_only_the_pages_own_calls_are_let_in(served, call, headers, status, words):
    _, url = served
    headers = {name: value.replace("{url}", url) for name, value in headers.items()}
    found, text = post(url + call[0], call[1], headers)
    assert (found, words in text) == (status, True), text
    if words == "event_id":
        assert "event: complete" in events_of(url + call[0], text)


def test_a_full_queue_says_so(served):
    drawer, url = served
    drawer.free.clear()
    answers = [post(url + CALL[0], CALL[1]) for _ in range(20)]
    drawer.free.set()
    taken = [status for status, _ in answers].count(200)
    assert 8 <= taken <= 10
    assert all("Queue is full" in text for status, text in answers if status != 200)
    for status, text in answers:
        if status == 200:
            assert "event: complete" in events_of(url + CALL[0], text)


def png(size, mode="RGB", colour="white"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def sent(url, contents, name="picture.png"):
    """A picture as the page's editor sends it: uploaded, and named in a call."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    status, text = post(url + UPLOAD[0], head.encode() + contents + b"\r\n--b--\r\n", FORM)
    assert status == 200, text
    file = {"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}}
    return {"background": None, "layers": [], "composite": file, "id": None}


# A picture, or what is sent in its place; and what is said, or the values of the sample.
GREY = png((20, 30), "L", 51)
PICTURES = [
    (GREY, 0.6),  # dark on light is what the page takes first: 51 is -.6, inverted .6
    (png((16, 16), "RGBA", (9, 9, 9, 0)), -1.0),  # transparent is white
    (b"no picture", "the picture is not a readable image: its format is none that Pillow reads"),
    (b"", "it is empty"),
    (GREY[:45], "the picture is not a readable image"),
    (png((8000, 8000), "1", 1), "8000x8000 pixels"),
    (None, "draw or upload a picture first"),
    ({"background": None, "layers": [], "composite": None, "id": None}, "a picture first"),
    ({"background": None, "layers": [], "composite": {"path": ""}, "id": None}, ""),
    ({"composite": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}, ""),
    ("x", ""),
    ([1, 2], ""),
]


@pytest.mark.parametrize(("picture", "came"), PICTURES, ids=lambda v: str(v)[:24])
def test_one_picture_is_taken_by_the_one_reader(served, picture, came):
    drawer, url = served
    drawer.drawn.clear()
    what = sent(url, picture) if isinstance(picture, bytes) else picture
    events = called(url, (what, 3, 5, 0.52, 1, 1, 4), "edit")
    if isinstance(came, str):
        assert "event: error" in events and came in events, events
        assert not drawer.drawn
        return
    assert "event: complete" in events, events
    values = drawer.drawn[-1]
    assert values.pop("picture") == pytest.approx(np.full((8, 8, 1), came), abs=1e-2)
    assert values == {"label": 3, "seed": 5, "start": 0.5, "nfe": 1, "teacher_nfe": 4}


def test_pictures_that_are_sent_have_an_end(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("piflow_jax.demo.server.time.monotonic", lambda: clock[0])
    guard = _Guard(None, files=True)
    length = (b"content-length", str(10 * 2**20).encode())
    scope = {"type": "http", "method": "POST", "path": UPLOAD[0], "headers": [length]}
    answers = [guard._refusal(scope) for _ in range(30)]
    assert answers.count(None) == 25 and answers[-1][0] == 429
    clock[0] = 7201.0
    assert guard._refusal(scope) is None
    # A page without a control for pictures takes none.
    assert _Guard(None)._refusal(scope) == (404, "this page takes no files")


def test_evaluations_are_those_of_the_training_and_others():
    drawer = Notes()
    drawer.trained, drawer.nfe = (1, 3, 2), 3
    (control,) = [one for one in views_of(drawer)[0].controls if one.key == "nfe"]
    assert (control.value, [n for _, n in control.choices]) == (3, [1, 2, 3, 4, 8])
    assert control.info == "It was trained for 1, 2 and 3; others are drawn with a note."


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, {"guidance"}),
        ({"names": ()}, {"guidance", "label"}),
        ({"teacher": None}, {"guidance", "teacher_nfe"}),
        ({"tempered": False}, {"guidance", "temperature"}),
        ({"guidance": 3.5}, set()),
    ],
)
def test_controls_are_those_that_a_student_has(changes, missing):
    drawer = Notes()
    vars(drawer).update(changes)
    keys = {control.key for view in views_of(drawer) for control in view.controls}
    assert missing == {*NAMES, "guidance"} - keys


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port=busy"], r"cannot listen at 127.0.0.1, port .* in use"),
        (["--port=70000"], r"cannot listen at 127.0.0.1, port 70000"),
        (["--port=x"], r"argument --port: invalid int value: 'x'"),
        (["--host=no.such.host.invalid"], r"cannot listen at no.such.host.invalid"),
    ],
)
def test_a_place_where_it_cannot_listen_is_one_sentence(flags, words, capsys):
    with socket.socket() as busy:
        busy.bind((HOST, 0))
        busy.listen()
        flags = [flag.replace("busy", str(busy.getsockname()[1])) for flag in flags]
        with pytest.raises(SystemExit) as ended:
            main(["--checkpoint=nowhere", *flags])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2

    assert re.search(words, said), said
