"""The server with the embedded model: what evaluation wrote, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from serving import KEY, Server

from collab_jax.bench.serve import run_serve_bench
from collab_jax.rl import evaluation, experiment
from collab_jax.runtime import files, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.serve.__main__ import KEY_ENV, main, make_service
from collab_jax.tasks.base import answer_of
from collab_jax.tasks.expressions import is_solution

SERVING = {"serve__slots": 4, "serve__prefill_chunk": 16, "cloud__error_rate": 0.0}


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    service = make_service(small(**SERVING), tmp_path_factory.mktemp("serve"))
    assert service.engine.ready.wait(1200)
    with Server(service) as server:
        yield server


@pytest.fixture(scope="module")
def table(small, tmp_path_factory):
    """Evaluation's records of the same model: greedy, with the marker disallowed."""
    run = experiment.prepare(small(**SERVING), tmp_path_factory.mktemp("run"))
    params = parallel.replicate(experiment.load_state(run)).final_model
    examples = experiment.examples(run, "test")[:16]
    sampler = evaluation.greedy_sampler(run)
    return evaluation.evaluate(
        run, sampler, params, examples, "test", natural=False, ask_cloud=False
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"serve__slots": 0}, "must be at least 1"),
        ({"text__decide_after_answer": True}, "once the answer has opened is final"),
    ],
)
def test_settings_that_no_server_can_have_are_refused(small, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        make_service(small(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_slow_type_of_products_is_named_at_the_start(small, tmp_path, capsys):
    for dtype, said in (("float32", False), ("bfloat16", True)):
        service = make_service(small(model__dtype=dtype, **SERVING), tmp_path / dtype)
        service.engine.close()
        assert ("--config.model.dtype=float32 answers faster" in capsys.readouterr().out) == said


@pytest.mark.slow
def test_the_device_says_what_evaluation_recorded(server, table):
    assert table["formatted"].sum() > 4
    for i, prompt in enumerate(table["prompt"]):
        reply = server.chat(str(prompt), model="collab-device")[2]
        if table["formatted"][i]:
            assert reply["choices"][0]["message"]["content"] == answer_of(table["text"][i])
        assert reply["usage"]["completion_tokens"] == table["tokens"][i]
        assert reply["collab"]["margin"] == pytest.approx(table["margin"][i], abs=1e-3)


@pytest.mark.slow
def test_it_calls_where_the_recorded_margin_crosses(server, table):
    """A threshold at the median: half of the prompts go to the cloud, which solves them."""
    threshold, answered_by = float(np.median(table["margin"])), []
    for i, prompt in enumerate(table["prompt"]):
        reply = server.chat(str(prompt), collab={"threshold": threshold})[2]
        called = table["margin"][i] > threshold or not table["formatted"][i]
        answered_by.append(reply["collab"]["answered_by"])
        assert answered_by[-1] == ("cloud" if called else "device")
        if called:
            numbers, target = re.fullmatch(r"([0-9 ]+)=([0-9]+)\s*", str(prompt)).groups()
            content = reply["choices"][0]["message"]["content"]
            assert is_solution(tuple(map(int, numbers.split())), int(target), content)
            assert reply["model"] == "simulated-r1" and reply["collab"]["cloud_tokens"] > 0
    assert set(answered_by) == {"cloud", "device"}


@pytest.mark.slow
def test_an_overload_is_refused_and_everybody_hears(server):
    """Four slots and a queue of two, for 40 clients: answers, or a 429 that says when."""
    engine = server.service.engine
    before, engine.limits = engine.limits, engine.limits._replace(requests=2)
    try:
        with ThreadPoolExecutor(40) as pool:
            ask = lambda _: server.chat("49 9 37=95", model="collab-device")  # noqa: E731
            replies = list(pool.map(ask, range(80)))
    finally:
        engine.limits = before
    statuses = [status for status, _, _ in replies]
    assert set(statuses) == {200, 429}
    for status, headers, _ in replies:
        assert status == 200 or int(headers["retry-after-ms"]) > 0
    assert engine.busy == (0, 0)


@pytest.mark.slow
def test_32_clients_at_once_get_what_one_gets(server, table):
    """And the four slots are free afterwards."""
    prompts = [str(prompt) for prompt in table["prompt"]] * 4
    ask = lambda prompt: server.chat(prompt, model="collab-device")[2]["choices"][0]  # noqa: E731
    alone = [ask(prompt) for prompt in prompts[:16]]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, prompts)) == alone * 4
    assert server.service.engine.busy == (0, 0)


@pytest.mark.slow
def test_a_new_budget_and_new_settings_compile_nothing(server):
    prompt = "49 9 37=95"
    server.chat(prompt)
    sizes = lambda: [p._cache_size() for p in server.service.engine._programs.step.values()]  # noqa: E731
    before = sizes()
    assert server.json("PUT", "/budget", {"target_call_rate": 0.9}, key=KEY)[0] == 200
    server.chat(prompt, temperature=1.5, top_p=0.5, seed=3, logit_bias={"5": 2})
    server.chat(prompt, collab={"threshold": 3})
    assert sizes() == before and set(before) == {1}


@pytest.mark.slow
@pytest.mark.long
def test_the_fuzz_as_a_command(capsys):
    assert run_serve_bench(["--only", "fuzz", "--requests", "60"]) == 0
    assert re.search(r"60 requests .* 20 cut; \d+ answers bought", capsys.readouterr().out)


def test_every_setting_of_a_server_is_read(small):
    """By name in the one place that reads them; training reads none (test_train.py)."""
    source = (ROOT / "collab_jax" / "serve" / "__main__.py").read_text()
    read = set(re.findall(r"\b(?:s|config\.serve)\.(\w+)", source))
    assert set(small().serve) <= read


def test_a_second_server_in_a_workdir_is_refused_before_it_computes(small, tmp_path):
    with files.held(tmp_path), pytest.raises(UserError, match="another process is at work in"):
        main(small(**SERVING), tmp_path, "127.0.0.1", 0)
    assert [path.name for path in tmp_path.iterdir()] == [files.LOCK]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "elsewhere"], "needs --config"),
        (["--redact", "--redact_names", "nowhere.txt"], "must be a text file"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path, arguments, says):
    command = [sys.executable, "-m", "collab_jax.serve", "--port", "0", "--workdir", str(tmp_path)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
