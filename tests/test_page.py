"""Pages: whatever text is put on them, it stays text."""

import re

import markdown
import pytest

from collab_jax.reports import page
from collab_jax.runtime import markdown as md


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a|b",
        "`",
        "a ``b` c",
        "<script>alert(1)</script>",
        "a\r\r<script>alert(1)</script>\r\rb",
        "1\n2\r\n3",
        "\\",
        "``` x",
    ],
    ids=range(9),
)
def test_any_text_stays_one_line_of_code(text):
    made = markdown.markdown(f"- **kind**: {md.code(text)} -> {md.code('x')}")
    assert made.count("<code>") == 2 and "<script" not in made and "\n" not in md.code(text)
    shown = re.search("<code>(.*?)</code>", made)[1]
    assert (
        shown == re.sub("\r\n|\r|\n", " ⏎ ", text).replace("<", "&lt;").replace(">", "&gt;").strip()
    )


def test_a_table_survives_what_is_in_its_cells(tmp_path):
    text = md.table(["a|b", "<b>"], [["x<img src=x onerror=1>", md.code("p|q<r>")], ["1", "2"]])
    page.save(tmp_path, "t", f"# A < B\n\n{text}\n")
    made = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert (
        made.count("<td>") == 4
        and made.count("<th>") == 2
        and "<img" not in made
        and "<title>A &lt; B</title>" in made
    )
    assert "q&lt;r&gt;</code>" in made and "a|b" in made and "⏎" not in made


def test_figures_are_inside_as_vectors_where_there_are(tmp_path):
    (tmp_path / "one.png").write_bytes(b"png")
    (tmp_path / "two.png").write_bytes(b"png")
    (tmp_path / "two.svg").write_text("<svg/>")
    page.save(tmp_path, "t", "# T\n\n![first](one.png)\n\n![second](two.png)\n")
    made = (tmp_path / "t.html").read_text()
    assert made.count("data:image/png;base64,") == made.count("data:image/svg+xml;base64,") == 1
    assert (tmp_path / "t.md").read_text().startswith("# T")


def test_figures_with_intervals():
    rate = {"value": 0.1234, "low": 0.1, "high": None}
    assert md.percent(rate) == "12.3 (10.0 to -)"
    assert md.points({"value": 0.01, "low": -0.002, "high": 0.0249}) == "+1.0 (-0.2 to +2.5)"
