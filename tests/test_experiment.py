"""A run's workdir: what config.json says of its settings and its data, and what it refuses."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from collab_jax import train
from collab_jax.rl import claims, experiment
from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError


@pytest.fixture
def rows(tmp_path):
    """rows(split, changes) writes a split of four problems to the data folder."""

    def write(split, changes=None):
        lines = [
            {"id": f"q{i}", "problem": f"{i}+{i}", "answer": str(2 * i)}
            | (changes or {}).get(i, {})
            for i in range(4)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{split}.jsonl").write_text(text)

    write("train")
    write("test")
    return write


@pytest.fixture
def config(small, tmp_path):
    def make(**overrides):
        settings = {
            "task__name": "jsonl",
            "task__data_dir": str(tmp_path),
            "task__prompt": "{problem}",
            "prompt_length": 64,
        }
        return small(**settings | overrides)

    return make


def data_of(workdir):
    return json.loads((workdir / "config.json").read_text())[claims.DATA]


def test_data_that_changed_between_two_starts_are_refused_by_name(config, rows, tmp_path):
    workdir = tmp_path / "run"
    run = experiment.prepare(config(), workdir)
    assert len(experiment.examples(run, "train")) == 4
    assert data_of(workdir)["train"]["jsonl"]["examples"] == 4 and "test" not in data_of(workdir)
    saved = (workdir / "config.json").read_bytes()
    run = experiment.prepare(config(), workdir)  # the settings are still the same
    experiment.examples(run, "train")
    assert (workdir / "config.json").read_bytes() == saved

    for changes in ({2: {"answer": "5"}}, {2: {"problem": "9+9"}}, {2: {"id": "z"}}):
        rows("train", changes)
        run = experiment.prepare(config(), workdir)
        says = r"data \(train\) have changed.* 4 examples, SHA-256 .* then, 4 examples"
        with pytest.raises(UserError, match=says):
            experiment.examples(run, "train")
        experiment.examples(run, "test")  # which is as it was
    (tmp_path / "train.jsonl").write_text('{"id": "a", "problem": "1", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"jsonl: 4 examples, .* then, 1 examples, .* now"):
        experiment.examples(experiment.prepare(config(), workdir), "train")
    rows("train")
    experiment.examples(experiment.prepare(config(), workdir), "train")


def test_a_run_begun_without_a_fingerprint_goes_on_and_gets_one(config, rows, tmp_path):
    workdir = tmp_path / "run"
    experiment.prepare(config(), workdir)
    old = json.loads((workdir / "config.json").read_text())
    del old["eval"]["max_unknown"]  # nor did this key exist then
    (workdir / "config.json").write_text(json.dumps(old))
    experiment.examples(experiment.prepare(config(), workdir), "train")
    assert data_of(workdir)["train"]["jsonl"]["examples"] == 4


def test_a_mix_has_a_fingerprint_for_each_task(small, tmp_path):
    problem = {"id": "x", "problem": "1+1", "answer": "2", "level": 1}
    for name in ("math_train", "gsm8k_train"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(problem) + "\n")
    settings = {
        "task__name": "mix",
        "task__mix": (("math", 1), ("gsm8k", 1)),
        "task__data_dir": str(tmp_path),
        "task__prompt": "{problem}",
        "prompt_length": 64,
    }
    run = experiment.prepare(small(**settings), tmp_path / "run")
    experiment.examples(run, "train")
    assert sorted(data_of(tmp_path / "run")["train"]) == ["gsm8k", "math"]
    changed = problem | {"answer": "3"}
    (tmp_path / "gsm8k_train.jsonl").write_text(json.dumps(changed) + "\n")
    with pytest.raises(UserError, match="gsm8k: 1 examples") as caught:
        experiment.examples(experiment.prepare(small(**settings), tmp_path / "run"), "train")
    assert "math:" not in str(caught.value)


def test_a_reward_file_that_changed_is_refused(config, rows, tmp_path):
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text("def right(example, response):\n    return True\n")
    reward = {"task__reward": f"{file}:right"}
    experiment.prepare(config(**reward), workdir)
    experiment.prepare(config(**reward), workdir)
    file.write_text("def right(example, response):\n    return False\n")
    with pytest.raises(UserError, match=r"data \(reward\) have changed .*mine.py: 2 lines"):
        experiment.prepare(config(**reward), workdir)


def test_fingerprints_do_not_count_as_settings(config, rows, tmp_path):
    workdir = tmp_path / "run"
    experiment.examples(experiment.prepare(config(), workdir), "test")
    file = workdir / "config.json"
    assert claims.differences(file, config()) == ""
    assert claims.differences(file, config(), all_keys=False) == ""
    assert claims.differences(file, config(group=8)) == "group=4 then, 8 now"


def test_a_run_goes_on_whatever_a_warm_start_or_a_server_would_do(config, rows, tmp_path):
    file = tmp_path / "run" / "config.json"
    experiment.prepare(config(), tmp_path / "run")
    other = config(sft__steps=7, task__demo_length=40, task__demo_guess=0.5, serve__slots=2)
    assert claims.differences(file, other) == ""
    assert "task.demo_length=96 then, 40 now" in claims.differences(file, other, unread=())


def test_special_tokens_left_to_be_found_are_kept(config, rows, tmp_path):
    workdir, file = tmp_path / "run", tmp_path / "run" / "config.json"
    given = config()
    run = experiment.prepare(given, workdir)
    names = {"eos": ("<eos>",), "pad": "<pad>", "decision_token": "<unknown>"}
    assert {key: run.config.text[key] for key in names} == names
    saved = json.loads(file.read_text())
    assert {**saved["text"], "eos": tuple(saved["text"]["eos"])} == run.config.text.to_dict()
    assert given.text.pad == "auto"
    experiment.prepare(config(**{f"text__{key}": value for key, value in names.items()}), workdir)
    assert claims.differences(file, config()) == ""

    # What the run has counts, not what would be found now; what is named must be the same.
    saved["text"]["pad"] = "<unk>"
    file.write_text(json.dumps(saved))
    run = experiment.prepare(config(), workdir)
    assert run.config.text.pad == "<unk>" and run.text.pad_id == 2
    with pytest.raises(UserError, match="text.pad='<unk>' then, '<pad>' now"):
        experiment.prepare(config(text__pad="<pad>"), workdir)


def test_a_run_begun_before_there_was_a_system_prompt_goes_on(config, rows, tmp_path):
    workdir, file = tmp_path / "run", tmp_path / "run" / "config.json"
    experiment.prepare(config(), workdir)
    saved = json.loads(file.read_text())
    del saved["task"]["system"]
    file.write_text(json.dumps(saved))
    assert experiment.prepare(config(), workdir).config.task.system == ""
    with pytest.raises(UserError, match="task.system='' then, 'Be brief.' now"):
        experiment.prepare(config(task__system="Be brief."), workdir)


def test_a_workdir_where_another_process_is_at_work_is_refused_until_that_ends(small, tmp_path):
    holds = "import fcntl, sys; file = open(sys.argv[1], 'a')"
    holds += "; fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path / files.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(UserError, match=f"another process is at work in {tmp_path}"):
            train.main(small(), tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()
        other.kill()
    for _ in range(2):  # its hold has ended with it, and ours ends with the block
        with files.held(tmp_path):
            pass


def test_the_settings_that_may_differ_exist(config):
    for name in claims.MAY_DIFFER_ON_RESUME:
        section, _, key = name.rpartition(".")
        assert key in (config()[section] if section else config()), name


def test_common_names_the_limit_of_unknown_verdicts():
    assert "config.eval.max_unknown = " in (ROOT / "configs" / "common.py").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task__judge": "x"}, "task.judge works on one host"),
        ({"prompts_per_step": 2}, "multiple of the 4 devices"),
    ],
)
def test_what_several_hosts_cannot_do_is_refused(config, tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.device_count", lambda: 4)
    with pytest.raises(UserError, match=says):
        experiment.prepare(config(**changes), tmp_path)
