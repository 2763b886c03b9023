"""A judge's agreement with people: labels, figures, the command, and the bundled set."""

import json

import numpy as np
import pytest
from conftest import ROOT
from fakes import answered, task_config, write_rows

from collab_jax import judge as command
from collab_jax.bench.faults import FaultServer
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Verdict, rubric

SET = ROOT / "collab_jax" / "assets" / "judge60"


def verdicts_of(*grades):
    return [
        Verdict(False, False, True, unjudged=True)
        if grade is None
        else Verdict(grade >= 0.5, False, True, grade=grade)
        for grade in grades
    ]


def test_agreement_by_hand():
    people = [1.0, 1.0, 0.0, 0.0, 0.5]
    got = command.agreement(people, verdicts_of(1.0, 0.25, 0.0, 0.5, None), 0.5)
    assert (got["n"], got["unjudged"]) == (5, 1)
    assert got["agreement"]["value"] == 0.5  # the first and the third of four
    assert got["kappa"] == 0.0  # each says right of two of four: by chance 1/2
    assert got["mean_absolute_difference"] == pytest.approx((0 + 0.75 + 0 + 0.5) / 4)
    assert got["bias"]["value"] == pytest.approx((0 - 0.75 + 0 + 0.5) / 4)
    # Ranks 3.5, 3.5, 1.5, 1.5 and 4, 2, 1, 3.
    assert got["rank_correlation"] == pytest.approx(2 / 20**0.5)
    perfect = command.agreement([1.0, 0.0], verdicts_of(1.0, 0.0), 0.5)
    assert perfect["kappa"] == 1.0 and perfect["rank_correlation"] == pytest.approx(1)
    alike = command.agreement([1.0, 1.0], verdicts_of(1.0, 1.0), 0.5)
    assert alike["kappa"] is None and alike["rank_correlation"] is None
    with pytest.raises(UserError, match="none of the 1 answers could be judged"):
        command.agreement([1.0], verdicts_of(None), 0.5)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"id": "a", "text": "x"}', '{"id": "a", "text": "x", "label": 2}',
     '{"id": "a", "text": 3, "label": 1}', '{"text": "x", "label": 1}',
     '{"id": "a", "text": "x", "label": "yes"}', '{"id": "a", "text": "x", "label": NaN}'],
)  # fmt: skip
def test_a_bad_label_is_named_by_its_line(tmp_path, line):
    good = json.dumps({"id": "a", "text": "x", "label": True})
    (tmp_path / "l.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=r"l.jsonl, line 2: it must be an object with id, text"):
        command.read_labels(tmp_path / "l.jsonl")


def test_a_judge_behind_an_api_is_compared_with_people(tmp_path, monkeypatch, capsys):
    """60 labelled answers, a judge that is wrong on 6 of them and chats about 3."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    settings = task_config(SET, "jsonl", judge="grader", rubric=str(SET / "rubric.toml"))
    settings.cloud.update(kind="openai", key_env="", prices=(("grader", 1.0, 2.0),))
    texts = [answered(f"answer {i:02}") for i in range(60)]
    labels = [{"id": f"{i + 1:02}", "text": t, "label": i % 3 == 0} for i, t in enumerate(texts)]
    write_rows(tmp_path / "labels.jsonl", labels)

    def say(content):
        i = int(content.split("<answer>answer ")[1][:2])
        if i in (10, 20, 40):
            return "A fine answer, on the whole."
        score = 5 if (i % 3 == 0) != (i < 6) else 1
        return f"correct: {score}\ncomplete: {score}\nrelevant: {score}"

    with FaultServer(say) as server:
        settings.cloud.base_url = server.url
        path = tmp_path / "labels.jsonl"
        assert command.main(settings, tmp_path / "run", path, "test") == 0
        assert server.requests == 60
        assert command.main(settings, tmp_path / "run", path, "test") == 0
        assert server.requests == 60  # verdicts are in the store
    got = json.loads((tmp_path / "run" / "judge.json").read_text())
    assert (got["n"], got["unjudged"]) == (60, 3)
    assert got["agreement"]["value"] == pytest.approx(51 / 57)
    assert "60 answers, of which 3 could not be judged: the judge agrees on" in (
        capsys.readouterr().out
    )
    write_rows(tmp_path / "labels.jsonl", [{"id": "z", "text": "x", "label": 1}])
    with pytest.raises(UserError, match="1 ids are of no prompt of the test split"):
        command.main(settings, tmp_path / "run", path, "test")


# ---- the bundled set of judged answers


def test_the_bundled_labels_are_means_of_their_scores_by_the_rubric():
    labels = command.read_labels(SET / "labels.jsonl")
    rows = [json.loads(line) for line in (SET / "labels.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (SET / "test.jsonl").read_text().splitlines()]
    criteria = rubric.load(str(SET / "rubric.toml"))
    assert len({q["problem"] for q in questions}) == 60
    assert [label.id for label in labels] == [q["id"] for q in questions]
    for label, row in zip(labels, rows, strict=True):
        lines = [f"{n}: {s}" for n, s in zip(criteria.criteria, row["scores"], strict=True)]
        assert rubric.read_scores(criteria, "\n".join(lines)) == pytest.approx(
            label.grade, abs=1e-4
        )
    grades = np.array([label.grade for label in labels])
    assert (grades < 0.25).sum() >= 5 and (grades == 1).sum() >= 15 and grades.std() > 0.3


def test_the_bundled_set_is_judged_without_a_key(tmp_path):
    """The simulated judge compares texts, and no answer is worded as its reference."""
    settings = task_config(SET, "jsonl", judge="simulated", rubric=str(SET / "rubric.toml"))
    assert command.main(settings, tmp_path / "run", SET / "labels.jsonl", "test") == 0
    got = json.loads((tmp_path / "run" / "judge.json").read_text())
    assert (got["n"], got["unjudged"], got["right_by_judge"]) == (60, 0, 0.0)
    assert got["agreement"]["value"] == pytest.approx(22 / 60) and got["kappa"] == 0.0
