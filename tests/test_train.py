"""The training program in one process: what it reads, writes, reports, and refuses."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from fakes import FakeCloud
from matplotlib import image
from ml_collections import ConfigDict

from collab_jax import records, sft, train
from collab_jax.cloud import CachedCloud, Failure, make_cloud
from collab_jax.models import hf
from collab_jax.reports import summary
from collab_jax.rl import experiment, prompt_order, rollout, training
from collab_jax.routing import classifier, routers
from collab_jax.runtime import markdown, metrics, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Verdict

OTHER_CLOUDS = {"openai": "deepseek-reasoner", "local": "countdown-tiny"}  # kind -> model


class RecordingConfig(ConfigDict):
    """A copy of a config that writes down every key that is read, as "section.key", in `reads`."""

    def __init__(self, config, reads=None, prefix=""):
        super().__init__()
        object.__setattr__(self, "reads", set() if reads is None else reads)
        object.__setattr__(self, "prefix", prefix)
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                value = RecordingConfig(value, self.reads, f"{prefix}{key}.")
            self._fields[key] = value
        self.lock()

    def __getitem__(self, key):
        self.reads.add(self.prefix + key)
        return super().__getitem__(key)

    def copy_and_resolve_references(self, visit_map=None):
        """A copy that writes into the same `reads`; making it reads nothing."""
        return RecordingConfig(self._plain(), self.reads, self.prefix)

    def _plain(self):
        plain = ConfigDict()
        for key, value in self._fields.items():
            plain._fields[key] = value._plain() if isinstance(value, RecordingConfig) else value
        return plain


def keys(config, prefix=""):
    """Every key of a config, as "section.key"."""
    found = set()
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        found |= keys(value, f"{prefix}{key}.") if nested else {prefix + key}
    return found


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """(recording config, workdir, compilations by step) of a whole small run."""
    workdir = tmp_path_factory.mktemp("run")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    config = RecordingConfig(
        small(
            eval__fit_prompts=10,
            optim__average=0.9,
            routers__record=("verification",),  # test_routers_recorded.py has them all
            routers__verify_prompt="{response}",
            routers__yes="1",
            routers__no="0",
        )
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    at_step, write = [], metrics.MetricsWriter.write

    def counting(self, row):
        at_step.append(len(compiled))
        write(self, row)

    metrics.MetricsWriter.write = counting
    try:
        assert train.main(config, workdir) == 0
    finally:
        metrics.MetricsWriter.write = write
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return config, workdir, at_step


@pytest.mark.slow
def test_report_has_the_promised_figures(finished):
    config, workdir, _ = finished
    report = json.loads((workdir / "report.json").read_text())
    assert {
        "before",
        "after",
        "budget",
        "steps",
        "seconds",
        "filter_dropped",
        "cloud_calls",
        "config",
    } <= set(report)
    assert (
        report["steps"] == 4
        and report["budget"] == config.budget
        and report["config"]["group"] == 4
    )
    for m in (report["before"], report["after"]):
        assert m["n"] == 24
        assert {"call_rate", "local_share", "overall_accuracy"} <= set(m["natural"])
        for b in ("0.1", "0.2", "0.3"):
            for name in summary.SUMMARY_ROUTERS:
                assert (
                    0
                    <= m["at_budget"][b][name]["low"]
                    <= m["at_budget"][b][name]["value"]
                    <= m["at_budget"][b][name]["high"]
                )
    page = (workdir / "report.md").read_text()
    for moment in ("before", "after"):
        for name in summary.SUMMARY_ROUTERS:
            assert markdown.percent(report[moment]["at_budget"]["0.1"][name]) in page
    for name in ("frontier.png", "training.png"):
        picture = image.imread(workdir / name)  # [height, width, channels], in [0, 1]
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05  # not blank
        assert f"({name})" in page
    after = records.read(workdir / "after.parquet")
    assert len(after["margins"]) == 24 and len(after["margins"][0]) == after["tokens"][0]
    assert (after["cloud_tokens"] > 0).all() and (after["cloud_usd"] > 0).all()


@pytest.mark.slow
def test_records_for_learned_routers_are_of_unused_prompts_and_cost_no_call(finished):
    config, workdir, _ = finished
    fit = records.read(workdir / "fit.parquet")
    assert len(fit["id"]) == 10 and not fit["cloud_known"].any() and "natural_text" not in fit
    after = records.read(workdir / "after.parquet")
    fit["local_correct"] = np.arange(10) % 3 > 0  # whatever this short run got right
    scores = routers.score("margin_logprob", after, fit)
    assert scores.shape == (24,) and np.isfinite(scores).all() and len(set(scores)) > 1
    report = json.loads((workdir / "report.json").read_text())
    assert report["cloud_calls"] <= 24 + config.train.steps * config.prompts_per_step


@pytest.mark.slow
def test_metrics_are_complete(finished):
    _, workdir, _ = finished
    rows = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {
        "reward",
        "local_accuracy",
        "call_rate",
        "d1",
        "d2",
        "dropped",
        "entropy",
        "grad_norm",
        "cut_off",
        "drift",
        "no_signal",
    }
    assert wanted <= set(rows[0])
    assert all(row["drift_max"] < 1e-3 and row["tokens"] > 0 for row in rows)
    assert list((workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_nothing_compiles_after_the_second_step(finished):
    _, _, at_step = finished
    assert at_step[0] > 0 and at_step[-1] == at_step[1]


@pytest.mark.slow
def test_training_moves_the_parameters_and_resuming_a_finished_run_does_not(finished):
    config, workdir, _ = finished
    run = experiment.prepare(config, workdir)
    state = experiment.load_state(run)
    start = hf.load(run.folder, run.cfg, "float32")
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True)
    ]
    assert all(moved) and state.step == 4
    assert state.filter.prompts == 32 and state.reward.counts.sum() == 128
    again = parallel.unreplicate(training.train(run))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


@pytest.mark.slow
def test_every_config_key_is_read_and_the_warm_start_repeats(finished, small, tmp_path):
    config, _, _ = finished
    warm = RecordingConfig(small("countdown_tiny_sft.py"))
    assert sft.run(warm, tmp_path / "model") == sft.run(warm, tmp_path / "again") == 0
    made, again = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")
    )
    assert made == again
    adapted = RecordingConfig(small(lora__rank=2))
    experiment.load_state(experiment.prepare(adapted, tmp_path / "adapted"))
    chains = RecordingConfig(small(task__name="chain", task__prompt="{problem}"))
    experiment.make_task(chains).load("test")
    mbpp = RecordingConfig(
        small(task__name="mbpp", task__prompt="{problem}", task__unsafe_code=True)
    )
    experiment.make_task(mbpp)
    reads = config.reads | warm.reads | adapted.reads | chains.reads | mbpp.reads
    for kind, model in OTHER_CLOUDS.items():
        other = RecordingConfig(small(cloud__kind=kind, cloud__model=model))
        make_cloud(other, experiment.make_task(other), tmp_path / "other.sqlite")
        reads |= other.reads
    # Its one key is read where it is recorded.
    classifier.check(experiment.prepare(config, tmp_path / "classified"))
    reads |= config.reads
    # A server's are read where test_serve.py says.
    unread = {key for key in keys(small()) - reads if not key.startswith("serve.")}
    assert unread == {"cpu_devices"}  # read by cli.py, before jax starts
    model = experiment.prepare(
        small(model__path=str(tmp_path / "model"), task__train_examples=64), tmp_path / "run"
    )
    assert experiment.load_state(model).step == 0  # what sft wrote can be trained


def test_prompts_depend_on_seed_and_step_alone_and_cover_an_epoch():
    steps = [prompt_order.prompt_indices(3, i, 4, 10) for i in range(5)]
    assert sorted(np.concatenate(steps)) == sorted(list(range(10)) * 2)
    assert prompt_order.prompt_indices(3, 2, 4, 10).tolist() == steps[2].tolist()
    assert prompt_order.prompt_indices(4, 2, 4, 10).tolist() != steps[2].tolist()


@pytest.mark.slow
def test_failed_cloud_calls_are_unknown_verdicts_and_stop_nothing(finished, small, tmp_path):
    run = experiment.prepare(small(), tmp_path)

    down = FakeCloud()
    down.answer = lambda prompts: [Failure("down")] * len(prompts)
    cloud = CachedCloud(down, run.cloud.store)
    steps = training.TrainingSteps(run)
    params = parallel.replicate(experiment.load_state(run)).params
    batch = steps.batch(0)
    got = rollout.collect(run._replace(cloud=cloud), steps.sampler, params, batch, step=0)
    flat = parallel.gather(got.rollout)
    needed = flat.called.any(1) | ~flat.correct.any(1)
    assert got.cloud_asked == cloud.take_tally().failed == needed.sum() > 0
    wanted = {e.id for e, n in zip(batch.examples, needed, strict=True) if n}
    assert got.missing.prompts == wanted and not got.missing.responses
    assert (flat.cloud_known == ~needed).all() and not flat.cloud_correct.any()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"budget": 1.0}, r"budget=1.0 must lie in \[0, 1\)"),
        ({"budget": -0.1}, "budget"),
        ({"budget": 0.99999}, "0.999 at most"),
        ({"seed": -1}, "seed=-1"),
        ({"eval__prompts": -5}, "eval.prompts and fit_prompts must"),
        ({"budget": float("nan")}, "budget"),
        ({"group": 1}, "at least 2"),
        ({"prompts_per_step": 7}, "multiple of the 2 devices"),
        ({"eval__batch_size": 3}, "multiple of the 2 devices"),
        ({"reward__alpha_c": 3.0}, "alpha_a=2.0 > alpha_c=3.0"),
        ({"algorithm__advantage": "ppo"}, r"\['dr_grpo', 'gapg', 'grpo', 'none', 'standard'\]"),
        ({"algorithm__filter": "d3"}, r"\['d1d2', 'mixed', 'none', 'zero_variance'\]"),
        ({"algorithm__control_rate": -1.0}, "control_rate"),
        ({"algorithm__decision": "asked"}, "algorithm.decision='asked'"),
        (
            {"algorithm__decision": "scored", "algorithm__control": "dual_alpha_c"},
            "decision=scored teaches calls, at a price",
        ),
        ({"algorithm__advantage": "none"}, "advantage=none leaves scored decisions alone"),
        (
            {"algorithm__decision": "scored", "algorithm__filter": "zero_variance"},
            "learns from groups of equal rewards too",
        ),
        (
            {
                "algorithm__advantage": "none",
                "algorithm__decision": "scored",
                "optim__weight_decay": 0.1,
            },
            "optim.weight_decay=0",
        ),
        (
            {"algorithm__decision": "scored", "text__decision_token": ""},
            "decision=scored needs a config.text.decision_token",
        ),
        ({"temperature": 0.0}, "temperature"),
        ({"optim__learning_rate": float("nan")}, "learning_rate=nan must be finite"),
        ({"train__steps": 0}, "at least 1"),
        ({"model__path": "no-such-model"}, "no model at 'no-such-model'"),
        ({"text__decision_token": "<call>"}, "decision_token='<call>' is not one token"),
        (
            {"model__param_dtype": "float16"},
            "model.param_dtype='float16': use 'float32' or 'bfloat16'",
        ),
        ({"lora__rank": 1000}, r"lora.rank=1000 must lie in 0 \(off\) to 64"),
        ({"task__name": "chess"}, "config.task.name='chess' is unknown"),
        ({"cloud__kind": "sky"}, "config.cloud.kind='sky' is unknown"),
    ],
)
def test_bad_settings_are_one_clear_line(small, tmp_path, overrides, says):
    with pytest.raises(UserError, match=says) as caught:
        experiment.prepare(small(**overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()  # the mended command is not refused


def test_prompts_to_fit_routers_on_are_never_trained_on_or_there_are_too_few(small, tmp_path):
    run = experiment.prepare(small(eval__fit_prompts=30), tmp_path)  # 4 steps of 8 of 64 prompts
    fit = {example.id for example in prompt_order.fit_examples(run)}
    examples, chosen = (
        run.task.load("train"),
        prompt_order.prompt_indices(run.config.seed, 0, 32, 64),
    )
    assert len(fit) == 30 and not fit & {examples[i].id for i in chosen}
    with pytest.raises(UserError, match="leaves 32 of 64 training prompts unused"):
        prompt_order.fit_examples(
            experiment.prepare(small(eval__fit_prompts=33), tmp_path / "other")
        )


def test_prompts_longer_than_the_limit_are_told_and_left_out(small, tmp_path, capsys):
    run = experiment.prepare(small(), tmp_path)
    everything = run.task.load("train")
    lengths = np.array([len(run.text.prompt_ids(run.task.prompt(e))) for e in everything])
    cut = int(np.median(lengths))
    fitting = experiment.examples(
        experiment.prepare(small(prompt_length=cut), tmp_path / "cut"), "train"
    )
    assert [e.id for e in fitting] == [
        e.id for e, n in zip(everything, lengths, strict=True) if n <= cut
    ]
    assert 0 < len(fitting) < len(everything)
    assert f"left out: {(lengths > cut).sum()} of 64 train prompts" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 64 train prompts .*: raise config.prompt_length"):
        training.train(experiment.prepare(small(prompt_length=3), tmp_path / "none"))


def test_workdir_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --workdir"):
        experiment.prepare(small(), tmp_path / "file" / "run")


def test_workdir_of_another_config_is_refused_by_name(small, tmp_path):
    experiment.prepare(small(), tmp_path)
    with pytest.raises(UserError, match=r"budget=0.1 then, 0.3 now; .*group=4 then, 8 now"):
        experiment.prepare(small(budget=0.3, group=8), tmp_path)


def test_broken_store_is_refused_and_kept(small, tmp_path):
    (tmp_path / "cloud.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="cloud.sqlite"):
        experiment.prepare(small(), tmp_path)
    assert (tmp_path / "cloud.sqlite").read_bytes() == b"not a database" * 100


@pytest.mark.slow
def test_checkpoints_of_another_shape_or_cut_short(finished, small, tmp_path):
    config, workdir, _ = finished
    run = experiment.prepare(config, workdir)
    other_shape = jax.tree.map(
        lambda x: np.zeros((*x.shape, 2), x.dtype), jax.device_get(experiment.load_state(run))
    )
    with pytest.raises(UserError, match="cannot restore|another --workdir"):
        run.checkpoints.restore(like=other_shape)

    shutil.copytree(workdir, tmp_path / "copy")
    largest = max(
        (tmp_path / "copy" / "checkpoints" / "4").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else 0,
    )
    largest.write_bytes(largest.read_bytes()[:100])
    cut = experiment.prepare(config, tmp_path / "copy")
    with pytest.raises(
        UserError, match="delete that folder and the run goes on from the one before"
    ):
        experiment.load_state(cut)
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "4")
    assert experiment.load_state(experiment.prepare(config, tmp_path / "copy")).step == 2


@pytest.mark.slow
def test_non_finite_gradients_stop_the_run_with_the_state_saved(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "NONFINITE_LIMIT", 2)
    broken = small(
        optim__learning_rate=1e38, optim__warmup_steps=1, train__steps=9, train__checkpoint_every=9
    )
    run, turn = experiment.prepare(broken, tmp_path), itertools.cycle([True, False, False])
    run = run._replace(
        task=dataclasses.replace(
            run.task,
            verify=lambda examples, texts: [Verdict(next(turn), False, True) for _ in texts],
        )
    )
    with pytest.raises(UserError, match="not finite 2 steps in a row; the state is saved"):
        training.train(run)
    saved = experiment.load_state(run)
    assert saved.nonfinite_streak == 2 and run.checkpoints.latest() == saved.step


@pytest.mark.slow
def test_nothing_solved_stops_the_run_with_the_state_saved(small, tmp_path):
    run = experiment.prepare(
        small(train__empty_d1_limit=2, train__steps=9, train__checkpoint_every=9), tmp_path
    )
    hopeless = dataclasses.replace(
        run.task, verify=lambda examples, texts: [Verdict(False, False, True)] * len(texts)
    )
    with pytest.raises(UserError, match="no prompt was solved on the device 2 steps in a row"):
        training.train(run._replace(task=hopeless))
    saved = experiment.load_state(run)
    assert saved.step == 2 and saved.empty_updates == 2


def test_metrics_file_is_cut_to_the_restored_step(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, 0)
    for i in (1, 2, 3):
        writer.write({"step": i, "reward": float(i)})
    writer.close()
    with pathlib.Path(tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # a kill in the middle of a line
    writer = metrics.MetricsWriter(tmp_path, 2)
    writer.write({"step": 3, "reward": 9.0})
    writer.close()
    assert [row["reward"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 9.0]


def test_alarm_names_the_collapse():
    row = {"call_rate": 0.2, "entropy": 0.3, "cut_off": 0.0, "d2": 3, "d2_called": 1}
    assert metrics.collapse_warning([row] * 10) is None
    assert "no response calls" in metrics.collapse_warning([row | {"call_rate": 0.0}] * 10)
    assert "nearly every response calls" in metrics.collapse_warning(
        [row | {"call_rate": 1.0}] * 10
    )
    assert "entropy is gone" in metrics.collapse_warning([row | {"entropy": 0.0}] * 10)
    assert "cut off" in metrics.collapse_warning([row | {"cut_off": 0.9}] * 10)
    uncalled = row | {"d2_called": 0}
    assert (
        "no prompt that only the cloud solves had a response that calls"
        in metrics.collapse_warning([uncalled] * 10)
    )
    assert (
        metrics.collapse_warning([uncalled] * 9 + [row]) is None
        and metrics.collapse_warning([uncalled | {"d2": 0}] * 10) is None
    )
    assert metrics.collapse_warning([row | {"call_rate": 0.0}] * 9) is None
    for odd in (row | {"call_rate": 0.0}, uncalled):  # a call is learnt from any attempt
        assert metrics.collapse_warning([odd] * 10, sampled=False) is None
