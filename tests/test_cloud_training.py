"""Training and the cloud's command line against a server that fails.

The parameters are the same, bit for bit, as with a healthy server, or a resume is exact.
"""

import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from absl import flags
from fakes import comparable_metrics, saved_state

from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import __main__ as commands
from collab_jax.cloud import attempts, ledger
from collab_jax.rl import experiment, rollout, training
from collab_jax.runtime import metrics, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import countdown


def solve(content):
    return countdown.solve_prompt([{"role": "user", "content": content}])


def once(make):
    """Returns `make`, but that every later call returns what the first one made."""
    made = []

    def get(*args, **kwargs):
        made[:] = made or [make(*args, **kwargs)]
        return made[0]

    return get


@pytest.fixture(scope="module", autouse=True)
def shared():
    """No long pauses, flags with their defaults, and programs that are compiled once.

    All runs here have one shape.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    quick = pytest.MonkeyPatch()
    quick.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    quick.setattr(rollout, "make_sampler", once(rollout.make_sampler))
    quick.setattr(training, "compile_update", once(training.compile_update))
    quick.setenv("NO_PROXY", "127.0.0.1")
    yield
    quick.undo()


@pytest.fixture
def configure(small):
    """configure(server, **overrides): a small run whose cloud is the server."""

    def make(server, **overrides):
        settings = dict(
            kind="openai", model="deepseek-reasoner", base_url=server.url, key_env="", retries=20
        )
        settings |= dict(timeouts=(30.0, 30.0, 30.0), concurrency=4)
        settings = {f"cloud__{name}": value for name, value in settings.items()}
        return small(**settings | {"eval__prompts": 0} | overrides)

    return make


def test_status_tells_of_every_split_of_the_task(small, tmp_path, capsys):
    for split, n in (("train", 3), ("validation", 2), ("test", 1)):
        lines = [{"id": f"{split}{i}", "problem": f"{split} {i}?", "answer": "1"} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = small(task__name="jsonl", task__data_dir=str(tmp_path), task__prompt="{problem}")
    assert commands.status(config, tmp_path / "run") == 0
    said = capsys.readouterr().out
    for line in ("train: 3 of 3", "validation: 2 of 2", "test: 1 of 1"):
        assert f"{line} prompts have no answer" in said


@pytest.mark.slow
def test_prefetched_behind_faults_equals_healthy_bit_for_bit(
    configure, tmp_path, capsys, monkeypatch
):
    with FaultServer(solve) as healthy:
        run = experiment.prepare(configure(healthy), tmp_path / "healthy")
        training.train(run)
        assert 0 < healthy.requests == ledger(run.cloud.store).calls  # what was needed, once

    with FaultServer(
        solve, share=0.3, faults=("429", "500", "reset", "truncated", "empty")
    ) as faulty:
        config, folder = configure(faulty, cloud__wait=0.0), tmp_path / "faulty"
        assert (
            commands.prefetch(config, folder) == 0 and faulty.requests == 0
        )  # without --yes it only tells
        assert "64 are missing: about " in capsys.readouterr().out
        monkeypatch.setattr(flags.FLAGS["yes"], "value", True)
        assert commands.prefetch(config, folder) == commands.prefetch(config, folder) == 0
        assert set(faulty.whole.values()) == {1} and len(faulty.whole) == 64
        assert commands.status(config, folder) == commands.verify(config, folder) == 0
        assert "train: 0 of 64 prompts have no answer" in capsys.readouterr().out
        before = faulty.requests
        training.train(experiment.prepare(config, folder))
        assert faulty.requests == before
    jax.tree.map(
        np.testing.assert_array_equal, saved_state(folder, 4), saved_state(tmp_path / "healthy", 4)
    )
    assert comparable_metrics(folder) == comparable_metrics(tmp_path / "healthy")


def test_the_cloud_is_asked_on_the_prompts_of_coming_steps(configure, tmp_path):
    with FaultServer(solve) as server:
        run = experiment.prepare(configure(server, cloud__prefetch=3), tmp_path)
        steps = training.TrainingSteps(run)
        steps.collect(parallel.replicate(experiment.load_state(run)).sampling_model, 1)
        coming = [example for step in (1, 2, 3) for example in steps.batch(step).examples]
        prompts, ids = rollout.cloud_prompts(run.task, coming)
        assert None not in run.cloud.answer(prompts, ids).replies
        assert server.requests == len(set(ids)) == 3 * run.config.prompts_per_step


@pytest.mark.slow
def test_without_prefetch_it_completes_and_resumes_exactly(configure, tmp_path):
    faults = ("429", "500", "reset", "truncated", "empty")
    with FaultServer(solve, share=0.3, faults=faults, delay=0.05) as server:
        config = configure(server, cloud__wait=0.0, cloud__retries=0)
        training.train(experiment.prepare(config, tmp_path / "straight"))
        rows = metrics.read(tmp_path / "straight" / "metrics.jsonl")
        assert sum(row["cloud_unknown"] for row in rows) > 0 and len(rows) == 4

        for name in ("resumed", "replayed"):
            shutil.copytree(tmp_path / "straight", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints" / "4")
        replay = configure(
            server, cloud__wait=0.0, cloud__retries=0, cloud__mode="replay", cloud__prefetch=1
        )
        training.train(experiment.prepare(replay, tmp_path / "replayed"))
        written = (tmp_path / "resumed" / "missing_verdicts.jsonl").read_bytes()
        (tmp_path / "resumed" / "missing_verdicts.jsonl").write_bytes(
            written + b'{"step": 9, "id'
        )  # as a kill leaves it
        run = experiment.prepare(config, tmp_path / "resumed")
        server.share = 0.0
        everything = run.task.load("train")
        run.cloud.answer(
            [run.task.cloud_prompt(e) for e in everything]
        )  # by now all of it is known
        training.train(run)
    for name in ("resumed", "replayed"):
        jax.tree.map(
            np.testing.assert_array_equal,
            saved_state(tmp_path / name, 4),
            saved_state(tmp_path / "straight", 4),
        )
        assert comparable_metrics(tmp_path / name) == comparable_metrics(tmp_path / "straight")
    assert (tmp_path / "resumed" / "missing_verdicts.jsonl").read_bytes() == written


def test_ctrl_c_keeps_what_is_paid_and_the_same_command_continues(
    configure, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(flags.FLAGS["yes"], "value", True)
    handler = signal.getsignal(signal.SIGINT)
    with FaultServer(solve, delay=0.1) as server:
        config = configure(server, cloud__concurrency=2)
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert (
            commands.prefetch(config, tmp_path) == 130
            and signal.getsignal(signal.SIGINT) is handler
        )
        assert (
            "stopped; the same command continues" in capsys.readouterr().out
            and server.requests < 64
        )
        assert (
            server.requests
            == server.whole.total()
            == ledger(experiment.prepare(config, tmp_path).cloud.store).calls
        )
        server.delay = 0.0
        assert commands.prefetch(config, tmp_path) == 0 and server.requests == 64
        monkeypatch.setattr(flags.FLAGS["file"], "value", str(tmp_path / "answers.jsonl"))
        assert commands.export(config, tmp_path) == 0
    config = configure(server, cloud__mode="replay")  # nobody listens there any more
    assert (
        commands.import_(config, tmp_path / "other")
        == commands.prefetch(config, tmp_path / "other")
        == 0
    )
    assert "64 answers are new; 0 were there already" in capsys.readouterr().out


def test_a_prefetch_that_cannot_succeed_says_why(configure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags.FLAGS["yes"], "value", True)
    with FaultServer(solve, share=1.0, faults=("400",)) as server:
        assert commands.prefetch(configure(server), tmp_path / "refused") == 1
        assert (
            server.requests == commands.FRUITLESS * 64
            and "failed: 400 192 times" in capsys.readouterr().out
        )
    with FaultServer(solve) as server:
        with pytest.raises(UserError, match="10 calls of config.cloud.max_calls=10"):
            commands.prefetch(configure(server, cloud__max_calls=10), tmp_path / "budget")
        assert server.requests == 10
    with pytest.raises(UserError, match="--file"):
        commands.export(configure(server), tmp_path / "budget")


@pytest.mark.slow
def test_a_spent_budget_stops_the_run_with_the_state_saved_and_a_larger_one_goes_on(
    configure, tmp_path
):
    with FaultServer(solve) as server:
        limits = {"cloud__max_calls": 3, "cloud__when_spent": "stop"}
        run = experiment.prepare(configure(server, **limits), tmp_path)
        with pytest.raises(
            UserError, match="3 calls of config.cloud.max_calls=3.* the same command goes on"
        ):
            training.train(run)
        assert server.requests == 3 and run.checkpoints.latest() is not None
        again = experiment.prepare(
            configure(server, **limits | {"cloud__max_calls": 300}), tmp_path
        )
        assert training.train(again) is not None and again.checkpoints.latest() == 4
