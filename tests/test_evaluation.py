"""Evaluation and a cloud that fails: what is unknown is asked again, and never written as wrong."""

import dataclasses
import json

import numpy as np
import pytest
from fakes import make_table as make

from collab_jax import evaluate, records, train
from collab_jax.cloud import CachedCloud, Failure, SimulatedCloud, Store, attempts
from collab_jax.models.sampler import Samples
from collab_jax.reports import comparison, summary
from collab_jax.reports import run as run_report
from collab_jax.reports.comparison import Model
from collab_jax.rl import cloud_columns, evaluation, experiment, rollout
from collab_jax.rl.rollout import Verdicts
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError


class Faulty:
    """`cloud`, but its first `failures` calls, one for each prompt, fail."""

    def __init__(self, cloud: SimulatedCloud, failures: float):
        self._cloud, self.failures = cloud, failures
        self.model, self.parameters, self.batch, self.workers = cloud.model, {}, 1, 1

    def __getattr__(self, name):
        return getattr(self._cloud, name)

    def answer(self, prompts):
        self.failures -= len(prompts)
        if self.failures >= 0:
            return [Failure("HTTP 503")] * len(prompts)
        return self._cloud.answer(prompts)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.001, 0.01))


@pytest.fixture
def run(small, tmp_path):
    return experiment.prepare(small(), tmp_path / "run")


def faulty(run: experiment.Run, failures: float, tmp_path) -> experiment.Run:
    cloud = Faulty(run.cloud.cloud, failures)
    return run._replace(cloud=CachedCloud(cloud, Store(tmp_path / "faulty.sqlite")))


def asked(run: experiment.Run, examples) -> records.Records:
    """Records of `examples` with the cloud's verdicts after one round of questions."""
    rows = cloud_columns.cloud_answers(run.task, run.cloud, examples)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return records.check(
        columns | {"id": [e.id for e in examples], "local_correct": [False] * len(examples)}, "x"
    )


def test_unknown_verdicts_are_asked_again_until_they_are_known(run, tmp_path):
    examples = evaluation.held_out(run, "validation")
    healthy = asked(run, examples)
    assert healthy["cloud_known"].all() and healthy["cloud_correct"].mean() > 0.8
    broken = faulty(run, 30, tmp_path)  # all 24 fail, and 6 of the next round
    table = asked(broken, examples)
    assert not table["cloud_known"].any()
    mended = cloud_columns.ask_again(broken, table, examples, "before")
    for column in cloud_columns.UNKNOWN:
        np.testing.assert_array_equal(mended[column], healthy[column])
    assert not table["cloud_known"].any()  # the argument is left as it was


def test_too_many_unknown_verdicts_stop_with_one_line_that_says_what_to_do(run, tmp_path):
    examples = evaluation.held_out(run, "validation")
    broken = faulty(run, float("inf"), tmp_path)
    with pytest.raises(UserError) as caught:
        cloud_columns.ask_again(broken, asked(broken, examples), examples, "before")
    message = str(caught.value)
    assert "unknown on 24 of 24 prompts (24 without an answer: HTTP 503)" in message
    assert "config.eval.max_unknown=0.02" in message and "the same command goes on" in message
    assert "\n" not in message


def test_answers_that_cannot_be_judged_are_told_from_failed_calls(run):
    verify = run.task.verify

    def undecided(examples, responses):
        return [v._replace(correct=False, unjudged=True) for v in verify(examples, responses)]

    run = run._replace(task=dataclasses.replace(run.task, verify=undecided))
    examples = evaluation.held_out(run, "validation")
    with pytest.raises(UserError, match=r"\(24 with an answer that could not be judged\)"):
        cloud_columns.ask_again(run, asked(run, examples), examples, "before")
    run.config.unlock()
    run.config.eval.max_unknown = 0.99
    few = examples[:1]  # one of one is still more than 99 %
    with pytest.raises(UserError, match="1 of 1"):
        cloud_columns.ask_again(run, asked(run, few), few, "before")


def test_records_of_an_earlier_start_are_mended_above_the_limit_alone(run, tmp_path):
    examples = evaluation.held_out(run, "validation")
    healthy, path = asked(run, examples), tmp_path / "before.parquet"
    holes = healthy | {name: healthy[name].copy() for name in cloud_columns.UNKNOWN}
    for name, value in cloud_columns.UNKNOWN.items():
        holes[name][:3] = value
    records.write(path, holes)
    run.config.unlock()
    run.config.eval.max_unknown = 0.2
    for limit, known in ((0.2, 21), (0.1, 24)):
        run.config.eval.max_unknown = limit
        table = train.read_or_evaluate(run, path, examples, make=pytest.fail)
        assert table["cloud_known"].sum() == records.read(path)["cloud_known"].sum() == known
    np.testing.assert_array_equal(table["cloud_correct"], healthy["cloud_correct"])


@pytest.mark.slow
def test_an_evaluation_writes_nothing_while_the_cloud_is_down_and_then_goes_on(
    small, tmp_path, monkeypatch
):
    answer = SimulatedCloud.answer
    down = lambda self, prompts: [Failure("HTTP 503")] * len(prompts)  # noqa: E731
    monkeypatch.setattr(SimulatedCloud, "answer", down)
    config = small(cloud__retries=0)
    with pytest.raises(UserError, match="unknown on 24 of 24 prompts"):
        evaluate.main(config, tmp_path)
    assert not list(tmp_path.glob("*.parquet")) and not (tmp_path / "validation.json").exists()
    monkeypatch.setattr(SimulatedCloud, "answer", answer)
    assert evaluate.main(config, tmp_path) == 0
    figures = json.loads((tmp_path / "validation.json").read_text())
    assert figures["cloud_unknown"]["value"] == 0 and figures["cloud_accuracy"]["value"] > 0.8
    table = records.read(tmp_path / "validation.parquet")
    assert figures["lenient_accuracy"]["value"] == table["lenient_correct"].mean()
    assert (table["lenient_correct"] | ~table["local_correct"]).all()


# ---- the natural pass


def calling_half(run, prompts):
    """Parameters with which about half of the greedy responses call."""
    params = experiment.load_state(run).params
    looking = rollout.make_sampler(
        run.cfg, run.text, run.config, group=1, temperature=0.0, keep_hidden=True
    )
    samples = rollout.draw(
        looking,
        parallel.replicate(params),
        *run.text.prompt_batch(prompts, run.config.prompt_length),
        seed=0,
        step=0,
        bias=-np.inf,
    )
    hidden = np.asarray(samples.hidden).reshape(len(prompts), -1).mean(0)
    lacking = -np.median(np.asarray(samples.margins).max(-1))
    head = np.array(params["embed_tokens"]["embedding"])
    head[run.text.decision_id] += lacking * hidden / (hidden @ hidden)
    return parallel.replicate(params | {"embed_tokens": {"embedding": head}})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 3])
def test_the_natural_pass_is_over_responses_that_may_differ_from_those_without_the_marker(
    small, tmp_path, monkeypatch, seed
):
    """All that it says is what a pass over every prompt says; greedy ones that call are few."""
    run = experiment.prepare(small(eval__prompts=24, eval__batch_size=8), tmp_path)
    sampler = evaluation.greedy_sampler(run)
    if seed:
        sampler = rollout.make_sampler(run.cfg, run.text, run.config, group=1, temperature=1.0)
    examples = evaluation.held_out(run, "validation")
    params = calling_half(run, [run.task.prompt(e) for e in examples])
    size, drawn, draw = 8, [], rollout.draw

    def counting(*args, **settings):
        drawn.append(settings["bias"])
        return draw(*args, **settings)

    monkeypatch.setattr(rollout, "draw", counting)
    table = evaluation.evaluate(run, sampler, params, examples, "x", seed=seed)
    called, batches = table["natural_called"], 3
    assert 0 < called.sum() <= 16
    again = len(examples) if seed else called.sum()
    assert drawn == [-np.inf] * batches + [0.0] * -(-again // size)
    whole = {name: [] for name in ("text", "completed", "correct", "ended", "called", "tokens")}
    for number in range(batches):
        batch = examples[number * size : (number + 1) * size]
        prompts = run.text.prompt_batch([run.task.prompt(e) for e in batch], 16)
        samples = parallel.gather(
            draw(sampler, params, *prompts, seed=seed or 0, step=number, bias=0.0)
        )
        parts = [x[:, 0] for x in (samples.tokens, samples.mask, samples.ended)]
        verdicts = rollout.judge(run.task, run.text, batch, *parts)
        margins, (tokens, mask, ended) = np.asarray(samples.margins)[:, 0], map(np.asarray, parts)
        calls = margins > 0 if seed is None else (tokens == run.text.decision_id) & mask
        whole["text"] += verdicts.texts
        whole["completed"] += verdicts.called.tolist()
        whole["correct"] += verdicts.correct.tolist()
        whole["ended"] += ended.tolist()
        whole["called"] += calls.any(1).tolist()
        length = np.where(calls.any(1), calls.argmax(1) + 1, mask.sum(1))
        whole["tokens"] += length.tolist()
    for name, column in whole.items():
        assert table[f"natural_{name}"].tolist() == column, name


# ---- rows


@pytest.mark.parametrize(
    ("opens", "margins", "first", "last", "answer"),
    [
        (2, [-3.0, -1.0, -2.0, -np.inf, -np.inf, -np.inf], -3, -2, -0.5 - 0.25),
        (2, [-3.0, -1.0, -2.0, -4.0, -5.0, -np.inf], -3, -5, -0.5 - 0.25),  # decide_after_answer
        (0, [-np.inf] * 6, -np.inf, -np.inf, -(0.2 + 0.4 + 0.5 + 0.25)),
        (5, [-3.0, -1.0, -2.0, -4.0, -5.0, -np.inf], -3, -5, 0.0),  # after its end: never
    ],
)
def test_what_follows_the_opening_is_the_answer(run, opens, margins, first, last, answer):
    mask = np.array([[True] * 5 + [False]])
    tokens = np.full((1, 6), run.text.pad_id, np.int32)
    tokens[0, opens] = run.text.tokenizer.convert_tokens_to_ids("<answer>")
    samples = Samples(
        tokens=tokens,
        logp=np.array([[-0.1, -0.2, -0.4, -0.5, -0.25, -9.0]]),
        mask=mask,
        ended=np.array([True]),
        margins=np.array([margins]),
    )
    no = np.array([False])
    local = evaluation.Pass(
        samples, Verdicts(["<answer>1</answer>"], ~no, no, ~no, no, no, np.ones(1, np.float32))
    )
    example = evaluation.held_out(run, "validation")[0]
    row = evaluation._row(run, example, 0, local, natural=False)
    assert row["answer_logp"] == pytest.approx(answer) and row["logp"] == pytest.approx(-10.45)
    assert (row["first_margin"], row["last_margin"]) == (first, last)
    assert row["split"] == "validation"


# ---- figures


def with_unknown(table: records.Records, rows: list[int]) -> records.Records:
    known = table["cloud_known"].copy()
    known[rows] = False
    return table | {"cloud_known": known, "cloud_correct": table["cloud_correct"] & known}


def test_figures_of_the_cloud_are_over_known_verdicts_and_local_ones_over_all():
    whole = make()  # local T F F T F, cloud T T F F T, calls on 0 and 1
    figures = summary.summary(with_unknown(whole, [1]))
    assert figures["n"] == 5 and figures["cloud_unknown"]["value"] == 0.2
    assert figures["local_accuracy"]["value"] == figures["natural"]["call_rate"]["value"] == 0.4
    assert figures["cloud_accuracy"]["value"] == 0.5  # T F F T, not T F F F T
    assert figures["natural"]["overall_accuracy"]["value"] == 0.5  # T, then own F T F
    without = {name: np.delete(column, 1) for name, column in whole.items()}
    assert figures["at_budget"] == summary.at_budgets(without)


def test_gains_are_over_prompts_known_on_both_sides():
    before, after = make(local_correct=[False] * 5), make()
    gain = summary.gains(with_unknown(before, [0]), with_unknown(after, [4]))
    cut = lambda t: {name: column[[1, 2, 3]] for name, column in t.items()}  # noqa: E731
    expected = summary.gains(cut(before), cut(after))
    assert gain["margin_at_0.3"] == expected["margin_at_0.3"]
    assert gain["local_accuracy"]["value"] == pytest.approx(0.4)


def test_routers_are_compared_over_the_prompts_whose_verdict_is_known_everywhere():
    one, other = with_unknown(make(20), [3]), with_unknown(make(20, seed=1), [3, 7])
    models = {"a": Model([one], [None]), "b": Model([other], [None])}
    result = comparison.compare(models, resamples=5)
    cut = lambda t: {name: np.delete(column, [3, 7]) for name, column in t.items()}  # noqa: E731
    expected = {"a": Model([cut(one)], [None]), "b": Model([cut(other)], [None])}
    assert (result["prompts"], result["cloud_unknown"]) == (18, 2)
    assert result["methods"] == comparison.compare(expected, resamples=5)["methods"]


def test_known_rows_are_those_of_every_table_or_there_are_none():
    table = make()
    assert records.known(table) is table
    assert records.known(with_unknown(table, [0]))["id"].tolist() == ["p1", "p2", "p3", "p4"]
    both = records.known(with_unknown(table, [0]), also=[with_unknown(table, [3])])
    assert both["id"].tolist() == ["p1", "p2", "p4"]
    with pytest.raises(UserError, match="no cloud verdict is known"):
        records.known(with_unknown(table, [0, 1, 2, 3, 4]))


def test_the_report_shows_the_unknown_share_where_there_is_one():
    sides = {"before": summary.summary(make()), "after": summary.summary(make())}
    assert "unknown" not in run_report.markdown_table(sides)
    sides["after"] = summary.summary(with_unknown(make(), [1]))
    (line,) = [x for x in run_report.markdown_table(sides).splitlines() if "unknown" in x]
    assert "| 0.0 (" in line and "| 20.0 (" in line


def test_a_small_test_split_is_evaluated_whole_and_told_of(small, tmp_path, capsys):
    run = experiment.prepare(small(task__test_examples=5, eval__prompts=8), tmp_path)
    assert len(evaluation.held_out(run, "test")) == 5
    assert "has 5 prompts that fit, fewer than config.eval.prompts=8" in capsys.readouterr().out
