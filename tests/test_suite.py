"""The suite of benchmarks, and a mix, on a tiny random model that reads and writes characters; the
suite's arithmetic.
"""

import json
import runpy
import string
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL
from fakes import make_table as make

from collab_jax import evaluate, records, train
from collab_jax.models import decoder, hf
from collab_jax.models import text as text_lib
from collab_jax.reports import suite
from collab_jax.rl import evaluation, experiment, prompt_order, rollout, training
from collab_jax.routing import curves
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError

TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<unknown>",
    " I need external assistance ",
    "</unknown>",
)
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
SIZES = {
    "math_train": 9,
    "gsm8k_train": 5,
    "math_test": 6,
    "gsm8k_test": 6,
    "math500": 5,
    "amc23": 3,
    "aime24": 2,
    "minerva_math": 4,
    "agieval_math": 5,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, folder) of a random model that knows each character, and rows of each benchmark."""
    folder = tmp_path_factory.mktemp("suite")
    characters = sorted(set(string.printable) - set("\r\x0b\x0c"))
    text_lib.word_tokenizer([*TAGS, *characters], "<pad>", "<eos>", "<unk>").save_pretrained(
        folder / "words"
    )
    cfg = hf.config_from_hf(ARCHITECTURE | {"vocab_size": 3 + len(TAGS) + len(characters)})
    params = decoder.init(cfg, jax.random.key(0))
    hf.save(
        folder / "model",
        params,
        ARCHITECTURE | {"vocab_size": cfg.vocab_size},
        "float32",
        folder / "words",
    )
    for name, count in SIZES.items():
        rows = [
            {"id": f"{name}/{i}", "problem": f"{i}+{i}?", "answer": str(2 * i), "level": 1}
            for i in range(count)
        ]
        rows.append(rows[0] | {"id": "long", "problem": "1+" * 30})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = {"choices": ["1", "2"], "answer": "B"}
    rows = [
        {"id": f"c{i}", "problem": f"{i}?", **choices, **({"math_train_id": "x"} if i == 1 else {})}
        for i in range(4)
    ]
    (folder / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SMALL | {
        "model.path": str(folder / "model"),
        "task.name": "mix",
        "task.mix": (("math", 3), ("gsm8k", 1)),
        "task.data_dir": str(folder),
        "task.prompt": "{problem}",
        "budget": 0.4,
        "prompt_length": 20,
        "max_new_tokens": 8,
        "eval.prompts": 8,
        "eval.batch_size": 8,
        "eval.samples": 3,
        "eval.temperature": 1.0,
        "decode.slot_counts": 1,
    }
    common = str(ROOT / "configs" / "common.py")
    (folder / "config.py").write_text(
        f"import runpy\n\ndef get_config():\n"
        f"    config = runpy.run_path({common!r})['get_config']()\n"
        f"    config.update_from_flattened_dict({settings!r})\n"
        "    return config\n"
    )
    return runpy.run_path(str(folder / "config.py"))["get_config"]().lock(), folder


@pytest.mark.slow
def test_a_mix_is_sampled_by_its_weights_and_its_records_tell_the_tasks_apart(made, tmp_path):
    run = experiment.prepare(made[0], tmp_path)
    examples = experiment.examples(run, "train")
    assert len(examples) == 14  # one too long in each task
    choose = prompt_order.chooser(run, examples)
    for step in range(3):  # 8 prompts a step: 6 and 2
        assert sorted(examples[i].task for i in choose(step, 8)) == ["gsm8k"] * 2 + ["math"] * 6
    config = made[0].copy_and_resolve_references()
    config.eval.fit_prompts, config.train.steps = 2, 1
    left = prompt_order.fit_examples(run._replace(config=config))
    used = {examples[i].id for i in choose(0, 8)}
    assert len(left) == 2 and not used & {e.id for e in left}

    sample = rollout.make_sampler(run.cfg, run.text, run.config, group=1, temperature=1.0)
    params = parallel.replicate(experiment.load_state(run)).params
    batch = training.TrainingSteps(run).batch(0)
    assert [e.id for e in batch.examples] == [examples[i].id for i in choose(0, 8)]
    got = rollout.collect(run, sample, params, batch, step=0)
    assert got.cloud_asked == 8 and not got.missing.responses
    assert (
        parallel.gather(got.rollout).cloud_correct.sum() >= 6
    )  # the simulated cloud knows both tasks

    held = evaluation.held_out(run, "test")
    table = evaluation.evaluate(run, sample, params, held, "mix", seed=1)
    assert table["task"].tolist() == [example.task for example in held]
    dealt = Counter(example.task for example in run.task.load("test")[:8])
    assert dealt == {"math": 6, "gsm8k": 2}  # before what is too long is left out
    assert set(table["stratum"]) == {"math, level 1", "gsm8k, level 1"}


@pytest.mark.slow
def test_the_reports_of_a_mix_tell_its_tasks_apart(made, tmp_path, capsys):
    config = made[0].copy_and_resolve_references()
    config.eval.split, config.train.steps = "test", 1
    config.task.unsafe_code = True  # these tasks are no code, but the reports do not look for it
    assert train.main(config, tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["after"]["by_task"]
    assert "## By task" in text and set(found["tasks"]) == {"gsm8k", "math"}
    table = records.read(tmp_path / "after.parquet")
    for name, of in found["tasks"].items():
        here = table["task"] == name
        assert of["n"] == here.sum() and of["call_rate"]["value"] == (
            table["natural_called"][here].mean()
        )
    capsys.readouterr()
    assert evaluate.main(config, tmp_path, "test") == 0
    said = capsys.readouterr().out
    assert "Code was judged without a sandbox" in said and "## By task" in said
    evaluated = json.loads((tmp_path / "test.json").read_text())
    assert evaluated["by_task"] == found  # the same prompts, the same model


@pytest.fixture(scope="module")
def workdir(made, tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.mark.slow
@pytest.mark.long
def test_the_papers_table_in_one_command(made, workdir):
    command = [sys.executable, "-m", "collab_jax.evaluate", "--suite", "paper"]
    command += ["--config", str(made[1] / "config.py"), "--workdir", str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    out = workdir / "suite-paper"
    result = json.loads((out / "table.json").read_text())
    assert list(result["benchmarks"]) == list(suite.SUITES["paper"]) and result["step"] == 0
    sizes = {
        name: (of["prompts"], of["samples"], of["too_long"])
        for name, of in result["benchmarks"].items()
    }
    assert sizes == {
        name: (SIZES[name], 3 if name in suite.SMALL else 1, 1) for name in suite.SUITES["paper"]
    }
    for name, of in result["benchmarks"].items():
        table = records.read(out / f"{name}.parquet")
        assert (
            set(table["task"]) == {name} and len(set(table["id"])) == of["prompts"] * of["samples"]
        )
        assert of["device"]["value"] == table["local_correct"].mean()
        assert of["lenient"]["value"] == table["lenient_correct"].mean()
        assert (table["lenient_correct"] | ~table["local_correct"]).all()
        assert table["cloud_known"].all()
        assert of["cloud"]["value"] == pytest.approx(table["cloud_correct"].mean())
        assert of["calls"]["value"] == pytest.approx(table["natural_called"].mean())
    drawn = records.read(out / "amc23.parquet")
    assert drawn["id"].tolist() == [f"amc23/{i}#{s}" for s in (1, 2, 3) for i in range(3)]
    assert len(set(drawn["text"])) > 3  # samples of a prompt differ
    for column in suite.COLUMNS:
        values = [of[column]["value"] for of in result["benchmarks"].values()]
        assert result["average"][column]["value"] == pytest.approx(np.mean(values))
    text = (out / "table.md").read_text()
    assert text in done.stdout
    assert "40 % calls: margin" in text and "3 x 3" in text and "102 of them in math500" in text
    assert "amc23: left out 1 prompts over config.prompt_length" in text and "80.4" in text


@pytest.mark.slow
def test_rows_that_the_run_was_trained_on_are_left_out(made, workdir):
    assert suite.evaluate_suite(made[0], workdir, "mmlu,gsm8k") == 0
    result = json.loads((workdir / "suite-mmlu+gsm8k" / "table.json").read_text())
    assert (
        result["benchmarks"]["mmlu"]["prompts"] == 3
        and result["benchmarks"]["mmlu"]["seen_in_training"] == 1
    )
    assert any(
        "left out 1 problems that stand in the training data of this run (gsm8k, math)" in n
        for n in result["notes"]
    )
    assert not records.read(workdir / "suite-mmlu+gsm8k" / "mmlu.parquet")["local_correct"].any()


@pytest.mark.slow
def test_an_unknown_suite_is_named(made, workdir):
    with pytest.raises(
        UserError, match=r"--suite papers: no 'papers' among the suites \['paper'\] and the tasks"
    ):
        suite.evaluate_suite(made[0], workdir, "papers")
    with pytest.raises(UserError, match="'chess'"):
        suite.benchmarks("math,chess")


# ---- its arithmetic


def test_figures_by_hand():
    # local T F F T F, cloud T T F F T, margin -3 2 1 -1 and no answer first
    table = make(lenient_correct=[True, False, True, True, False])
    of = suite.figures([table], 0.4, seed=0)
    at = {name: values[0] for name, values in of.items()}
    # 40 % of five: the unanswered one (rescued) and the margin of 2 (rescued)
    assert at == pytest.approx(
        {
            "device": 0.4,
            "lenient": 0.6,
            "calls": 0.4,
            "overall": 0.6,
            "margin": 0.8,
            "random": 0.48,
            "cloud": 0.6,
        }
    )
    worse = make(local_correct=[False] * 5, natural_called=[False] * 5, natural_correct=[False] * 5)
    both = {name: values[0] for name, values in suite.figures([table, worse], 0.4, seed=0).items()}
    assert both["device"] == pytest.approx(0.2) and both["calls"] == pytest.approx(0.2)
    assert both["margin"] == pytest.approx((0.8 + 0.4) / 2)


def test_figures_of_graded_answers_are_mean_grades():
    table = make(
        lenient_correct=[True, False, True, True, False],
        local_grade=[1.0, 0.2, 0.4, 0.8, 0.0],
        lenient_grade=[1.0, 0.2, 0.9, 0.8, 0.1],
        cloud_grade=[1.0, 0.9, 0.1, 0.3, 0.7],
        natural_grade=[1.0, 0.2, 0.4, 0.8, 0.0],
    )
    at = {name: values[0] for name, values in suite.figures([table], 0.2, seed=0).items()}
    assert at["device"] == pytest.approx(2.4 / 5) and at["lenient"] == pytest.approx(3.0 / 5)
    assert at["calls"] == 0.4 and at["cloud"] == pytest.approx(3.0 / 5)
    # The first two call: 1.0 + 0.9 of the cloud. By margin the last one goes: 0.7 for 0.0.
    assert at["overall"] == pytest.approx(3.1 / 5) and at["margin"] == pytest.approx(3.1 / 5)


def test_intervals_are_of_prompts_not_of_samples():
    one = make(50, seed=1)
    alone, twice = (suite.figures([one] * k, 0.3, seed=0) for k in (1, 2))
    for name in suite.COLUMNS:  # the same sample twice says no more than once
        assert np.allclose(alone[name], twice[name])
    width = lambda rate: rate["high"] - rate["low"]  # noqa: E731
    counts = {"samples": 1}
    tables = {f"b{i}": make(100, seed=i) for i in range(4)}
    result = suite.summarize(tables, dict.fromkeys(tables, counts), 0.3)
    widths = [width(of["device"]) for of in result["benchmarks"].values()]
    assert width(result["average"]["device"]) == pytest.approx(
        np.mean(widths) / 2, rel=0.2
    )  # four independent ones
    assert result["benchmarks"]["b1"]["device"] == curves.estimate(
        suite.figures([make(100, seed=1)], 0.3, 1)["device"]
    )


def test_figures_of_the_cloud_are_over_known_verdicts_and_a_note_says_how_many_are_not():
    table = make()  # local T F F T F, cloud T T F F T, calls on 0 and 1
    known = np.array([True, False, True, True, True])
    table |= {"cloud_known": known, "cloud_correct": table["cloud_correct"] & known}
    at = {name: values[0] for name, values in suite.figures([table], 0.25, seed=0).items()}
    assert at["device"] == pytest.approx(0.4) and at["calls"] == pytest.approx(0.4)
    # Of the four known ones: the cloud is right on 0 and 4, local on 0 and 3; one call rescues 4.
    assert at["cloud"] == pytest.approx(0.5) and at["overall"] == pytest.approx(0.5)
    assert at["margin"] == pytest.approx(0.75)
    figure = {"prompts": 5, "samples": 1, "seen_in_training": 0, "too_long": 0, "unjudged": 2}
    figure["cloud_unknown"] = 1
    result = {"benchmarks": {"amc23": figure}, "trained_on": ["math"], "unsafe_code": False}
    first, second = suite.notes("x", result)
    assert first.startswith("amc23: the cloud's verdict is not known on 1 of 5 responses")
    assert second == "amc23: 2 of 5 responses could not be judged; they count as wrong."
    told = suite.notes("x", result | {"unsafe_code": True})
    assert told == ["Code was judged without a sandbox (config.task.unsafe_code).", first, second]
