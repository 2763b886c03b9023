"""Figures of published sweeps in other documents, copied by a command and never by hand.

    python -m collab_jax.reports.quote README.md docs/results.md docs/results/svamp.md

replaces what stands between the lines

    <!-- headline of docs/results/chain -->
    <!-- end -->

in each document. After `<!--` stands which part of the published report is quoted, one of PARTS;
paths are relative to the repository.
"""

import pathlib
import re
from collections.abc import Callable

from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
_QUOTE = re.compile(r"(<!-- (\w+) of (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _section(title: str) -> Callable[[str], str]:
    """Finds the text of one section of a report by its title."""

    def find(report: str) -> str:
        found = re.search(rf"^## {re.escape(title)}\n\n(.*?)\n\n(?=## |\Z)", report, re.M | re.S)
        if not found:
            raise UserError(f"the report has no section {title!r}: publish the sweep again")
        return found[1]

    return find


PARTS = {"findings": _section("What was learnt"), "headline": _section("At a glance")}


def quoted(text: str, root: pathlib.Path = ROOT) -> str:
    """The text with every quotation as the published report has it.

    Raises UserError for an unknown part, and a report that is not there or lacks it.
    """

    def replace(match: re.Match[str]) -> str:
        start, part, folder, end = match.groups()
        if part not in PARTS:
            raise UserError(f"{start.strip()}: no part {part!r}; use one of {sorted(PARTS)}")
        file = root / folder / "report.md"
        if not file.is_file():
            raise UserError(f"{start.strip()}: there is no {file}")
        return f"{start}\n{PARTS[part](file.read_text())}\n\n{end}"

    return _QUOTE.sub(replace, text)


def main(argv: list[str]) -> int:
    """Replaces the quotations in the documents that are named."""
    for path in map(pathlib.Path, argv):
        files.write_text(path, quoted(path.read_text()))
    return 0


if __name__ == "__main__":
    cli.run(main)
