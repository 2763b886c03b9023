"""The command lines as a user runs them: killed, stopped, resumed, on other devices, misused."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL
from fakes import comparable_metrics, saved_state, svamp_row, write_rows

from collab_jax.models import hf
from collab_jax.runtime import metrics
from collab_jax.runtime.checkpoint import Checkpoints


def command(module, workdir, data_dir, *more, config="configs/countdown_tiny.py", **overrides):
    settings = SMALL | {"task.data_dir": data_dir, "train.steps": 6} | overrides
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [
        sys.executable,
        "-m",
        f"collab_jax.{module}",
        "--config",
        config,
        "--workdir",
        str(workdir),
        *flags,
        *more,
    ]


def run(*args, **kwargs):
    return subprocess.run(args[0], cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


def wait_for_rows(process, workdir, count):
    """Returns once metrics.jsonl has `count` rows."""
    deadline = time.monotonic() + 200
    while len(metrics.read(workdir / "metrics.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def kill_after(count, start, folder):
    """Runs the command `start`, and kills it once metrics.jsonl in `folder` has `count` rows."""
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_rows(process, folder, count)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    done = run(command("train", workdir, data_dir))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_killed_stopped_and_resumed_equals_straight_bit_for_bit(straight, data_dir, tmp_path):
    start = command("train", tmp_path, data_dir)
    kill_after(3, start, tmp_path)
    written = len(metrics.read(tmp_path / "metrics.jsonl"))

    second = subprocess.Popen(
        start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_rows(second, tmp_path, written + 1)  # one more than the first wrote: it is training
    second.send_signal(signal.SIGTERM)  # a quick machine may have finished by now: all the same
    _, err = second.communicate(timeout=120)
    assert second.returncode in (0, 75), err

    assert run(start).returncode == 0
    jax.tree.map(np.testing.assert_array_equal, saved_state(tmp_path, 6), saved_state(straight, 6))
    assert comparable_metrics(tmp_path) == comparable_metrics(straight)
    a, b = (json.loads((w / "report.json").read_text()) for w in (tmp_path, straight))
    assert (
        a["after"] == b["after"]
        and a["cloud_calls"] == b["cloud_calls"]
        and a["filter"] == b["filter"]
    )


SMOLLM2 = {
    "prompt_length": 48,
    "max_new_tokens": 32,
    "prompts_per_step": 2,
    "algorithm.filter": "none",  # each step has a gradient, unless all rewards are alike
    "algorithm.advantage": "gapg",  # by all that an adapter has
    "decode.slot_counts": 1,  # fewer programs to compile
    "eval.prompts": 0,
    "sft.steps": 12,
    "sft.batch_size": 2,
    "sft.checkpoint_every": 4,
    "sft.learning_rate": 5e-3,
    "sft.warmup_steps": 1,
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("smollm2_file")
def test_a_killed_warm_start_and_training_of_smollm2_end_with_the_same_adapter(tmp_path):
    """Two programs of the tuning and two of the training are compiled, once each."""
    write_rows(tmp_path / "svamp_train.jsonl", [svamp_row(i, 1 + i % 2) for i in range(60)])
    test_row = {"id": "c0", "problem": "Twice four?", "answer": "8", "equation": "( 2 * 4 )"}
    write_rows(tmp_path / "svamp_test.jsonl", [test_row])
    straight, other = tmp_path / "straight", tmp_path / "other"

    def smollm2(module, workdir, *flags):
        config = "configs/svamp_smollm2.py"
        return command(module, workdir, tmp_path, *flags, config=config, **SMOLLM2)

    done = run(smollm2("sft", straight / "start"))
    assert done.returncode == 0, done.stderr
    tunings = [place / "start" / "warm_start" / "tuning" for place in (straight, other)]
    kill_after(5, smollm2("sft", other / "start"), tunings[1])
    assert 4 <= Checkpoints(tunings[1] / "checkpoints").latest() < 12
    assert run(smollm2("sft", other / "start")).returncode == 0
    assert comparable_metrics(tunings[0]) == comparable_metrics(tunings[1])
    adapters = [place / "start" / "adapter_model.safetensors" for place in (straight, other)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    begin = f"--config.lora.start={straight / 'start'}"
    done = run(smollm2("train", straight / "run", begin))
    assert done.returncode == 0, done.stderr
    kill_after(3, smollm2("train", other / "run", begin), other / "run")
    assert 2 <= Checkpoints(other / "run" / "checkpoints").latest() < 6
    assert run(smollm2("train", other / "run", begin)).returncode == 0
    runs = straight / "run", other / "run"
    jax.tree.map(np.testing.assert_array_equal, *(saved_state(place, 6) for place in runs))
    rows = comparable_metrics(runs[0])
    assert rows == comparable_metrics(runs[1]) and any(row["grad_norm"] > 0 for row in rows[2:])


@pytest.mark.slow
@pytest.mark.long
def test_sigterm_ends_a_run_after_the_step_with_its_state_saved(data_dir, tmp_path):
    sizes = {"train.steps": 500, "train.checkpoint_every": 500, "eval.prompts": 0}
    process = subprocess.Popen(
        command("train", tmp_path, data_dir, **sizes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    steps = len(metrics.read(tmp_path / "metrics.jsonl"))
    assert f"the same command goes on from step {steps}\n" in out and 2 <= steps < 500
    assert saved_state(tmp_path, steps)["step"] == steps


@pytest.mark.slow
@pytest.mark.long
def test_one_device_equals_two(straight, data_dir, tmp_path):
    done = run(command("train", tmp_path, data_dir, **{"cpu_devices": 1, "eval.prompts": 0}))
    assert done.returncode == 0, done.stderr
    one, two = comparable_metrics(tmp_path)[0], comparable_metrics(straight)[0]
    exact = (
        "tokens",
        "d1",
        "d2",
        "kept",
        "dropped",
        "no_signal",
        "cut_off",
        "cloud_asked",
        "local_accuracy",
        "call_rate",
    )
    assert {k: one[k] for k in exact} == {k: two[k] for k in exact}
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4) and one[
        "reward"
    ] == pytest.approx(two["reward"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        saved_state(tmp_path, 6)["params"],
        saved_state(straight, 6)["params"],
    )


@pytest.mark.slow
def test_evaluating_a_finished_run_gives_the_reports_figures(straight, data_dir):
    done = run(command("evaluate", straight, data_dir))
    assert done.returncode == 0, done.stderr
    report = json.loads((straight / "report.json").read_text())
    assert (
        json.loads((straight / "validation.json").read_text())["at_budget"]
        == report["after"]["at_budget"]
    )


@pytest.mark.slow
def test_what_is_exported_is_what_was_trained(straight, data_dir, tmp_path):
    done = run(command("export", straight, data_dir, "--out", str(tmp_path / "model")))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "model"
    params = hf.load(folder, hf.config_from_hf(hf.read_config(folder)), "float32")
    jax.tree.map(np.testing.assert_array_equal, params, saved_state(straight, 6)["params"])
    assert (folder / "tokenizer.json").exists() and (folder / "chat_template.jinja").exists()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: countdown-tiny\n") and "`<unknown>` (id " in card
    assert (
        "| accuracy on the device (marker disallowed) |" in card
        and "24 held-out prompts of countdown" in card
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.no_such_key=1"], "no_such_key"),
        (["--config.budget=1.5"], "must lie in [0, 1)"),
        pytest.param(["--config.budget=much"], "budget", marks=pytest.mark.long),
        pytest.param(["stray"], "unexpected argument 'stray'", marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_misuse_is_one_line_and_a_status(tmp_path, data_dir, arguments, says):
    done = run(command("train", tmp_path / "run", data_dir, *arguments))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [([], "--config"), (["--config", "configs/nope.py", "--workdir", "unused"], "configs/nope.py")],
)
@pytest.mark.slow
def test_missing_flags_and_files_are_named(flags, says):
    done = subprocess.run(
        [sys.executable, "-m", "collab_jax.train", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ},
        timeout=100,
    )
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
