"""Markdown pages, and each as one HTML file with its figures inside. No jax."""

import base64
import html
import pathlib
import re

import markdown

from collab_jax.runtime import files

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24 }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto;
        margin: 1rem 0 }
th, td { border: 1px solid #d0d7de; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap }
th { background: #f6f8fa }
code { background: #f6f8fa; padding: 0 0.2rem; white-space: pre-wrap }
img { max-width: 100% }
"""


def save(folder: pathlib.Path, name: str, text: str) -> None:
    """Writes the Markdown `text` to NAME.md, and as a page to NAME.html.

    The figures that it shows, `![title](figure.png)`, are inside NAME.html: as SVG where there is
    a figure.svg beside figure.png. They must have been written before.
    """
    files.write_text(folder / f"{name}.md", text)
    title = html.escape(text.splitlines()[0].lstrip("# "))
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(
        r'src="(?P<file>[^":]+\.png)"',
        lambda match: _embedded(folder / html.unescape(match["file"])),
        body,
    )
    files.write_text(
        folder / f"{name}.html",
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n",
    )


def _embedded(png: pathlib.Path) -> str:
    """The attribute `src` of a figure, with the figure in it."""
    vector = png.with_suffix(".svg")
    kind, file = ("svg+xml", vector) if vector.exists() else ("png", png)
    return f'src="data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"'
