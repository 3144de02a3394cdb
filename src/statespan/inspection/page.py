"""The page of an inspection: one file with text, figures and pictures in it, that needs nothing from elsewhere."""

import base64
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any


def write_page(path: Path, data: Mapping[str, Any], pictures: Mapping[str, str]) -> None:
    """Write the page with `data` (the values of inspection.json) and the pictures (file: what it shows) beside it."""
    template = files("statespan.inspection").joinpath("page.html").read_text(encoding="utf-8")
    title = html.escape(f"Inside {data['title'] or 'a model'}")
    shown = "\n".join(_picture(path.with_name(name), caption) for name, caption in pictures.items())
    # In a script element only "<" can end the data early.
    values = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    parts = {"title": title, "pictures": shown, "data": values}
    pieces = template.split("{{")  # filled in one pass, so that a text with {{data}} in it stays what it is
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled.append(parts[name] + rest)
    path.write_text("".join(filled), encoding="utf-8")


def _picture(file: Path, caption: str) -> str:
    caption, data = html.escape(caption), base64.b64encode(file.read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}" loading="lazy">'
    return f"<h2>{caption}</h2>\n<figure>{image}</figure>"
