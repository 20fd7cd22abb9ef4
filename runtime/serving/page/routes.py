"""The page at `/`: a few files, read once, under a policy that lets nothing from elsewhere in."""

from importlib import resources

from fastapi import APIRouter, Response

__all__ = ["page_routes"]

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SCRIPTS = ("page.js", "api.js", "elements.js", "history.js", "stage.js", "tray.js")
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """Gives `/`, and the files that it loads from `/page/`. They hold no secret: no key is asked."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files(__package__)

    def add(path: str, name: str) -> None:
        content = (folder / name).read_bytes()
        media_type = _TYPES[name.rpartition(".")[2]]

        async def answer() -> Response:
            return Response(content, media_type=media_type, headers=_HEADERS)

        router.add_api_route(path, answer, methods=["GET", "HEAD"], name=name)

    add("/", "index.html")
    for name in ("page.css", "icon.svg", *_SCRIPTS):
        add(f"/page/{name}", name)
    return router
