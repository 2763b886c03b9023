"""Routers: what each ranks first, that learned ones learn, and what they refuse."""

import numpy as np
import pytest
from fakes import make_table as make

from collab_jax.routing import learned, measures, recorded, response, routers
from collab_jax.routing.response import no_answer
from collab_jax.runtime.errors import UserError

T, F = True, False


@pytest.mark.parametrize("name", ["margin", "logprob"])
def test_what_has_no_answer_goes_first_and_in_the_routers_order(name):
    table = make(300)
    first, score = no_answer(table), routers.score(name, table)
    assert 0 < first.sum() < 300
    assert score[first].min() > score[~first].max() and len(np.unique(score[first])) == first.sum()
    by = table["margin"] if name == "margin" else -table["logp"]
    for part in (first, ~first):
        assert (np.argsort(score[part]) == np.argsort(by[part])).all()


def test_random_is_expected_and_perfect_is_best():
    table = make(500)
    right = {
        name: measures.replay(table, routers.score(name, table), 0.3).mean()
        for name in ("random", "perfect", "margin")
    }
    ends = table["local_correct"].mean(), table["cloud_correct"].mean()
    assert right["random"] == pytest.approx(0.7 * ends[0] + 0.3 * ends[1])
    assert right["perfect"] > max(right["random"], right["margin"])


def test_features_of_a_prompt_by_hand():
    (row,) = learned.prompt_features(["3 4\nA12=7.5"])
    assert row[:8].tolist() == [
        11,
        3,
        1,
        6,
        1,
        1,
        2,
        4,
    ]  # characters, words, lines, digits, letters, capitals, spaces, numbers
    assert row[8:].tolist() == [3, 4, 12, 7.5, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 7.5, 12]


def hard_or_easy(n, seed):
    """Prompts that the device gets wrong where their first number is large."""
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 100, n)
    return make(
        n,
        seed,
        id=[f"{seed}-{i}" for i in range(n)],
        prompt=[f"{a} {b}" for a, b in zip(first, draw.integers(0, 100, n), strict=True)],
        local_correct=first < 50,
        margin=draw.normal(size=n) + (first >= 50),
        logp=draw.normal(size=n) - (first >= 50),
    )


@pytest.mark.parametrize(
    "name, floor", [("features_linear", 0.98), ("features_trees", 0.98), ("margin_logprob", 0.78)]
)
def test_learned_routers_learn(name, floor):
    fit_on, table = hard_or_easy(400, 1), hard_or_easy(400, 2)
    answered = {key: column[~no_answer(table)] for key, column in table.items()}
    score = lambda t: routers.score(name, t, fit_on)  # noqa: E731
    assert measures.auc(answered, score(answered)) > floor
    if name == "margin_logprob":  # better than either alone, and what has no answer first
        assert measures.auc(answered, score(answered)) > max(
            measures.auc(answered, routers.score(single, answered))
            for single in ("margin", "logprob")
        )
        assert score(table)[no_answer(table)].min() > score(table)[~no_answer(table)].max()


def test_recorded_scores_are_routers():
    table = make(5 * 2, score_mine=range(10))
    assert routers.possible(table)[-1] == "mine" and routers.score("mine", table).tolist() == list(
        range(10)
    )


def test_possible_are_those_with_columns():
    table = make()
    assert routers.possible(table) == ["random", "logprob", "margin", "reachable", "perfect"]
    learned_too = ["features_linear", "features_trees", "margin_logprob"]
    own = [*routers.possible(table), *learned_too]
    assert sorted(routers.possible(table, make(id=list("abcde")))) == sorted(own)
    columns = {f"score_{name}": np.zeros(5) for name in ("ours", *recorded.RECORDED)}
    columns |= dict.fromkeys(("answer_logp", "first_margin", "last_margin"), np.zeros(5))
    columns["text"] = np.array(["x"] * 5, object)
    assert routers.possible(table | columns, make(id=list("abcde"))) == [*routers.ROUTERS, "ours"]
    bare = {name: table[name] for name in ("id", "local_correct", "cloud_correct")}
    assert routers.possible(bare) == ["random", "reachable", "perfect"]


def test_refusals():
    table = make()
    with pytest.raises(UserError, match="no router 'best'.*score_best"):
        routers.score("best", table)
    with pytest.raises(UserError, match="learned: give records of other prompts"):
        routers.score("features_linear", table)
    with pytest.raises(UserError, match="prompts that it is judged on"):
        routers.score("features_linear", table, table)
    with pytest.raises(UserError, match="wrong on all 5"):
        routers.score("features_linear", table, make(id=list("abcde"), local_correct=[False] * 5))
    with pytest.raises(UserError, match="no column logp"):
        routers.score("logprob", {name: column for name, column in table.items() if name != "logp"})


def test_the_last_result_leads_to_the_answer_or_the_prompt_or_nowhere():
    texts = [
        "<think>9+9=18\n18+37=55</think><answer>9+9+37</answer>",  # to the target
        "<think>9+9=18\n18+36=54</think><answer>9+9+36</answer>",  # to neither
        "<think>2*3=6\n6+1=7</think><answer> 7 apples </answer>",  # to the answer
        "<think>x</think><answer>7</answer>",  # no result
        "<think>2*3=6",  # no answer
    ]
    table = make(text=texts, prompt=["9 9 37=55"] * 2 + ["2*3+1"] * 3)
    table |= {"formatted": np.array([T, T, T, T, F]), "ended": np.array([T] * 5)}
    assert response.last_result(table).tolist() == [0, 1, 0, 1, 1 + response.FIRST]


def test_other_gates_are_in_order_like_the_first():
    table = make(
        answer_logp=[-1.0, -3, 0, -2, -9],
        first_margin=[0.5, -np.inf, 2, 1, 0],
        last_margin=[1.0, 0, 3, 2, -np.inf],
    )
    table |= {"formatted": np.array([T, T, T, T, F]), "ended": np.array([T] * 5)}
    order = lambda name: np.argsort(-routers.score(name, table), kind="stable").tolist()  # noqa: E731
    assert order("answer_logprob") == [4, 1, 3, 0, 2]
    assert order("first_margin") == [2, 3, 0, 4, 1]  # it does not see that the last is cut off
    assert order("last_margin") == [4, 2, 3, 0, 1]
