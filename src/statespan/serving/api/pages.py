"""The playground's files, as they are in the package."""

from importlib.resources import files

from fastapi import APIRouter, Response

from statespan.serving.api.errors import ApiError

TYPES = {"index.html": "text/html", "style.css": "text/css", "app.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/playground/style.css")
async def style() -> Response:
    """Its looks."""
    return _file("style.css")


@router.get("/playground/app.js")
async def script() -> Response:
    """What it does."""
    return _file("app.js")


def _file(name: str) -> Response:
    try:
        content = files("statespan.serving").joinpath("playground", name).read_bytes()
    except FileNotFoundError:
        raise ApiError(404, f"this installation lacks the playground's {name}") from None
    return Response(content, media_type=f"{TYPES[name]}; charset=utf-8", headers=HEADERS)
