"""The page: files that the server sends as they are, with a policy under which nothing else runs or is asked."""

from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

MODULES = ("page.js", "answers.js", "cuts.js", "place.js", "server.js", "share.js")
FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", *MODULES)}  # by path
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def answer_with(name: str) -> Callable[[Request], Awaitable[Response]]:
    """A route's answer: one of the files."""
    content = (resources.files(__name__) / name).read_bytes()
    kind = KINDS[name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer
