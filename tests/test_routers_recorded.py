"""Routers that run the model: each against what it must be, on the embedded model."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from collab_jax.models import attention, decoder
from collab_jax.reports import comparison
from collab_jax.rl import evaluation, experiment, prompt_order
from collab_jax.routing import (
    agreement,
    classifier,
    forced,
    hidden,
    measures,
    recorded,
    response,
    verification,
)
from collab_jax.routing.device import Device, batches
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks.base import Example


@pytest.fixture(scope="module")
def scene(small, tmp_path_factory):
    """(Device, records to fit on, records to route) of the embedded model."""
    config = small(
        eval__fit_prompts=24,
        routers__epochs=40,
        routers__samples=3,
        routers__verify_prompt="{response}",
        routers__yes="1",
        routers__no="0",
    )
    run = experiment.prepare(config, tmp_path_factory.mktemp("routers"))
    state, sample = parallel.replicate(experiment.load_state(run)), evaluation.greedy_sampler(run)
    fit, held = prompt_order.fit_examples(run), evaluation.held_out(run, "validation")
    device = Device(run, state.params, {e.id: e for e in fit + held})
    tables = [
        evaluation.evaluate(run, sample, state.params, examples, "x", natural=False)
        for examples in (fit, held)
    ]
    return device, *tables


def test_rows_that_may_be_of_either_of_two_examples_are_not_scored(capsys):
    run = types.SimpleNamespace(config=ConfigDict({"routers": {"record": ("hidden",)}}))
    examples = [Example("7", "", None, split=split) for split in ("test", "train")]
    assert recorded.with_routers(run, None, {}, examples, None) == {}
    assert "share an id; give each of its own" in capsys.readouterr().err


def test_batches_go_through_all_rows_once():
    assert [(rows.tolist(), n) for rows, n in batches(5, 2)] == [
        ([0, 1], 2),
        ([2, 3], 2),
        ([4, 0], 1),
    ]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("<think> x </think><answer> 1 + 2 </answer>", "1+2"),
        ("<think> x </think><answer></answer>", ""),
        ("<think> 1+2", None),
    ],
)
def test_answers_agree_without_white_space(response, text):
    assert agreement.answer(response) == text


def test_agreement_is_a_share_of_the_samples_and_counts_their_tokens(scene):
    device, _, table = scene
    score, tokens = agreement.score(device, None, table)
    thirds = -score * 3
    assert np.allclose(thirds, thirds.round()) and 0 <= thirds.min() < thirds.max() <= 3
    assert (tokens >= 3).all() and (tokens <= 3 * device.run.config.max_new_tokens).all()
    unanswered = dict(table, text=np.array(["<think> 1+2"] * len(table["id"]), object))
    assert (agreement.score(device, None, unanswered)[0] == 0).all()


@pytest.mark.slow
def test_last_hidden_is_that_of_one_pass_over_the_whole_row(scene):
    device, _, table = scene
    cfg, text, params = device.run.cfg, device.run.text, parallel.unreplicate(device.params)
    prompt = text.prompt_ids(device.run.task.prompt(device.examples_of(table)[0]))
    response = text.response_ids(table["text"][0])
    whole = np.array([prompt + response[:-1]])
    real = np.ones(whole.shape, bool)
    want, _ = decoder.forward(
        params, cfg, whole, decoder.positions_of(real), attention.causal(real)
    )
    padded = np.array([[text.pad_id] * 2 + prompt])
    mask = padded != text.pad_id
    responses = np.array([response + [text.pad_id] * 3])
    got = hidden.last_hidden(params, cfg, padded, mask, responses, np.array([len(response) - 1]))
    np.testing.assert_allclose(got[0], want[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_classifier_learns_what_the_prompt_tells(scene):
    device, fit_on, table = scene
    target = lambda t: np.array([int(p.split("=")[1]) for p in t["prompt"]])  # noqa: E731
    hard = lambda t: dict(t, local_correct=target(t) < 55)  # noqa: E731
    score, tokens = classifier.score(device, hard(fit_on), hard(table))
    assert measures.auc(hard(table), score) > 0.8 and (tokens == 0).all()


def test_a_question_with_braces_in_its_parts_is_filled_in_once():
    template = "Q: {prompt} A: {response}?"
    filled = verification.question(template, "{response} and {x}", "{prompt}")
    assert filled == "Q: {response} and {x} A: {prompt}?"


@pytest.mark.slow
def test_verification_is_the_odds_of_no_against_yes(scene):
    device, _, table = scene
    score, tokens = recorded.RECORDED["verification"](device, None, table)
    cfg, text, params = device.run.cfg, device.run.text, parallel.unreplicate(device.params)
    ids = np.array([text.prompt_ids([{"role": "user", "content": table["text"][3]}])])
    last, _ = decoder.prefill(params, cfg, ids, np.ones(ids.shape, bool))
    logits = decoder.logits(params, cfg, last)[0]
    no, yes = (text.tokenizer.convert_tokens_to_ids(word) for word in ("0", "1"))
    assert (
        score[3] == pytest.approx(float(logits[no] - logits[yes]), abs=1e-4)
        and tokens[3] == ids.size + 1
    )


@pytest.mark.slow
def test_records_get_the_columns_and_compare_reads_them(scene):
    device, fit_on, table = scene
    names = ("hidden", "verification")
    with_columns = recorded.record(names, device, fit_on, table)
    assert set(with_columns) - set(table) == {
        f"{kind}_{name}" for kind in ("score", "tokens") for name in names
    }
    result = comparison.compare({"m": comparison.Model([with_columns], [fit_on])}, resamples=2)
    assert {"m: hidden", "m: verification", "m: margin"} <= set(result["methods"])


def test_a_router_that_fails_costs_itself_alone(scene, monkeypatch, capsys):
    device, fit_on, table = scene
    n = len(table["id"])
    nan = lambda *_: (np.full(n, np.nan), np.zeros(n))  # noqa: E731
    monkeypatch.setitem(recorded.RECORDED, "agreement", nan)
    one_class = dict(fit_on, local_correct=np.ones(len(fit_on["id"]), bool))
    columns = recorded.record(("hidden", "agreement", "verification"), device, one_class, table)
    assert set(columns) - set(table) == {"score_verification", "tokens_verification"}
    warnings = capsys.readouterr().err
    assert "hidden is left out: a router cannot be fitted" in warnings
    assert "agreement is left out: 24 scores are NaN" in warnings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"routers__record": ("oracle",)}, "no 'oracle'"),
        ({"routers__record": ("agreement", "hidden")}, "hidden is learned"),
        ({"routers__record": ("verification",)}, "verify_prompt"),
        (
            {
                "routers__record": ("verification",),
                "routers__verify_prompt": "{response}",
                "routers__yes": "1",
                "routers__no": "1",
            },
            "different tokens",
        ),
        (
            {
                "routers__record": ("classifier",),
                "eval__fit_prompts": 8,
                "routers__classifier": "no-such-model",
            },
            "no model at",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_spent(
    small, tmp_path, changes, says
):
    run = experiment.prepare(small(**changes), tmp_path)
    with pytest.raises(UserError, match=says):
        recorded.check(run)


def test_the_response_read_again_is_what_was_sampled_and_each_gap_is_that_of_the_logits(scene):
    device, _, table = scene
    assert device.run.config.temperature == 1.0  # so log p is the one that was recorded
    score, tokens = forced.policy_logprob(device, None, table)
    np.testing.assert_allclose(score, response.logprob(table), rtol=1e-3, atol=1e-3)
    assert not tokens.any()

    score, _ = forced.token_margin(device, None, table)
    answered = np.flatnonzero(~response.no_answer(table))
    assert (np.delete(score, answered) > score[answered].max(initial=-1)).all()
    row, run = answered[0], device.run
    prompts, mask = device.prompts_of({name: column[[row]] for name, column in table.items()})
    ids = run.text.response_ids(table["text"][row])
    params = parallel.unreplicate(device.params)
    whole = np.concatenate([prompts[0][mask[0]], ids])[None]
    seen = np.tril(np.ones((whole.shape[1],) * 2, bool))[None]
    states, _ = decoder.forward(params, run.cfg, whole, np.arange(whole.shape[1])[None], seen)
    logits = np.array(decoder.logits(params, run.cfg, states[0])[-len(ids) - 1 : -1])
    logits[:, run.text.decision_id] = -np.inf
    p = np.sort(np.exp(logits - logits.max(1, keepdims=True)), axis=1)
    p /= p.sum(1, keepdims=True)
    assert score[row] == pytest.approx(-(p[:, -1] - p[:, -2]).mean(), abs=1e-4)
