"""The page at ``/``, the browser client in ``/static``, and Swagger UI with local files."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from litestar import MediaType, Response, get
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.params import FromPath
from litestar.response import File
from litestar.response.file import ASGIFileResponse
from litestar.static_files import create_static_files_router

from ..app import NotFound, Parts, StartupError

STATIC = Path(__file__).parent.with_name("static")
SWAGGER = Path(cast(ModuleSpec, find_spec("swagger_ui")).origin or "").with_name("static")
SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

SWAGGER_HEADERS = {
    **PAGE_HEADERS,
    # Swagger UI has inline scripts, styles, and pictures.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
}


def mount(parts: Parts) -> None:
    """Raise StartupError if what the page needs is not there."""
    if not STATIC.is_dir() or find_spec(".websocket", __package__) is None:
        raise StartupError("extras/page.py takes the folder static and extras/websocket.py; put them in place")
    files = create_static_files_router("/static", [STATIC], after_request=with_page_headers)
    parts.pages += [page, files, swagger_file]
    parts.headers["/schema"] = SWAGGER_HEADERS
    parts.openapi_pages.append(
        SwaggerRenderPlugin(
            path="/swagger",
            css_url=f"/schema/assets/{SWAGGER_FILES[0]}",
            js_url=f"/schema/assets/{SWAGGER_FILES[1]}",
            standalone_preset_js_url=f"/schema/assets/{SWAGGER_FILES[2]}",
            favicon='<link rel="icon" href="data:,">',
        )
    )


@get("/", include_in_schema=False, media_type=MediaType.HTML)
async def page() -> Response[bytes]:
    return with_page_headers(Response((STATIC / "index.html").read_bytes(), media_type=MediaType.HTML))


def with_page_headers(response: Response[Any]) -> Response[Any]:
    """Browsers revalidate each file, because a new version of the service has new files under the same names."""
    response.headers.update(PAGE_HEADERS)
    if isinstance(response, ASGIFileResponse) and str(response.file_path).endswith(".d.ts"):
        response.headers["Content-Type"] = "text/plain; charset=utf-8"  # not video/mp2t, the type of other .ts files
    return response


@get("/schema/assets/{name:str}", include_in_schema=False)
async def swagger_file(name: FromPath[str]) -> File:
    if name not in SWAGGER_FILES:
        raise NotFound(f"There is no file {name!r}.")
    return File(SWAGGER / name, filename=name, content_disposition_type="inline")
