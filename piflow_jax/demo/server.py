"""Serves the page so that it can be exposed: it takes its own calls and nothing else."""

import collections
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LARGEST_PICTURE = 10 * 2**20
"""Bytes of a picture that is sent."""

KEPT_SECONDS = 3600
"""How long files can be fetched."""

_LARGEST_CALL = 2**16  # bytes
_MOST_KEPT = 2**28  # bytes of pictures that were sent
# What a page calls.
_CALLS = re.compile(
    r"/gradio_api/(queue/join|(call|call/v2|run|api)/(draw|path|morph|edit)(_\d+)?|reset|cancel)/?"
)
_UPLOAD = re.compile(r"/gradio_api/upload/?")
_STYLE = Path(__file__).with_name("page.css")


class _Guard:
    """ASGI middleware: lets through what the page needs, from where it may come.

    Pages of other origins cannot start anything here. Files are taken where a control of the page
    has a picture, and then few at a time.

    Args:
      app: what is guarded.
      origins: other origins whose calls are let in, such as `https://example.org`; `*` is any.
      files: whether a control of the page has a picture.
    """

    def __init__(self, app: Callable, origins: Sequence[str] = (), files: bool = False):
        self._app = app
        self._origins = origins
        self._files = files
        self._taken: collections.deque[tuple[float, int]] = collections.deque()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """An ASGI call."""
        answer = self._refusal(scope) if scope["type"] == "http" else None
        if answer is None:
            return await self._app(scope, receive, send)
        status, words = answer
        kind = (b"content-type", b"text/plain; charset=utf-8")
        await send({"type": "http.response.start", "status": status, "headers": [kind]})
        await send({"type": "http.response.body", "body": words.encode()})

    def _refusal(self, scope: dict) -> tuple[int, str] | None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        upload = _UPLOAD.fullmatch(scope["path"]) is not None
        if (upload and not self._files) or (not upload and not _CALLS.fullmatch(scope["path"])):
            return 404, "this page takes no files"
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        length, most = headers.get("content-length", ""), _LARGEST_CALL
        if upload:
            most += LARGEST_PICTURE  # with what multipart lays around it
        if not length.isdecimal() or int(length) > most:
            return 413, f"a call must say its length, of at most {most} bytes"
        origin, host = headers.get("origin"), headers.get("host")
        own = None, f"http://{host}", f"https://{host}"
        if origin not in (*own, *self._origins) and "*" not in self._origins:
            return 403, f"calls from {origin[:200]} are let in by --origin alone"
        if upload and not self._has_room(int(length)):
            return 429, "too many pictures were sent; they are deleted within two hours"
        return None

    def _has_room(self, size: int) -> bool:
        """Whether a file of a size may be kept with those that are not deleted yet."""
        now = time.monotonic()
        while self._taken and self._taken[0][0] < now - 2 * KEPT_SECONDS:
            self._taken.popleft()
        if sum(taken for _, taken in self._taken) + size > _MOST_KEPT:
            return False
        self._taken.append((now, size))
        return True


def serve(page: Any, host: str, port: int, *, origins: Sequence[str] = (), **options: Any) -> Any:
    """Serves a page so that it can be exposed: it takes its own calls and nothing else.

    Args:
      page: from `make_page`.
      host: address to listen at; 0.0.0.0 is all of the machine's.
      port: port to listen at.
      origins: other origins whose calls are let in, such as `https://example.org`; `*` is any.
      options: for `gradio.Blocks.launch`.

    Returns:
      What `launch` returns.
    """
    import gradio

    files = any(isinstance(block, gradio.ImageEditor) for block in page.blocks.values())
    guard = (_Guard, (), {"origins": tuple(origins), "files": files})
    return page.launch(
        server_name=host,
        server_port=port,
        app_kwargs={"middleware": [guard]},
        css_paths=[_STYLE],
        theme=gradio.themes.Base(
            primary_hue="orange",
            neutral_hue="slate",
            font=("system-ui", "sans-serif"),
            font_mono=("ui-monospace", "monospace"),
        ),
        footer_links=["api", "gradio"],
        max_file_size=LARGEST_PICTURE,
        **options,
    )
