"""An error in a rollout loses no step: the same command goes on, as if nothing had happened."""

import dataclasses

import jax
import numpy as np
import pytest
from fakes import comparable_metrics, saved_state

from collab_jax.rl import experiment, rollout, training
from collab_jax.runtime import metrics
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Verdict


@pytest.fixture(scope="module")
def config(small):
    return small(eval__prompts=0, train__checkpoint_every=9)


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """The workdir of a run without errors."""
    workdir = tmp_path_factory.mktemp("straight")
    training.train(experiment.prepare(config, workdir))
    return workdir


def failing_once_rows_are(count, run, error):
    """The run with a verifier that raises once metrics.jsonl has `count` rows."""

    def verify(examples, texts):
        if len(metrics.read(run.workdir / "metrics.jsonl")) >= count:
            raise error
        return run.task.verify(examples, texts)

    return run._replace(task=dataclasses.replace(run.task, verify=verify))


def assert_resumes_as(straight, config, workdir):
    training.train(experiment.prepare(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, saved_state(workdir, 4), saved_state(straight, 4))
    assert comparable_metrics(workdir) == comparable_metrics(straight)


@pytest.mark.slow
def test_a_reward_that_raises_loses_no_step(config, straight, tmp_path):
    run = experiment.prepare(config, tmp_path)
    error = ZeroDivisionError("in the reward")
    with pytest.raises(ZeroDivisionError, match="in the reward") as caught:
        training.train(failing_once_rows_are(2, run, error))
    assert run.checkpoints.latest() == 2 and not hasattr(caught.value, "__notes__")
    assert_resumes_as(straight, config, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_an_error_before_the_previous_step_has_its_metrics(config, straight, tmp_path, monkeypatch):
    run, draws = experiment.prepare(config, tmp_path), []
    draw = rollout.draw

    def drawing(*args, **kwargs):
        draws.append(len(metrics.read(tmp_path / "metrics.jsonl")))
        if len(draws) == 3:
            raise RuntimeError("out of memory")
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "draw", drawing)
        with pytest.raises(RuntimeError, match="out of memory"):
            training.train(run)
    assert draws == [0, 0, 1]  # a step's metrics are written during the next rollout
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == run.checkpoints.latest() == 2
    assert_resumes_as(straight, config, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_metrics_that_cannot_be_written_leave_no_state_without_them(
    config, straight, tmp_path, monkeypatch
):
    write = metrics.MetricsWriter.write

    def full(self, row):
        if row["step"] == 3:
            raise OSError(28, "No space left on device")
        write(self, row)

    run = experiment.prepare(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            training.train(run)
    assert run.checkpoints.latest() is None
    assert_resumes_as(straight, config, tmp_path)


@pytest.mark.slow
def test_a_state_that_cannot_be_saved_is_a_note_of_the_error(config, tmp_path, monkeypatch):
    def full(self, step, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    run = failing_once_rows_are(1, experiment.prepare(config, tmp_path), KeyError("reward"))
    with pytest.raises(KeyError, match="reward") as caught:
        training.train(run)
    assert caught.value.__notes__ == [
        "the state before step 2 was not saved: [Errno 28] No space left on device"
    ]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_saves_nothing(config, tmp_path, interrupt):
    run = experiment.prepare(config, tmp_path)
    with pytest.raises(interrupt):
        training.train(failing_once_rows_are(1, run, interrupt()))
    assert run.checkpoints.latest() is None


@pytest.mark.slow
def test_an_unhealthy_step_is_saved_once_and_its_message_is_the_error(small, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, state: (saved.append(step), save(self, step, state))
    )
    run = experiment.prepare(small(eval__prompts=0, train__empty_d1_limit=2), tmp_path)
    hopeless = dataclasses.replace(
        run.task, verify=lambda examples, texts: [Verdict(False, False, True)] * len(texts)
    )
    with pytest.raises(UserError, match="no prompt was solved on the device 2 steps") as caught:
        training.train(run._replace(task=hopeless))
    assert saved == [2] and not hasattr(caught.value, "__notes__")
