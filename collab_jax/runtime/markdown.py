"""Markdown in the terminal, in reports and in error messages: tables, code that cannot break out, figures."""

import re
from collections.abc import Sequence


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
