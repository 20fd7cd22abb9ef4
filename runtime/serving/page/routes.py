"""The page at `/`: a few files, read once, under a policy that lets nothing from elsewhere in."""

from importlib import resources

from fastapi import APIRouter, Response

__all__ = ["PAGE_PATHS", "page_routes"]

_SCRIPTS = ("page.js", "api.js", "elements.js", "history.js", "mask.js", "stage.js", "tray.js")
_FILES = {"/": "index.html"} | {
    f"/page/{name}": name for name in ("page.css", "icon.svg", *_SCRIPTS)
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "same-origin",
}

PAGE_PATHS = frozenset(_FILES)
"""They hold no secret: the page itself asks for the key."""


def page_routes() -> APIRouter:
    """Gives `/`, and what it loads from `/page/`."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files(__package__)

    def add(path: str, name: str) -> None:
        content = (folder / name).read_bytes()
        media_type = _TYPES[name.rpartition(".")[2]]

        async def answer() -> Response:
            return Response(content, media_type=media_type, headers=_HEADERS)

        router.add_api_route(path, answer, methods=["GET", "HEAD"], name=name)

    for path, name in _FILES.items():
        add(path, name)
    return router
