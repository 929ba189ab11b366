"""A bucket on the loopback address: `gcp-storage-emulator` with what it lacks, and with faults.

One server serves a process of tests, since the clients in it keep its address.
"""

import contextlib
import functools
import io
import json
import os
import re
import threading
import time
from http import server
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from piflow_jax.runs.workdir import user_path

BUCKET = "bucket"


class Service(server.ThreadingHTTPServer):
    """The service and what it does to its callers.

    Attributes:
      asked: address and object of every request, late ones of an earlier test's clients included.
      refuse_every: answers 503 to every such request; 0 to none.
      delay: seconds before each answer.
      deny: status of the answer to every write; 0 lets them through.
      deny_all: status of every answer; 0 is no such thing.
      written: called with the name of an object that is to be written; to a True it answers 503.
      read: called with the name of an object whose bytes are read.
    """

    daemon_threads = True

    def __init__(self, emulator):
        self.lock, self.asked = threading.Lock(), []
        storage = emulator.create_server("", 0, in_memory=True)._storage
        super().__init__(("127.0.0.1", 0), functools.partial(_handler(emulator), storage))
        self.storage = storage
        self.reset()

    def reset(self):
        from gcp_storage_emulator.handlers.buckets import create_bucket

        self.refuse_every, self.delay, self.deny, self.deny_all = 0, 0.0, 0, 0
        self.written, self.read = lambda name: False, lambda name: None
        self.storage.wipe()
        create_bucket(BUCKET, self.storage)

    def handle_error(self, request, client_address):
        """Clients go away in the middle of an answer, and are killed."""


def _handler(emulator):
    class Handler(emulator.RequestHandler):
        """The emulator's, behind the checks of generations that it does not make."""

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = property(
            lambda self: functools.partial(self.handle_method, self.command)
        )

        def handle_method(self, method):
            service = self.server
            time.sleep(service.delay)
            self.query = parse_qs(urlparse(self.path).query)
            self.body = emulator._read_raw_data(self) or b""
            self.rfile = io.BytesIO(self.body)
            del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
            self.headers["Content-Length"] = str(len(self.body))
            if method == "GET" and "media" in self.query.get("alt", ()):
                service.read(self.name())
            with service.lock:
                service.asked.append(f"{unquote(self.path)} {self.name()}")
                if service.refuse_every and len(service.asked) % service.refuse_every == 0:
                    return self.answer(503)
                if service.deny_all:
                    return self.answer(service.deny_all)
                if method in ("POST", "PUT"):
                    if service.deny:
                        return self.answer(service.deny)
                    if service.written(self.name()):
                        return self.answer(503)
                wanted = self.query.get("ifGenerationMatch")
                if wanted is not None and wanted[0] != self.generation():
                    return self.answer(412)
                return emulator.Router(self).handle(method)

        def name(self):
            """The object of this request: in its address or, of an upload, before the bytes."""
            _, _, name = urlparse(self.path).path.partition(f"/b/{BUCKET}/o")
            told = re.search(rb'"name": ?"([^"]+)"', self.body[:1000])
            told = [told[1].decode()] if told else [""]
            return unquote(name.removeprefix("/")) or self.query.get("name", told)[0]

        def generation(self):
            with contextlib.suppress(Exception):  # of the emulator's own kind: there is none
                return self.storage.get_file_obj(BUCKET, self.name())["generation"]
            return "0"

        def send_response(self, code, message=None):
            super().send_response(code, message)
            if code in (200, 206) and "media" in self.query.get("alt", ()):
                self.send_header("x-goog-generation", self.generation())

        def answer(self, status):
            body = json.dumps({"error": {"code": status, "message": "as the test has it"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


@functools.cache
def service():
    """The service of this process, which the commands that it starts find too."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it asks another service
    os.environ["NO_GCE_CHECK"] = "true"  # nor is there a machine to ask for credentials
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="no gcsfs")
    for name in ("api.object", "gcp_storage_emulator.server", "gcp_storage_emulator.storage"):
        emulator.logging.getLogger(name).setLevel(emulator.logging.CRITICAL)
    service = Service(emulator)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{service.server_address[1]}"
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = address
    return service


def names(directory):
    """What lies in a directory, wherever it is; empty where there is none."""
    directory = user_path(directory)
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []
