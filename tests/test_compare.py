"""The comparison from files alone: figures by hand, the reference, seeds, names, refusals."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from fakes import make_table as make
from PIL import Image

from collab_jax import compare, records
from collab_jax.reports import comparison
from collab_jax.reports.comparison import Model
from collab_jax.routing import costs
from collab_jax.runtime.errors import UserError


def test_compare_by_hand():
    result = comparison.compare({"m": Model([make()], [None])}, budgets=(0.2, 0.4), resamples=20)
    assert (
        result["reference"] == "m: margin"
        and result["prompts"] == 5
        and result["models"]["m"]["local_accuracy"]["value"] == 0.4
        and result["models"]["m"]["no_answer"]["value"] == 0.2
    )
    at = {name: method["at_budget"] for name, method in result["methods"].items()}
    assert at["m: margin"]["0.2"]["accuracy"]["value"] == pytest.approx(0.6)
    assert at["m: margin"]["0.4"]["accuracy"]["value"] == pytest.approx(
        0.8
    )  # 4, then 1: both right in the cloud alone
    assert at["m: margin"]["0.4"]["rescued"] == 2 and at["m: margin"]["0.4"]["harmed"] == 0
    assert at["m: random"]["0.4"]["accuracy"]["value"] == pytest.approx(0.6 * 0.4 + 0.4 * 0.6)
    assert at["m: random"]["0.4"]["reference_minus_this"]["value"] == pytest.approx(0.8 - 0.48)
    assert at["m: margin"]["0.4"]["reference_minus_this"] == {"value": 0, "low": 0, "high": 0}
    # The cloud is right on 2 of the 3 that the device gets wrong, and margin sends these two.
    assert at["m: reachable"]["0.4"]["accuracy"]["value"] == pytest.approx(0.4 + 0.4 * 2 / 3)
    shares = [at[f"m: {name}"]["0.4"]["reachable_share"]["value"] for name in ("margin", "perfect")]
    assert shares == pytest.approx([12 / 7, 12 / 7])
    assert (
        result["methods"]["m: margin"]["auc"] == 1.0
        and result["methods"]["m: random"]["auc"] == 0.5
    )


def test_what_a_model_decides_by_itself_beside_a_gate_that_calls_as_often():
    table = make(natural_called=[True, False, False, False, True], natural_correct=[False] * 5)
    model = comparison.compare({"m": Model([table], [None])}, resamples=20)["models"]["m"]
    assert model["natural_call_rate"]["value"] == pytest.approx(0.4)
    assert model["natural_accuracy"]["value"] == pytest.approx(0.4)  # the two that it calls on
    # Two calls by log-probability are 4, without an answer, and 1: 4 of 5 right.
    assert model["natural_minus_gate"]["value"] == pytest.approx(0.4 - 0.8)


def test_a_share_of_calls_stays_a_share_however_far_its_seeds_are_apart():
    seeds = [make(50, natural_called=[called] * 50) for called in (True, False)]
    model = comparison.compare({"m": Model(seeds, [None] * 2)}, resamples=50)["models"]["m"]
    assert model["natural_call_rate"] == {"value": 0.5, "low": 0, "high": 1}


def test_an_accuracy_stays_one_however_far_its_seeds_are_apart():
    right = lambda share: np.arange(50) < share * 50  # noqa: E731
    seeds = [make(50, local_correct=right(share)) for share in (0.02, 0.06)]
    result = comparison.compare({"m": Model(seeds, [None] * 2)}, resamples=50)
    assert result["models"]["m"]["local_accuracy"]["low"] == 0
    at_budget = result["methods"]["m: random"]["at_budget"]["0.1"]
    assert 0 <= at_budget["accuracy"]["low"] < at_budget["accuracy"]["high"] <= 1


def test_rows_in_another_order_change_nothing():
    called = np.arange(50) % 3 == 0
    table = make(50, natural_called=called, natural_correct=~called)
    mixed = {key: values[::-1] for key, values in table.items()}
    same, other = (
        comparison.compare({"m": Model([table, second], [None] * 2)}, resamples=50)
        for second in (table, mixed)
    )
    assert same == other


def test_what_no_prompt_has_is_not_known_to_be_nothing():
    seeds = [make(100, natural_called=[False] * 100) for _ in range(2)]
    model = comparison.compare({"m": Model(seeds, [None] * 2)}, resamples=50)["models"]["m"]
    z = 1.959964  # Wilson's interval of 0 in n is 0 to z^2 / (n + z^2)
    high = pytest.approx(z**2 / (100 + z**2), abs=1e-6)
    assert model["natural_call_rate"] == {"value": 0, "low": 0, "high": high}


def test_a_difference_is_paired_and_a_model_with_itself_has_none():
    twice = {"a": Model([make(200), make(200, local_correct=[True] * 200)], [None] * 2)}
    both = comparison.compare({**twice, "b": twice["a"]}, resamples=50)
    assert both["seeds"] == {"a": 2, "b": 2}
    for at in both["methods"]["b: margin"]["at_budget"].values():
        assert at["reference_minus_this"] == {"value": 0, "low": 0, "high": 0}
        assert at["accuracy"]["low"] < at["accuracy"]["value"] < at["accuracy"]["high"]


def test_rows_in_another_order_are_the_same_prompts():
    table = make(100)
    backwards = {name: column[::-1] for name, column in table.items()}
    result = comparison.compare(
        {"a": Model([table], [None]), "b": Model([backwards], [None])}, resamples=10
    )
    a, b = (result["methods"][f"{m}: logprob"]["at_budget"] for m in "ab")
    assert {k: v["accuracy"] for k, v in a.items()} == {k: v["accuracy"] for k, v in b.items()}
    with pytest.raises(UserError, match="other prompts"):
        comparison.compare({"a": Model([table], [None]), "b": Model([make(99)], [None])})


def test_prompts_without_a_cloud_verdict_are_left_out_and_told():
    table = make()
    table["cloud_known"] = table["id"] != table["id"][0]
    result = comparison.compare({"m": Model([table], [None])}, resamples=10)
    assert (result["prompts"], result["cloud_unknown"]) == (4, 1)
    assert "4 held-out prompts" in (text := comparison.render(result))
    assert "Left out: 1 whose cloud verdict is not known" in text
    whole = comparison.compare({"m": Model([make()], [None])}, resamples=10)
    assert "Left out" not in comparison.render(whole)


def test_costs_by_hand():
    table = make(
        cloud_usd=[0.5] * 5,
        margins=[[-3.0] * 10, [0.0, 2.0] + [0.0] * 8, [1.0] * 10, [-1.0] * 10, [-2.0] * 10],
    )
    prices = costs.Prices(cloud_seconds=3.0, device_ms_per_token=100)
    result = comparison.compare(
        {"m": Model([table], [None])}, budgets=(0.4,), resamples=5, prices=prices
    )
    at = {name: method["at_budget"]["0.4"] for name, method in result["methods"].items()}
    # Sent: 4, which has no answer and runs to its end, and 1, which stops at the token where its
    # margin is 2.
    want = {"usd": 0.2, "seconds": (4 * 1.0 + 0.2) / 5 + 0.4 * 3, "device_tokens": 42 / 5}
    assert {key: at["m: margin"][key] for key in want} == pytest.approx(want)
    assert at["m: logprob"]["device_tokens"] == 10 and at["m: random"][
        "device_tokens"
    ] == pytest.approx(6)
    assert "Cost of a prompt" in comparison.render(result)


def test_prices_need_a_latency(tmp_path):
    records.write(tmp_path / "a.csv", make())
    with pytest.raises(UserError, match="--cloud_seconds"):
        compare.main(
            ["--records", str(tmp_path / "a.csv"), "--out", str(tmp_path), "--usd_per_call", "1"]
        )


def test_names_of_tables():
    names = lambda *words: list(compare.parse_tables(words))  # noqa: E731
    assert names("x=a/b.csv,a/c.csv", "d/e.parquet") == ["x", "e"]
    assert names("a/after.parquet", "b/after.parquet") == ["a/after", "b/after"]
    assert compare.parse_tables(["x=a/lr=1/b.csv", "a/lr=2/c.csv"]) == {
        "x": [pathlib.Path("a/lr=1/b.csv")], "c": [pathlib.Path("a/lr=2/c.csv")]
    }  # fmt: skip
    with pytest.raises(UserError, match="two tables are called 'x'"):
        names("x=a.csv", "x=b.csv")


def test_command_line_without_jax_from_anybodys_csv(tmp_path):
    """jax and transformers cannot even be imported there."""
    theirs = tmp_path / "theirs.csv"
    theirs.write_text(
        "id,local_correct,cloud_correct,score_ours\n"
        + "".join(f"q{i},{i % 2},1,{-i}\n" for i in range(20))
    )
    block = (
        "import sys; sys.modules.update(jax=None, transformers=None, flax=None)\n"
        "from collab_jax import compare\n"
    )
    words = ["--records", f"theirs={theirs}", "--out", str(tmp_path / "out"), "--resamples", "30"]
    done = subprocess.run(
        [sys.executable, "-c", block + f"sys.exit(compare.main({words!r}))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(result["methods"]) == [
        "theirs: random",
        "theirs: reachable",
        "theirs: perfect",
        "theirs: ours",
    ]
    assert (
        "theirs: ours" in (tmp_path / "out" / "compare.md").read_text()
        and "theirs: ours" in done.stdout
    )
    drawn = (tmp_path / "out" / "frontier.svg").read_text()
    assert [drawn.count(f"<!-- theirs: {name} -->") for name in ("random", "perfect", "ours")] == [
        1
    ] * 3
    with Image.open(tmp_path / "out" / "frontier.png") as image:
        assert image.size == (960, 660)


def test_fit_tables_go_with_records(tmp_path):
    for name, table in {"a": make(60), "fit": make(60, 1, id=[f"f{i}" for i in range(60)])}.items():
        records.write(tmp_path / f"{name}.parquet", table)
    a, fit = str(tmp_path / "a.parquet"), str(tmp_path / "fit.parquet")
    models = compare.load([f"m={a}"], [f"m={fit}"])
    assert "m: features_trees" in comparison.score_all(models)
    with pytest.raises(UserError, match="one for each seed"):
        compare.load([f"m={a}"], [f"m={fit},{fit}"])
    with pytest.raises(UserError, match="no method 'x: y'"):
        comparison.compare(models, resamples=5, reference="x: y")
