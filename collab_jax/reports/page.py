"""Markdown pages: tables, code that cannot break out, and one HTML file with everything in it. No
jax.
"""

import base64
import html
import pathlib
import re

import markdown

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #d0d7de; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap }
th { background: #f6f8fa } code { background: #f6f8fa; padding: 0 0.2rem; white-space: pre-wrap } img { max-width: 100% }
"""


def save(folder: pathlib.Path, name: str, text: str) -> None:
    """Writes NAME.md, and NAME.html with the figures that it shows, `![title](figure.png)`, inside
    (as SVG where there is one).
    """
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables"])
    title = html.escape(text.splitlines()[0].lstrip("# "))

    def inside(match: re.Match) -> str:
        file = folder / html.unescape(match["file"])
        vector = file.with_suffix(".svg")
        kind, file = ("svg+xml", vector) if vector.exists() else ("png", file)
        return f'src="data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"'

    body = re.sub(r'src="(?P<file>[^":]+\.png)"', inside, body)
    (folder / f"{name}.html").write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body>{body}</body></html>\n",
        encoding="utf-8",
    )
