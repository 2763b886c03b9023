"""The server with the embedded model: what evaluation wrote, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from serving import KEY, Server

from collab_jax import records
from collab_jax.serve.__main__ import KEY_ENV, make_service
from collab_jax.tasks import make_task

SERVING = {"serve__slots": 4, "serve__prefill_chunk": 16, "cloud__error_rate": 0.0}


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    service = make_service(small(**SERVING), tmp_path_factory.mktemp("serve"))
    assert service.engine.ready.wait(1200)
    with Server(service) as server:
        yield server


@pytest.fixture(scope="module")
def examples(small):
    """(task, its first test prompts as examples)."""
    task = make_task(small())
    return task, task.load("test")[:12]


@pytest.fixture(scope="module")
def table():
    """What evaluation recorded of the embedded model on the test prompts, the marker disallowed."""
    file = ROOT / "docs" / "results" / "paper_table" / "ours" / "seed-0" / "before.parquet"
    return records.read(file)


def question(task, example):
    return task.prompt(example)[-1]["content"]


def test_the_device_says_what_evaluation_recorded(server, table, examples):
    task, first = examples
    for i, example in enumerate(first):
        assert table["id"][i] == example.id
        reply = server.chat(question(task, example), model="collab-device")[2]
        content = reply["choices"][0]["message"]["content"]
        [verdict] = task.verify([example], [f"<answer>{content}</answer>"])
        assert verdict.correct == table["local_correct"][i]
        assert reply["usage"]["completion_tokens"] == table["tokens"][i]
        assert reply["collab"]["margin"] == pytest.approx(table["margin"][i], abs=1e-3)


def test_it_calls_where_the_recorded_margin_crosses(server, table, examples):
    """A threshold at the median: half of the prompts go to the cloud, which is right."""
    task, first = examples
    middle = float(np.median(table["margin"][:12]))
    for i, example in enumerate(first):
        reply = server.chat(question(task, example), collab={"threshold": middle})[2]
        called = table["margin"][i] > middle or not table["ended"][i]
        assert reply["collab"]["answered_by"] == ("cloud" if called else "device")
        if called:
            content = reply["choices"][0]["message"]["content"]
            [verdict] = task.verify([example], [f"<answer>{content}</answer>"])
            assert reply["model"] == "simulated-r1" and verdict.correct


def test_a_new_budget_and_new_settings_compile_nothing(server):
    prompt = "49 9 37=95"
    server.chat(prompt)
    sizes = lambda: [p._cache_size() for p in server.service.engine._programs.step.values()]  # noqa: E731
    before = sizes()
    assert server.json("PUT", "/budget", {"target_call_rate": 0.9}, key=KEY)[0] == 200
    server.chat(prompt, temperature=1.5, top_p=0.5, seed=3, logit_bias={"5": 2})
    server.chat(prompt, collab={"threshold": 3})
    assert sizes() == before and set(before) == {1}


def test_every_setting_of_a_server_is_read(small):
    """By name in the one place that reads them; training reads none (test_train.py)."""
    source = (ROOT / "collab_jax" / "serve" / "__main__.py").read_text()
    read = set(re.findall(r"\b(?:s|config\.serve)\.(\w+)", source))
    assert set(small().serve) <= read


@pytest.mark.slow
def test_the_command_serves_drains_and_remembers(tmp_path):
    command = [sys.executable, "-m", "collab_jax.serve", "--port", "0", "--workdir", str(tmp_path)]
    command += ["--config.serve.slots=1", "--config.serve.prefill_chunk=16"]
    environment = {**os.environ, KEY_ENV: KEY, "JAX_PLATFORMS": "cpu"}
    for target in (None, 0.25):  # the second start knows what the first was told
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(m[0] for line in lines if (m := re.search(r"http://\S+", line)))

        def call(method, path, body=None, url=url):
            request = urllib.request.Request(
                url + path, body and json.dumps(body).encode(), method=method
            )
            request.add_header("Authorization", f"Bearer {KEY}")
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())

        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                if call("GET", "/ready")["status"] == "ready":
                    break
            except OSError:
                time.sleep(0.2)
        budget = call("GET", "/budget")
        assert target is None or budget["target_call_rate"] == target
        call("PUT", "/budget", {"target_call_rate": 0.25})
        message = {"role": "user", "content": "49 9 37=95"}
        assert call("POST", "/v1/chat/completions", {"messages": [message]})["model"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert json.loads((tmp_path / "budget.json").read_text())["queries"] >= 1


def test_what_cannot_be_served_is_one_line(tmp_path):
    command = [sys.executable, "-m", "collab_jax.serve", "--workdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model", "elsewhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "needs --config" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
