"""Markdown pages: tables, code that cannot break out, and one HTML file with everything in it. No
jax.
"""

import base64
import html
import pathlib
import re
from collections.abc import Sequence

import markdown

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #d0d7de; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap }
th { background: #f6f8fa } code { background: #f6f8fa; padding: 0 0.2rem; white-space: pre-wrap } img { max-width: 100% }
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns. A cell may be made by `code`; in any other, nothing is
    markup.
    """
    head, *rows = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = lambda cells: (
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
    )  # noqa: E731
    return "\n".join(
        [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]
    )


def _plain(cell: str) -> str:
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("<", "&lt;")


def code(text: str) -> str:
    """Any text, a model's too, as one line of code: fenced by more backticks than it has."""
    text = re.sub(r"\r\n?|\n", " ⏎ ", text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def percent(rate: dict) -> str:
    """'63.1 (61.6 to 64.5)' from a figure with its interval."""
    return (
        f"{100 * rate['value']:.1f} ({_hundredfold(rate['low'])} to {_hundredfold(rate['high'])})"
    )


def points(rate: dict) -> str:
    """'+1.2 (-0.1 to +2.5)' from a difference with its interval."""
    return f"{100 * rate['value']:+.1f} ({_hundredfold(rate['low'], '+')} to {_hundredfold(rate['high'], '+')})"


def _hundredfold(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{100 * x:{sign}.1f}"


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
