"""The Hugging Face hub without a network: a cache in its own layout, and a service on this host."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def write_cache(cache, repo, folder, commit=COMMIT, ref="main"):
    """Puts the files of a folder into a cache as the hub's library does."""
    place = cache / f"models--{repo.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = place / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir(parents=True, exist_ok=True)
    if ref:
        (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return place / "snapshots" / commit


@contextlib.contextmanager
def service(folder, repo="owner/name", refusal=None):
    """Serves a folder as a repository; `(address, names of files that were fetched)`.

    A refusal is a status with the hub's own name of the error.
    """
    fetched = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            files = {
                str(p.relative_to(folder)): p.read_bytes()
                for p in sorted(folder.rglob("*"))
                if p.is_file()
            }
            headers, status, data = {"X-Repo-Commit": COMMIT}, 200, b""
            if refusal is not None:
                status, headers["X-Error-Code"] = refusal
            elif path in (f"/api/models/{repo}/revision/{name}" for name in ("main", COMMIT)):
                siblings = [{"rfilename": name} for name in files]
                data = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith(f"/api/models/{repo}/tree/"):
                entries = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
                data = json.dumps(entries).encode()
            elif (name := path.partition(f"/{repo}/resolve/")[2].partition("/")[2]) in files:
                data = files[name]
                headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
                fetched.extend([name] if body else [])
            else:
                status, headers["X-Error-Code"] = 404, "RevisionNotFound"
            self.send_response(status)
            for header in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(*header)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
