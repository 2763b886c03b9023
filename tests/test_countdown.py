"""Countdown: the stream of problems, the data set on disk, the cloud's prompt."""

import hashlib
import itertools
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from streams import take, tiny_config, within

from collab_jax.cloud import SimulatedCloud, simulated
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, TaskError, base, countdown, make_task
from collab_jax.tasks.base import SPLITS
from collab_jax.tasks.countdown import generate, load, split_of
from collab_jax.tasks.expressions import is_solution, solve


def pair(numbers, target):
    return tuple(sorted(numbers)), target


# ---- the two sides, the stream


def test_split_never_changes():
    # printf '[3, 8]=24' | b2sum -l 32: 8cc5ec38, of remainder 8 by 16; [1, 2, 3]=6: 5cd873a2;
    # [3, 3, 8, 8]=24: 9de0ab9e
    assert split_of((3, 8), 24) == split_of((8, 3), 24) == "validation"
    assert split_of((1, 2, 3), 6) == "train"
    assert {split_of(order, 24) for order in itertools.permutations((3, 8, 3, 8))} == {"train"}
    sides = {split_of((3, 8), target) for target in range(10, 60)}
    assert sides == set(SPLITS)  # the target counts, too


def test_one_pair_in_sixteen_is_a_test_and_one_for_validation():
    sides = Counter(split_of(numbers, 24) for numbers in itertools.combinations(range(1, 36), 3))
    assert within(sides["test"], sides.total(), 1 / 16)
    assert within(sides["validation"], sides.total(), 1 / 16)


def test_stream_is_fixed_by_split_and_seed():
    config = tiny_config().task
    keys = [("train", 0), ("train", 0), ("train", 1), ("test", 0)]
    streams = [take(200, generate(split, seed, config)) for split, seed in keys]
    assert streams[0] == streams[1]
    rows = [{(numbers, target) for numbers, target, _ in stream} for stream in streams]
    assert all(len(a & b) < 5 for a, b in itertools.combinations(rows[1:], 2))
    # what data sets on disk hold: a new stream needs a new Countdown.VERSION
    text = "\n".join(f"{numbers}={target}" for numbers, target, _ in streams[0])
    assert text.startswith("(50, 48, 37)=39\n(37, 35, 16)=14\n")
    assert hashlib.sha256(text.encode()).hexdigest().startswith("91e7a8ca0417c480e5573c1a3b746220")


def test_sides_are_disjoint_whatever_the_seeds():
    # Few pairs: each side has most of its own.
    config = tiny_config(numbers=(1, 9), targets=(10, 30)).task
    sides = {split: set() for split in SPLITS}
    for split, pairs in sides.items():
        for seed in (0, 1):
            pairs.update(pair(n, t) for n, t, _ in take(500, generate(split, seed, config)))
    assert all(not a & b for a, b in itertools.combinations(sides.values(), 2))
    assert min(map(len, sides.values())) > 50
    assert all(split_of(*p) == split for split, pairs in sides.items() for p in pairs)


def test_ranges_are_honoured_to_their_ends():
    rows = take(800, generate("train", 3, tiny_config(numbers=(3, 9), targets=(20, 26)).task))
    assert {n for numbers, _, _ in rows for n in numbers} == set(range(3, 10))
    assert {target for _, target, _ in rows} == set(range(20, 27))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mix_is_as_configured(share):
    # 4-number examples from 1 to 50 are less often accepted than 3-number ones: that must not show
    stream = generate("train", 4, tiny_config(share_of_three=share).task)
    counts = Counter(len(numbers) for numbers, _, _ in take(3_000, stream))
    assert set(counts) <= {3, 4} and within(counts[3], 3_000, share)


def test_solutions_of_the_stream_are_right():
    for numbers, target, found in take(1_000, generate("train", 6, tiny_config().task)):
        assert found.value == target and is_solution(numbers, target, found.expression)


def test_ranges_without_any_example_end(monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 3_000)
    with pytest.raises(TaskError, match="widen config.task.numbers or targets"):
        next(generate("train", 0, tiny_config(numbers=(1, 1), targets=(50, 60)).task))


def test_solves_generated_examples():
    for numbers, target, _ in take(150, generate("test", 5, tiny_config().task)):
        assert is_solution(numbers, target, solve(numbers, target))


# ---- the data set on disk


def data_config(folder, **changes):
    sizes = {"train_examples": 400, "test_examples": 150}
    return tiny_config(data_dir=str(folder), **sizes | changes).task


def files(folder):
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(error):
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = data_config(folder)
    return folder, config, {split: load(split, config) for split in SPLITS}


def test_built_without_tensorflow(built):
    assert "tensorflow" not in sys.modules
    assert any("array_record" in name.name for name in files(built[0]))


def test_rows(built):
    _, config, rows = built
    sizes = {split: len(examples) for split, examples in rows.items()}
    assert sizes == {"train": 400, "validation": 150, "test": 150}
    for split, examples in rows.items():
        assert len({e.id for e in examples}) == len(examples)
        for example in examples:
            numbers, target = example.problem
            assert all(type(n) is int and 1 <= n <= 50 for n in numbers)
            assert type(target) is int and 10 <= target <= 99
            assert example.stratum == f"{len(numbers)} numbers" and len(numbers) in (3, 4)
            assert example.difficulty == (0.25 if len(numbers) == 3 else 0.75)
            assert split_of(numbers, target) == split
        problems = {e.problem for e in examples}
        stream = take(len(examples), generate(split, "data 0", config, set()))
        assert problems == {(n, t) for n, t, _ in stream}
        # What the warm start shows with solutions is other problems.
        shown = {(n, t) for n, t, _ in take(300, generate(split, 0, config))}
        assert len(problems & shown) < 5
    assert within(sum(len(e.problem[0]) == 3 for e in rows["train"]), 400, config.share_of_three)


def test_no_duplicates_in_or_across_splits(tmp_path):
    # small numbers: the stream itself repeats often
    config = data_config(
        tmp_path, numbers=(1, 6), targets=(10, 30), train_examples=400, test_examples=20
    )
    assert len({pair(n, t) for n, t, _ in take(400, generate("train", 0, config))}) < 300
    pairs = [pair(*e.problem) for split in SPLITS for e in load(split, config)]
    assert len(pairs) == len(set(pairs)) == 440


def test_mix_on_disk_is_as_configured(tmp_path):
    config = data_config(
        tmp_path, numbers=(1, 9), targets=(10, 40), train_examples=1_100, test_examples=20
    )
    of_three = sum(len(e.problem[0]) == 3 for e in load("train", config))
    assert within(of_three, 1_100, config.share_of_three)


def test_same_bytes_and_rows_twice(built, tmp_path):
    folder, _, rows = built
    assert {split: load(split, data_config(tmp_path)) for split in SPLITS} == rows
    first, second = files(folder), files(tmp_path)
    assert first.keys() == second.keys() and len(first) >= 4
    for name in first:
        if "array_record" in name.name:
            assert first[name].read_bytes() == second[name].read_bytes()


def test_second_load_builds_nothing(built, monkeypatch, capfd):
    folder, config, rows = built

    def never(*args, **kwargs):
        raise AssertionError("built again")

    monkeypatch.setattr(countdown, "generate", never)
    before = {name: path.stat().st_mtime_ns for name, path in files(folder).items()}
    start = time.process_time()
    assert load("train", config) == rows["train"]
    assert time.process_time() - start < 2
    assert {name: path.stat().st_mtime_ns for name, path in files(folder).items()} == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"data_seed": 1},
        {"train_examples": 40},
        {"numbers": (1, 40)},
        {"targets": (10, 90)},
        {"share_of_three": 0.6},
    ],
)
def test_other_settings_are_other_data(built, changes):
    folder, _, rows = built
    sizes = {"train_examples": 50, "test_examples": 20}
    other = load("train", data_config(folder, **sizes | changes))
    usual = load("train", data_config(folder, **sizes))
    assert [e.problem for e in other] != [e.problem for e in usual]
    assert load("train", data_config(folder)) == rows["train"]


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("test", data_config("~/data", train_examples=10, test_examples=5))) == 5
    assert (tmp_path / "data").is_dir()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TaskError, match="cannot write.*set config.task.data_dir") as error:
            load("train", data_config(folder))
        assert str(folder) in one_line(error)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_folder_without_permission(tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(TaskError, match="cannot write.*set config.task.data_dir") as error:
        load("train", data_config(tmp_path / "sealed"))
    one_line(error)


def test_more_examples_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 20_000)
    narrow = {"numbers": (1, 2), "targets": (1, 6), "test_examples": 1}
    says = "after [0-9]+ different ones: ask for fewer config.task.train_examples"
    with pytest.raises(TaskError, match=says) as error:
        load("train", data_config(tmp_path, train_examples=500, **narrow))
    possible = int(re.search("after ([0-9]+) different", one_line(error))[1])
    assert len(load("train", data_config(tmp_path, train_examples=possible, **narrow))) == possible


def test_no_example_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "MAX_TRIES", 3_000)
    with pytest.raises(TaskError, match="widen config.task.numbers or targets") as error:
        load("train", data_config(tmp_path, numbers=(1, 1), targets=(50, 60)))
    one_line(error)


def test_another_process_builds_first(tmp_path, monkeypatch):
    config, first = data_config(tmp_path, train_examples=30, test_examples=10), []

    def generate_late(*args, **kwargs):
        monkeypatch.setattr(countdown, "generate", generate)
        first.extend(load("train", config))
        return generate(*args, **kwargs)

    monkeypatch.setattr(countdown, "generate", generate_late)
    assert load("train", config) == first and len(first) == 30


@pytest.mark.parametrize("damage", ["missing", "truncated", "overwritten", "no info"])
def test_damaged_files(tmp_path, damage):
    config = data_config(tmp_path, train_examples=30, test_examples=10)
    rows = load("train", config)
    [records] = tmp_path.rglob("*train.array_record*")
    if damage == "missing":
        records.unlink()
    elif damage == "truncated":
        os.truncate(records, records.stat().st_size // 2)
    elif damage == "overwritten":
        records.write_bytes(b"\xa5" * records.stat().st_size)
    else:
        records.with_name("dataset_info.json").write_text("{")
    with pytest.raises(TaskError, match="delete the folder") as error:
        load("train", config)
    folder = Path(re.search(r"the data set in (\S+)", one_line(error))[1])
    assert folder in records.parents and folder != tmp_path
    shutil.rmtree(folder)  # as the message says
    assert load("train", config) == rows


# ---- the cloud's prompt


def test_solve_prompt_answers_every_cloud_prompt():
    task = make_task(tiny_config())
    stream = take(100, generate("test", 8, tiny_config().task))
    examples = [Example("", "", problem) for *problem, _ in stream]
    examples.append(Example("", "", ((3, 3, 8, 8), 24)))
    for example in examples:
        prompt = task.cloud_prompt(example)
        answer = task.solve_prompt(prompt)
        (verdict,) = task.verify([example], [answer])
        assert verdict.correct and not verdict.called
        assert task.solve_prompt([{"role": "system", "content": "Be brief."}, *prompt]) == answer
        # an error of the simulated cloud is one for every example
        assert not task.verify([example], [SimulatedCloud.wrong])[0].correct
    assert len({task.cloud_prompt(example)[-1]["content"] for example in examples}) == len(examples)


def test_cloud_prompt_tells_what_is_needed():
    [message] = make_task(tiny_config()).cloud_prompt(Example("", "", ((12, 7, 30), 51)))
    assert message["role"] == "user"
    assert all(part in message["content"] for part in ("12 7 30", "51", "<answer>"))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_difficulty_is_the_mean_rank_of_the_stratum(share):
    task = make_task(tiny_config(share_of_three=share))
    ranks = {3: share / 2, 4: share + (1 - share) / 2}  # the easy ones, and what lies above them
    assert ranks[3] * share + ranks[4] * (1 - share) == pytest.approx(0.5)
    for numbers, target in (((1, 2, 3), 6), ((1, 2, 3, 4), 10)):
        prompt = task.cloud_prompt(Example("", "", (numbers, target)))
        assert task.difficulty(prompt) == pytest.approx(ranks[len(numbers)])
    with pytest.raises(TaskError, match="not a Countdown prompt"):
        task.difficulty([{"role": "user", "content": "What is the capital of France?"}])


def test_the_simulated_cloud_errs_more_often_with_four_numbers():
    config = tiny_config(share_of_three=0.3)
    config.cloud.update(error_rate=0.3, error_skew=3.0)
    task, stream = make_task(config), take(900, generate("test", 8, config.task))
    cloud = simulated.from_config(config.cloud, task)
    for count, rank in ((3, 0.15), (4, 0.65)):
        problems = [problem for *problem, _ in stream if len(problem[0]) == count]
        replies = cloud.answer([task.cloud_prompt(Example("", "", p)) for p in problems])
        wrong = sum(reply.text == cloud.wrong for reply in replies)
        assert within(wrong, len(problems), simulated.skewed_rate(0.3, 3.0, rank))


def test_foreign_prompts():
    task = make_task(tiny_config())
    example = Example("", "", ((1, 2, 3), 6))
    [cloud], [device] = task.cloud_prompt(example), task.prompt(example)
    text = cloud["content"]
    foreign = [
        "",
        device["content"].replace("=", "->"),
        "What is the capital of France?",
        "Please: " + text,
        text.replace("numbers", "digits"),
        text.replace("1 2 3", ""),
        text.replace("1 2 3", "1, 2 and 3"),
        text.replace("1 2 3", "١ ٢ ٣"),
        text.replace("1 2 3", "-1 2 3"),
        text.replace("equals 6", "equals x"),
        text.replace("equals 6", "equals -6"),
        text.replace("equals 6", "equals 6.5"),
        text.partition(" equals")[0],
        "Using the numbers " + "1 " * 100_000,
        "7 11 13 17 19 23=999983",  # would take half a minute
    ]
    for content in foreign:
        with pytest.raises(TaskError):
            task.solve_prompt([{"role": "user", "content": content}])
    # A server passes on what the device was asked.
    assert task.solve_prompt([device]) == task.solve_prompt([cloud])
    with pytest.raises(TaskError):  # the last message is the one to answer
        task.solve_prompt([cloud, {"role": "user", "content": "Thanks!"}])


def test_prompt_without_a_solution():
    task = make_task(tiny_config())
    prompt = task.cloud_prompt(Example("", "", ((1, 1, 2), 50)))
    with pytest.raises(TaskError, match="no expression"):
        task.solve_prompt(prompt)
    cloud = SimulatedCloud("sim", task.solve_prompt, 0.0, 1, 1, 1)
    assert cloud.answer([prompt])[0].text == SimulatedCloud.wrong


def test_prices_that_nobody_pays_are_not_kept_for_ever():
    cloud = SimulatedCloud("sim", lambda _: "x", 0.0, 1, 1, 1, batch=8)
    for n in range(50):
        assert cloud.highest_usd([{"role": "user", "content": f"{n}"}]) > 0
    assert len(cloud._priced) <= 8


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("I try 5+4=9 no\n(3+5)*4", True),
        ("The answer: (3+5)*4 = 32", True),
        ("(3+5)*4\nThat is it.", True),
        ("(3+5)*4\n32", True),
        ("(3+5)*4\n(32)", True),
        ("3+5+4", False),
        ("3 5 4", False),
        ("", False),
    ],
)
def test_the_last_expression_counts_without_tags(response, right):
    task = make_task(tiny_config())
    example = Example("a", "3 numbers", ((3, 5, 4), 32))
    assert not task.verify([example], [response])[0].correct
    (found,) = base.lenient_verdicts(task, [example], [response], [False], [True])
    assert bool(found and found.correct) == right
