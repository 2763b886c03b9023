"""Markdown for the terminal and for reports: tables, code that cannot break out, figures."""

import re
from collections.abc import Mapping, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns.

    A cell may be made by `code`; in any other cell nothing is read as markup.
    """
    cells = [[_plain(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *others = (_line(row, widths) for row in cells)
    return "\n".join([first, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *others])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"


def _plain(cell: str) -> str:
    cell = cell.replace("|", "\\|")
    return cell if cell.startswith("`") else cell.replace("<", "&lt;")


def code(text: str) -> str:
    """Any text, a model's too, as one line of code between more backticks than it has."""
    text = re.sub(r"\r\n?|\n", " ⏎ ", text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def percent(rate: Mapping[str, float | None]) -> str:
    """'63.1 (61.6 to 64.5)' from a figure with its interval."""
    return f"{_hundredfold(rate['value'])} {_interval(rate)}"


def points(rate: Mapping[str, float | None]) -> str:
    """'+1.2 (-0.1 to +2.5)' from a difference with its interval."""
    return f"{_hundredfold(rate['value'], '+')} {_interval(rate, '+')}"


def _interval(rate: Mapping[str, float | None], sign: str = "") -> str:
    return f"({_hundredfold(rate['low'], sign)} to {_hundredfold(rate['high'], sign)})"


def _hundredfold(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{100 * x:{sign}.1f}"
