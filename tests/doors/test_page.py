"""The page: what a call may send, and what it is answered.

A case is one line: values of the controls, a request, flags. The page of these tests draws nothing:
it notes what it is asked to draw.
"""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from piflow_jax.demo import Drawer, main, make_page, serve

pytest.importorskip("gradio", reason='needs pip install -e ".[demo]"')

HOST = "127.0.0.1"
FRIEND = "https://example.org"


class Notes:
    """A drawer that notes, and waits as long as `free` is not set."""

    prompts = None

    def __init__(self):
        data, train = SimpleNamespace(name="digits", num_classes=10), SimpleNamespace(nfe=1)
        self.student = SimpleNamespace(settings=SimpleNamespace(data=data, train=train))
        self.drawn, self.free = [], threading.Event()
        self.free.set()

    def draw(self, *values):
        self.free.wait(60)
        self.drawn.append(values)
        return np.zeros((4, 4, 3), np.uint8), f"drawn {len(self.drawn)}"


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


def called(url, values):
    """What a call of `/draw` comes to: the text of its events."""
    body = json.dumps({"data": values}).encode()
    status, text = post(f"{url}/gradio_api/call/draw", body)
    assert status == 200, text
    place = f"{url}/gradio_api/call/draw/{json.loads(text)['event_id']}"
    with urllib.request.urlopen(place, timeout=60) as events:
        return events.read().decode()


# Class, seed, the student's NFE, substeps, temperature, the teacher's NFE; and what is drawn, or
# what is said.
GOOD = (3, 5, 1, 16, 1.0, 4)
LONG = "x" * 1000
VALUES = [
    (GOOD, GOOD),
    ((3.0, 5.0, 1.0, 16.0, 1, 4.0), GOOD),
    ((3, 5, 1.4, 17.3, 0.3333, 4.9), (3, 5, 1, 16, 0.3, 5)),
    ((0, 2**31 - 1, 99, 1e9, 0.0, -7), (0, 2**31 - 1, 8, 512, 0.1, 0)),
    ((3, 2**31, 1, 16, 1.0, 4), "seed must be a whole number from 0 to 2147483647, got 2147483648"),
    ((3, -1, 1, 16, 1.0, 4), "seed must be a whole number from 0 to 2147483647, got -1"),
    ((3, 1.5, 1, 16, 1.0, 4), "seed must be a whole number"),
    ((3, 1e300, 1, 16, 1.0, 4), "seed must be a whole number"),
    ((10, 5, 1, 16, 1.0, 4), "class must be a whole number from 0 to 9, got 10"),
    ((-1, 5, 1, 16, 1.0, 4), "class must be a whole number from 0 to 9, got -1"),
    (("3", 5, 1, 16, 1.0, 4), "class must be a number, got '3'"),
    (([3], 5, 1, 16, 1.0, 4), "class must be a number"),
    ((3, None, 1, 16, 1.0, 4), "seed must be a number, got 'None'"),
    ((3, True, 1, 16, 1.0, 4), "seed must be a number, got 'True'"),
    ((3, 5, {"path": "/etc/passwd"}, 16, 1.0, 4), "student's NFE must be a number"),
    ((3, 5, 1, float("nan"), 1.0, 4), "substeps must be a number"),
    ((3, 5, 1, 16, float("inf"), 4), "policy temperature must be a number"),
    ((3, 5, 1, 16, 1.0, LONG), "teacher's NFE must be a number"),
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
        assert drawer.drawn == [came]


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
    (UPLOAD, FORM, 404, "no files"),
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


def test_a_full_queue_says_so(served):
    drawer, url = served
    drawer.free.clear()
    answers = [post(url + CALL[0], CALL[1]) for _ in range(20)]
    drawer.free.set()
    taken = [status for status, _ in answers].count(200)
    assert 8 <= taken <= 10
    assert all("Queue is full" in text for status, text in answers if status != 200)


def test_few_programs_are_kept(monkeypatch):
    """Of the teacher; `tests/test_student.py` has the student's."""
    made = []
    monkeypatch.setattr(Drawer, "_compiled", lambda self, n: made.append(n) or (lambda *_: n))
    drawer = Drawer(student=None)
    for steps in (*range(16), 0, 16, 0, *range(17, 40), 39, 0):
        assert drawer._teach(0, np.zeros(8), steps) == steps
    assert len(drawer._programs) == 16
    assert made == [*range(40), 0]  # the last to be used stay


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
