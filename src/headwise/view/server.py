"""Who may ask: this machine only, under the name that was printed, with small requests. Then the page is served by waitress."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headwise.errors import ViewError
from headwise.storage import StrPath
from headwise.view.explorer import Explorer
from headwise.view.library import Library
from headwise.view.live import Live

ADDRESS = "127.0.0.1"
MAX_REQUEST = 12 * 2**20  # bytes: an image of 6 MiB as base64, and what goes with it
POLICY = (
    "default-src 'self'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def make_explorer(
    paths: Sequence[StrPath], models: Sequence[tuple[Any, Any, str]] = (), stack: str | None = None
) -> Explorer:
    """The explorer of some files and at most two models, each (model, tokenizer, name)."""
    if len(models) > 2:
        raise ViewError(f"{len(models)} models were given; two can be laid side by side")
    names = [name for _, _, name in models]
    if len(set(names)) < len(names):
        names[1] += " (2)"
    lives: list[Live | None] = [
        Live(m, t, name=name, stack=stack) for (m, t, _), name in zip(models, names, strict=True)
    ]
    first, second = [*lives, None, None][:2]
    return Explorer(Library.open(paths), first, second)


def need_dash() -> None:
    """Raises ViewError where the front end is not installed."""
    missing = [name for name in ("dash", "waitress") if find_spec(name) is None]
    if missing:
        raise ViewError(f"the explorer needs {' and '.join(missing)}: pip install 'headwise[view]'")


def make_app(explorer: Explorer) -> Any:
    """The page as a Dash application, which serves all of its scripts itself. Raises ViewError where Dash is missing."""
    need_dash()
    from dash import Dash

    from headwise.view import on_compare, on_heads, on_prompt
    from headwise.view.page import layout

    app = Dash(
        "headwise", assets_folder=str(Path(__file__).parent / "assets"), serve_locally=True, title="headwise explorer",
        update_title="", meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )  # fmt: skip
    app.layout = lambda: layout(explorer)  # made anew for every load, as files may have come
    for part in (on_heads, on_prompt, on_compare):
        part.connect(app, explorer)
    return app


def guard(app: Any, port: int) -> None:
    """Refuse other hosts' names (DNS rebinding), other sites' requests and large bodies; say so to the browser in headers."""
    from flask import abort, request

    hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
    policy = POLICY.format(scripts=" ".join(app.csp_hashes()))
    app.server.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST

    @app.server.before_request
    def check() -> None:
        if request.host not in hosts:
            abort(403, f"this page answers to http://{ADDRESS}:{port} only")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            abort(403, "requests of other pages are refused")

    @app.server.after_request
    def label(response: Any) -> Any:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response


def serve(explorer: Explorer, *, port: int = 0, ready: Callable[[str], None] | None = None) -> None:
    """Serve the page on the loopback address until interrupted; port 0 takes a free one. `ready(url)` is called when it answers.

    Raises ViewError for a port that is taken.
    """
    server, url = make_server(explorer, port=port)
    if ready is not None:
        ready(url)
    try:
        server.run()
    finally:
        server.close()


def make_server(explorer: Explorer, *, port: int = 0) -> tuple[Any, str]:
    """A waitress server that is bound and not yet running, and its address; `run` and `close` are its methods."""
    app = make_app(explorer)
    from waitress.server import create_server

    taken = socket.socket()
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise ViewError(f"port {port} cannot be taken ({error}); leave --port out, and a free one is chosen") from error
    port = taken.getsockname()[1]
    guard(app, port)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a depth of one or two is no news to a reader
    return create_server(
        app.server, sockets=[taken], threads=6, max_request_body_size=MAX_REQUEST
    ), f"http://{ADDRESS}:{port}/"
