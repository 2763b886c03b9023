"""What a report says first, by hand; and that other documents quote it by a command."""

import numpy as np
import pytest

from collab_jax.reports import findings, quote
from collab_jax.routing import curves
from collab_jax.runtime.errors import UserError


def rate(value, low, high):
    return {"value": value, "low": low, "high": high}


def method(value, lead, share=0.5):
    at = {
        "accuracy": rate(value, value - 0.01, value + 0.01),
        "reference_minus_this": rate(*lead),
        "reachable_share": rate(share, share - 0.1, share + 0.1),
    }
    return {"at_budget": {"0.3": at}}


NONE, AHEAD, BEHIND = (0.01, -0.01, 0.03), (0.05, 0.02, 0.08), (-0.04, -0.06, -0.02)
RESULT = {
    "reference": "ours: margin",
    "seeds": {"ours": 5, "task": 5, "other": 2},
    "models": {
        "ours": {
            "local_accuracy": rate(0.5, 0.48, 0.52),
            "no_answer": rate(0.02, 0.01, 0.03),
            "reference_minus_this": rate(0, 0, 0),
            "natural_call_rate": rate(0.4, 0.38, 0.42),
            "natural_accuracy": rate(0.85, 0.84, 0.86),
            "natural_minus_gate": rate(*BEHIND),
        },
        "task": {
            "local_accuracy": rate(0.54, 0.5, 0.58),
            "no_answer": rate(0.0, 0.0, 0.0),
            "reference_minus_this": rate(*BEHIND),
            "natural_call_rate": rate(0.1, 0.08, 0.12),
        },
        "other": {
            "local_accuracy": rate(0.49, 0.47, 0.51),
            "no_answer": rate(0.07, 0.06, 0.08),
            "reference_minus_this": rate(*NONE),
            "natural_call_rate": rate(0.2, 0.18, 0.22),
        },
    },
    "methods": {
        "ours: margin": method(0.8, (0, 0, 0), share=0.9),
        "ours: logprob": method(0.75, AHEAD),
        "ours: last_result": method(0.79, NONE),
        "task: margin": method(0.7, AHEAD),
        "task: logprob": method(0.72, AHEAD),
        "task: perfect": method(0.9, BEHIND),
        "other: margin": method(0.82, BEHIND),
        "other: logprob": method(0.78, NONE),
    },
}


def test_five_sentences_by_hand():
    said = findings.findings(RESULT, "task", {"ours": 0.3, "other": 0.2}).splitlines()
    assert [line[:3] for line in said] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    best, controls, reached, natural, cells = said
    # The perfect router is nobody's; of two others the better one is the rival.
    assert "ahead of the best router on `task`, log-probability gate with 72.0 %" in best
    assert "(+5.0 (+2.0 to +8.0) points)" in best and "out of 2 " in best
    assert "not told apart from *last result leads nowhere* (+1.0 (-1.0 to +3.0))" in controls
    assert "ahead of *log-probability gate* (+5.0" in controls
    assert "takes 90.0 % (80.0 to 100.0) of the gain" in reached
    assert "behind `task` (-4.0 (-6.0 to -2.0) points)" in reached
    assert "at a budget of 30 %, `ours` on 40.0 % (38.0 to 42.0)" in natural
    assert "at a budget of 20 %, `other` on 20.0 %" in natural and "`task`" not in natural
    assert "`ours` has 85.0 % (84.0 to 86.0) right then, behind what its *log-prob" in natural
    assert natural.endswith("brings at that share (-4.0 (-6.0 to -2.0) points).")
    assert "ahead of `task` (+5.0" in cells and "behind `other` (-4.0" in cells
    assert "These are 2 comparisons" in cells and cells.endswith("still excludes 0.")


def test_that_a_model_answers_little_is_said():
    other = RESULT["models"]["other"] | {"no_answer": rate(0.37, 0.35, 0.39)}
    result = RESULT | {"models": RESULT["models"] | {"other": other}}
    *_, cells, last = findings.findings(result, "task", {}).splitlines()
    assert last.startswith("5. With the call barred they give no answer, and")
    assert last.endswith("send such a prompt first: `other` on 37.0 % (35.0 to 39.0).")
    assert "`other` (-4.0" in cells
    result = result | {"seeds": RESULT["seeds"] | {"other": 1}}
    *_, cells, _ = findings.findings(result, "task", {}).splitlines()
    assert "`other` (one seed, -4.0" in cells
    assert cells.endswith("; with one seed, whose interval is over prompts alone, more of them do.")
    result = result | {"seeds": {"ours": 1, "task": 1, "other": 1}}
    assert "`ours: margin` (one seed) has 80.0 %" in findings.findings(result, "task", {})


def test_without_a_task_tuned_model_its_sentences_are_left_out():
    said = findings.findings(RESULT, None, {}).splitlines()
    assert len(said) == 3 and said[1].endswith("the device alone has 50.0 % (48.0 to 52.0) right.")


@pytest.mark.parametrize(
    ("lead", "says"),
    [
        (AHEAD, "ahead of"),
        (BEHIND, "behind"),
        (NONE, "not told apart from"),
        ((0.0, 0.0, 0.0), "not told apart from"),
        ((0.1, None, 0.2), "not told apart from"),
    ],
)
def test_a_difference_inside_its_interval_is_none(lead, says):
    assert findings.verdict(rate(*lead)) == says


def test_the_mean_of_a_figure_is_resampled_as_a_frontier_is():
    rng = np.random.default_rng(0)
    seeds = [rng.random(200) < p for p in (0.3, 0.4, 0.5)]
    table = {"id": np.arange(200), "cloud_correct": np.ones(200, bool)}
    runs = [(table | {"local_correct": called}, np.zeros(200)) for called in seeds]
    frontier = curves.frontiers({"a": runs}, [0.5], resamples=50)
    np.testing.assert_allclose(curves.mean(seeds, 50), frontier.at("a", 0.0), rtol=1e-12)
    np.testing.assert_allclose(curves.mean([np.ones(5)] * 2, 20), 1, rtol=1e-12)


REPORT = """# A sweep

## What was learnt

1. One.
2. Two.

## At a glance

| a |

## Training

![](x.png)
"""


def test_documents_quote_the_published_report(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "report.md").write_text(REPORT)
    text = "Before.\n\n<!-- findings of docs -->\nold\n<!-- end -->\n\nBetween.\n"
    text += "<!-- headline of docs -->\n<!-- end -->\nAfter.\n"
    new = quote.quoted(text, tmp_path)
    assert new == (
        "Before.\n\n<!-- findings of docs -->\n\n1. One.\n2. Two.\n\n<!-- end -->\n\nBetween.\n"
        "<!-- headline of docs -->\n\n| a |\n\n<!-- end -->\nAfter.\n"
    )
    assert quote.quoted(new, tmp_path) == new


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("<!-- verdict of docs -->", "no part 'verdict'"),
        ("<!-- findings of nowhere -->", "there is no"),
        ("<!-- findings of docs -->", "has no section 'What was learnt'"),
    ],
)
def test_what_cannot_be_quoted_is_said(tmp_path, line, says):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "report.md").write_text("# Nothing\n")
    with pytest.raises(UserError, match=says):
        quote.quoted(f"{line}\n<!-- end -->\n", tmp_path)
