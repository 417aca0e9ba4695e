"""From a page to a server, and back to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from webui.folder import tidy
from webui.gate import Gate
from webui.look import CSS, make_theme
from webui.uploads import MAX_BYTES

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"
LOCAL_NAMES = (LOCAL, "localhost")
FORM_BYTES = 1 << 14  # what a form adds to the file in it
MAX_WAITING = 32  # requests in the queue
MAX_VISITORS = 256  # whose last map and results are kept, a few hundred KB each; then the oldest go
FIXED: dict[
    str, Any
] = {  # what is not said, gradio takes from the environment or decides by what it finds installed
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "num_workers": 0,
    "enable_monitoring": False,
    "show_error": False,
    "inbrowser": False,
    "quiet": True,
    "prevent_thread_lock": True,
    "footer_links": ["api"],
}


@contextmanager
def serving(
    page: gr.Blocks,
    folder: Path,
    *,
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    listen: bool = False,
    share: bool = False,
) -> Iterator[str]:
    """Serve a page and yield its address; to this machine alone, unless `listen` or `share`.

    folder  what the page reads and writes (`private_folder`)
    port    by default the first free one from 7860 on

    Raises
        ValueError  `listen` or `share` without `auth`
        OSError     no free port
    """
    if (listen or share) and auth is None:
        raise ValueError("expected a name and a password for a page that others can reach, found none")
    hosts = None if listen or share else LOCAL_NAMES
    gate = Middleware(Gate, hosts=hosts, max_upload=MAX_BYTES + FORM_BYTES, make_room=lambda: tidy(folder))
    page.queue(max_size=MAX_WAITING, api_open=False)
    try:
        page.launch(
            server_name=EVERYWHERE if listen else LOCAL,
            server_port=port,
            auth=auth,
            share=share,
            max_file_size=MAX_BYTES,
            state_session_capacity=MAX_VISITORS,
            app_kwargs={"middleware": [gate]},
            theme=make_theme(),
            css=CSS,
            **FIXED,
        )
    except OSError as error:
        taken = f"port {port} is taken" if port else "all ports from 7860 on are taken"
        raise OSError(f"expected a free port, but {taken}; name another with --port") from error
    try:
        yield str(page.share_url or page.local_url)
    finally:
        page.close(verbose=False)
