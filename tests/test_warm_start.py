"""The warm start: whose demonstrations it learns from, what it writes, what it refuses."""

import json

import numpy as np
import pytest

from collab_jax import sft
from collab_jax.rl import reach
from collab_jax.rl.demonstrations import half_of
from collab_jax.rl.reach import Tried
from collab_jax.rl.tuning import Tuner
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import base, make_task

MARKER = "<unknown> I need external assistance </unknown>"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_own_samples_warm_the_model_up_and_their_file_does_the_same(small, tmp_path, capsys):
    own = small(sft__source="self", sft__prompts=24, sft__check_prompts=12, sft__marker_share=0.3)
    assert sft.run(own, tmp_path / "own") == 0
    out = capsys.readouterr().out
    assert "of 24 training prompts solved, each in 4 responses" in out
    assert "48 responses to 12 prompts" in out
    rows = rows_of(tmp_path / "own" / "demonstrations.jsonl")
    task = make_task(own)
    examples = {e.id: e for e in task.load("train")[:24]}
    verdicts = task.verify([examples[r["id"]] for r in rows], [r["response"] for r in rows])
    assert [v.called for v in verdicts] == [r["kind"] == "call" for r in rows]
    answers = [v for v, r in zip(verdicts, rows, strict=True) if r["kind"] == "answer"]
    assert answers and all(v.correct and v.formatted for v in answers)
    assert 0 < len(rows) - len(answers) <= 0.3 * len(rows)
    figures = json.loads((tmp_path / "own" / "sft.json").read_text())
    assert figures["prompts"] == 12 and figures["responses"] == 48 and figures["steps"] == 2
    assert 0 < figures["local_accuracy"] < 1 and figures["formatted"] > 0.5
    assert figures["margin"] <= figures["best_margin"] and 0 <= figures["margin_auc"] <= 1

    file = small(
        sft__source="file", sft__demonstrations=str(tmp_path / "own" / "demonstrations.jsonl")
    )
    assert sft.run(file, tmp_path / "file") == 0
    assert "left out" not in out + capsys.readouterr().out
    assert json.loads((tmp_path / "file" / "sft.json").read_text()) == {"steps": 2}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "file")]
    assert weights[0] == weights[1]
    assert not list(tmp_path.glob("*/warm_start/*/checkpoints"))

    assert sft.run(file, tmp_path / "file") == 0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings .*sft.steps=2 then, 3 now"):
        sft.run(small(sft__steps=3), tmp_path / "file")


@pytest.mark.slow
def test_a_kill_after_the_weights_were_written_costs_the_try_alone(small, tmp_path, monkeypatch):
    config = small(sft__check_prompts=8)
    measure = reach.measure

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reach, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        sft.run(config, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert not (tmp_path / "sft.json").exists()

    def no_step(*_):
        raise AssertionError("the tuning was finished")

    monkeypatch.setattr(reach, "measure", measure)
    monkeypatch.setattr(Tuner, "_steps", no_step)
    assert sft.run(config, tmp_path) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "sft.json").read_text())["prompts"] == 8


def test_what_is_refused_leaves_no_settings_behind(small, tmp_path):
    with pytest.raises(UserError, match="none of .* demonstrations fits .* raise them"):
        sft.run(small(max_new_tokens=4), tmp_path)
    with pytest.raises(UserError, match="all .* train prompts have more than 2 tokens"):
        sft.run(small(prompt_length=2, sft__source="self"), tmp_path)
    with pytest.raises(UserError, match="config.lora.start='nowhere' has no adapter_config.json"):
        sft.run(small(lora__rank=2, lora__start="nowhere"), tmp_path)
    assert not (tmp_path / "warm_start" / "config.json").exists()


@pytest.mark.slow
def test_each_half_is_labelled_by_a_model_that_was_tuned_on_the_other(
    small, tmp_path, capsys, monkeypatch
):
    config = small(
        sft__relabel_steps=2, sft__keep=1, sft__marker_share=0.5, lora__rank=2, sft__check_prompts=8
    )
    task, seen, tune = make_task(config), {}, Tuner.tune

    def spy(tuner, folder, params, source, steps):
        demonstrations_of_it = [one for one, _ in zip(source(), range(40), strict=False)]
        seen[folder.name] = {half_of(one.prompt, str) for one in demonstrations_of_it}
        assert not any(
            base.called(one.response, MARKER) != one.call_only for one in demonstrations_of_it
        )
        return tune(tuner, folder, params, source, steps)

    monkeypatch.setattr(Tuner, "tune", spy)
    assert sft.run(config, tmp_path) == 0
    assert seen == {"half-0": {0}, "half-1": {1}, "tuning": {0, 1}}
    prompts = {e.id: task.prompt(e) for e in task.load("train")}
    answered = [rows_of(tmp_path / "warm_start" / f"half-{h}" / "samples.jsonl") for h in (0, 1)]
    for half, rows in enumerate(answered):
        assert {half_of(prompts[row["id"]], str) for row in rows} == {1 - half}
    assert len(answered[0]) + len(answered[1]) == len(prompts)
    rows = rows_of(tmp_path / "demonstrations.jsonl")
    assert {row["kind"] for row in rows} == {"answer", "call"}
    written = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written
    assert "model.safetensors" not in written
    assert "AUC of the margin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"sft__source": "web"}, "config.sft.source='web': use one of"),
        ({"sft__source": "file"}, "source=file names a file"),
        ({"sft__demonstrations": "x.jsonl"}, "source=file names a file"),
        ({"sft__steps": 0}, "config.sft.steps must be at least 1"),
        (
            {"prompts_per_step": 3},
            "prompts_per_step=3 must be a positive multiple of the 2 devices",
        ),
        ({"sft__keep": 0}, "config.sft.keep must be at least 1"),
        ({"sft__marker_share": 1.0}, "config.sft.marker_share=1.0"),
        ({"sft__call_chance": 1.0}, "config.sft.call_chance=1.0 must lie in"),
        (
            {"sft__call_chance": 0.1, "text__decision_token": ""},
            "call_chance=0.1 is that of a decision token",
        ),
        ({"sft__prompts": -1}, "config.sft.prompts must be at least 0"),
        ({"sft__relabel_steps": -1}, "config.sft.relabel_steps=-1"),
        ({"sft__relabel_steps": 1, "sft__source": "self"}, "relabel_steps tunes it before"),
        ({"sft__checkpoint_every": 0}, "config.sft.checkpoint_every=0 must be at least 1"),
        (
            {"task__name": "gsm8k", "task__prompt": "{problem}"},
            "makes no demonstrations: set config.sft.source to self",
        ),
    ],
)
def test_bad_settings(small, tmp_path, overrides, says):
    with pytest.raises(UserError, match=says):
        sft.run(small(**overrides), tmp_path)


def test_workdir_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*: choose another --workdir"):
        sft.run(small(), tmp_path / "file" / "start")


def test_what_would_keep_training_from_learning_is_told():
    fine = {"called": 0.1, "formatted": 0.8, "local_accuracy": 0.3, "margin_auc": 0.7}
    assert reach.warnings(fine) == reach.warnings(fine | {"margin_auc": None}) == []
    assert "AUC 0.40" in reach.warnings(fine | {"margin_auc": 0.4})[0]
    assert "no response calls" in reach.warnings(fine | {"called": 0})[0]
    assert "most responses neither" in reach.warnings(fine | {"formatted": 0.2})[0]
    assert "no response is right" in reach.warnings(fine | {"local_accuracy": 0})[0]


def test_the_auc_of_the_margin_by_hand():
    """Wrong: margins 1 and -inf, and one that was cut off; right: 0 and 1. Of six pairs 3 + 1/2 + 0
    are in order.
    """
    none = np.zeros((1, 5), bool)
    tried = Tried(
        correct=np.array([[False, False, False, True, True]]),
        called=none,
        formatted=none,
        cut_off=np.array([[False, False, True, False, False]]),
        margin=np.array([[1.0, -np.inf, -5.0, 0.0, 1.0]], np.float32),
    )
    assert reach.margin_auc(tried) == pytest.approx(3.5 / 6)
    assert reach.margin_auc(tried._replace(correct=none)) is None
    assert reach.margin_auc(tried._replace(correct=~none)) is None
