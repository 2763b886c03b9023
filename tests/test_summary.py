"""The figures of one evaluation by hand numbers on five prompts."""

import pytest
from fakes import F, T
from fakes import make_table as make

from collab_jax.reports import run, summary
from collab_jax.runtime.errors import UserError


def test_summary_by_hand():
    s = summary.summary(make())
    assert (
        s["n"] == 5 and s["local_accuracy"]["value"] == 0.4 and s["cloud_accuracy"]["value"] == 0.6
    )
    natural = s["natural"]  # prompts 0 and 1 called (both right in the cloud), 4 was cut off
    assert natural["call_rate"]["value"] == 0.4 and natural["local_share"]["value"] == 0.4
    assert natural["overall_accuracy"]["value"] == 0.6 and natural["local_correct"]["value"] == 0.2
    assert natural["marker_completed"] == 0.5 and s["no_answer"]["value"] == 0.2
    assert set(s["at_budget"]) == {"0.1", "0.2", "0.3"} and s["device_tokens"] == {
        "local": 10.0,
        "natural": 5.0,
    }
    # With no answer to prompt 4, it and its -2 rank first: of the wrong 4, 1, 2 and the right 3, 0
    # all pairs are in order.
    assert s["auc"]["margin"] == 1.0 and s["auc_answered"]["margin"] == 1.0
    assert s["auc"]["logprob"] == pytest.approx(5 / 6)  # 2, at -0.2, is behind 3


def test_at_budget_by_hand():
    at = summary.at_budgets(make())[
        "0.2"
    ]  # one prompt goes: 4, which has no answer and is right in the cloud
    assert at["margin"]["value"] == at["logprob"]["value"] == at["perfect"]["value"] == 0.6
    assert at["random"]["value"] == pytest.approx(0.8 * 0.4 + 0.2 * 0.6)
    assert at["margin_over_random"]["value"] == pytest.approx(0.16)
    # The cloud is right on 2 of the 3 that the device gets wrong, and margin met one of the two:
    # (0.6 - 0.44) / (0.4 + 0.2 x 2/3 - 0.44).
    assert at["reachable"]["value"] == pytest.approx(8 / 15)
    assert at["reachable_gain_share"]["value"] == pytest.approx(12 / 7)
    assert summary.at_budgets(make())["0.1"]["margin"]["value"] == 0.4  # half a prompt is none


def test_lenient_accuracy_is_beside_the_strict_one_and_absent_from_older_records():
    table = make(lenient_correct=[T, T, F, T, F])
    s = summary.summary(table)
    assert s["lenient_accuracy"]["value"] == 0.6 and s["local_accuracy"]["value"] == 0.4
    sides = {"before": s, "after": s}
    (line,) = [x for x in run.markdown_table(sides).splitlines() if "tags or not" in x]
    assert "| 60.0 (" in line
    del table["lenient_correct"]
    older = summary.summary(table)
    assert older["lenient_accuracy"] is None
    assert "tags or not" not in run.markdown_table(sides | {"before": older})


def test_one_class_has_no_auc():
    assert summary.summary(make(local_correct=[T] * 5))["auc"] == {"margin": None, "logprob": None}


def test_gains_are_paired_by_id_and_refuse_other_prompts():
    before, after = make(), make(local_correct=[T, T, F, T, F])
    gain = summary.gains(before, after)
    assert gain["local_accuracy"]["value"] == pytest.approx(0.2)
    backwards = {name: column[::-1] for name, column in before.items()}
    assert summary.gains(backwards, after) == gain
    with pytest.raises(UserError, match="other prompts"):
        summary.gains(before, make(id=list("abcde")))


def test_examples_to_show_are_what_they_say():
    shown = dict(summary.examples_to_show(make()))
    assert (
        shown["asked, though it would have solved it"] == 0
        and shown["rightly asked the cloud"] == 1
    )
    assert shown["solved on the device"] == 3 and shown["stayed, and was wrong"] == 2


def test_a_report_has_the_accuracy_of_each_stratum():
    before = summary.summary(make(stratum=["law", "law", "sums", "sums", "sums"]))
    after = summary.summary(
        make(stratum=["law", "law", "sums", "sums", "sums"], local_correct=[T, F, T, T, T])
    )
    rows = run.strata({"before": before, "after": after}).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:4]] == ["law", "sums"]
    assert "| 50.0 (" in rows[2] and "| 100.0 (" in rows[3]
    alone = summary.summary(make())
    assert run.strata({"before": alone, "after": alone}) == ""
