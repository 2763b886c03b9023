"""The verdicts that a step did without: written down by step, and lacking when it is repeated."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from fakes import comparable_metrics, saved_state

from collab_jax.rl import experiment, rollout, training
from collab_jax.rl.batch import make_batch
from collab_jax.rl.missing_verdicts import (
    NOTHING_MISSING,
    MissingVerdicts,
    MissingVerdictsFile,
)
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Verdict

LATE = Verdict(False, False, True, timed_out=True)


def of_prompts(*ids):
    return MissingVerdicts(frozenset(ids), {})


def test_missing_verdicts_are_kept_by_step_and_written_once(tmp_path):
    path = tmp_path / "missing_verdicts.jsonl"
    file = MissingVerdictsFile(tmp_path)
    lacking = MissingVerdicts(frozenset(["b", "a"]), {("c", 2): LATE})
    file.write(3, lacking)
    file.write(4, NOTHING_MISSING)
    whole = path.read_bytes()  # on disk before `close`
    response = {"id": "c", "index": 2, **LATE._asdict()}
    assert json.loads(whole) == {"step": 3, "prompts": ["a", "b"], "responses": [response]}
    file.close()

    path.write_bytes(whole + b'{"step": 5, "prom')  # cut short by a kill: its update never began
    again = MissingVerdictsFile(tmp_path)
    assert again.at(3) == lacking and again.at(4) == again.at(5) == NOTHING_MISSING
    again.write(3, of_prompts("a"))  # a repeated step has its line
    again.write(5, of_prompts("d"))
    again.close()
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    again = MissingVerdictsFile(tmp_path)
    assert again.at(5) == of_prompts("d")
    again.write(3, of_prompts("e"))  # it lacks more now
    again.close()
    assert MissingVerdictsFile(tmp_path).at(3) == MissingVerdicts(
        frozenset(["a", "b", "e"]), {("c", 2): LATE}
    )


def test_lines_of_older_runs_are_read(tmp_path):
    (tmp_path / "unknown.jsonl").write_text('{"step": 3, "ids": ["a", "b"]}\n')
    file = MissingVerdictsFile(tmp_path)
    assert file.at(3) == of_prompts("a", "b")
    file.write(4, of_prompts("c"))
    file.close()
    again = MissingVerdictsFile(tmp_path)
    assert again.at(3) == of_prompts("a", "b") and again.at(4) == of_prompts("c")


@pytest.mark.parametrize("line", ["{}", "no", '{"step": 1, "prompts": []}'])
def test_a_damaged_line_is_refused(tmp_path, line):
    (tmp_path / "missing_verdicts.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        MissingVerdictsFile(tmp_path)


# ---------------------------------------------------------------- a verifier that is late


def late_verifier(run, is_late, asked):
    """The run with a verifier that runs out of time on some texts; `asked` gets all that it sees.

    The texts are the device's responses and the cloud's answers.
    """

    def verify(examples, texts):
        asked.extend(texts)
        verdicts = run.task.verify(examples, texts)
        return [
            v._replace(correct=False, timed_out=True) if is_late(text) else v
            for v, text in zip(verdicts, texts, strict=True)
        ]

    return run._replace(task=dataclasses.replace(run.task, verify=verify))


def length_is_even(text):
    return "<answer>" in text and len(text) % 2 == 0


@pytest.mark.slow
def test_a_repeated_step_does_without_the_same_verdicts_of_the_verifier(small, tmp_path):
    config = small(eval__prompts=0)
    straight = experiment.prepare(config, tmp_path / "straight")
    training.train(late_verifier(straight, length_is_even, []))
    rows = comparable_metrics(tmp_path / "straight")
    assert rows[2]["verifier_timeouts"] > 0 and rows[3]["verifier_timeouts"] > 0

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    resumed = experiment.prepare(config, tmp_path / "resumed")
    asked = []
    training.train(late_verifier(resumed, lambda text: False, asked))  # by now it is quick
    assert comparable_metrics(tmp_path / "resumed") == rows
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(tmp_path / "resumed", 4),
        saved_state(tmp_path / "straight", 4),
    )
    assert asked and not any(map(length_is_even, asked))


@pytest.mark.slow
def test_responses_to_one_prompt_that_occurs_twice_are_told_apart(small, tmp_path):
    """Where two epochs meet, a step may have a prompt twice, and so two groups of responses."""
    run = experiment.prepare(small(eval__prompts=0), tmp_path)
    once = training.TrainingSteps(run).batch(0)
    rows = [0, 1, 2, 3, 0, 1, 2, 3]
    batch = make_batch([once.examples[q] for q in rows], once.prompts[rows], once.mask[rows])
    state, steps = experiment.load_state(run), training.TrainingSteps(run)
    params = parallel.replicate(state).sampling_model
    late = late_verifier(run, length_is_even, [])
    first = rollout.collect(late, steps.sampler, params, batch, step=0)
    indices = {index for _, index in first.missing.responses}
    assert min(indices) < run.config.group <= max(indices) < 2 * run.config.group
    assert first.missing.responses.keys() == {
        (batch.examples[i // 4].id, i % 4 + 4 * (i // 4 >= 4))
        for i, text in enumerate(first.texts)
        if length_is_even(text) and "</answer>" in text
    }

    again = rollout.collect(run, steps.sampler, params, batch, step=0, skip=first.missing)
    assert again.missing == first.missing
    jax.tree.map(np.testing.assert_array_equal, again.rollout, first.rollout)
