"""Several hosts: what they tell each other; two equal one to the bit, and a killed job goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL
from fakes import comparable_metrics, saved_state

from collab_jax import records
from collab_jax.cloud import far, protocol
from collab_jax.rl import shares
from collab_jax.rl.batch import make_batch
from collab_jax.runtime import hosts, metrics
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example

# ---- one host, and hosts that are made up


def test_one_host_says_everything_to_itself():
    said = {"a": (1, 2)}
    assert hosts.gathered("x", said) == [said] and hosts.gathered("x", said)[0] is said
    assert hosts.count() == 1 and hosts.is_first()
    hosts.check_same("x", said)
    with hosts.first_alone("x"):
        done = True
    assert done
    with pytest.raises(UserError, match="as it was"), hosts.first_alone("x"):
        raise UserError("as it was")


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is host 1; heard(values) sets what host 0 says, one value a call."""
    to_hear = []
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "index", lambda: 1)
    monkeypatch.setattr(
        hosts,
        "gathered",
        lambda what, said, seconds=0: [to_hear.pop(0), json.loads(json.dumps(said))],
    )
    return to_hear.extend


def test_an_error_of_host_0_is_one_here_and_the_body_does_not_run(second_of_two):
    second_of_two(["the disk is full"])
    ran = []
    with (
        pytest.raises(UserError, match="host 0: the disk is full"),
        hosts.first_alone("x"),
    ):
        ran.append(1)
    assert not ran


def test_an_error_here_is_told(second_of_two):
    second_of_two([None, None])
    with pytest.raises(UserError, match="mine"), hosts.first_alone("x"):
        raise UserError("mine")


def test_other_settings_are_named(second_of_two):
    second_of_two([{"seed": 1, "group": 4}])
    with pytest.raises(UserError, match="host 1 has seed=2, host 0 has 1"):
        hosts.check_same("its settings", {"group": 4, "seed": 2})


def test_each_host_has_the_prompts_after_those_of_the_one_before(second_of_two):
    examples = [Example(name, "", None) for name in "abcdad"]
    batch = make_batch(examples, np.arange(12).reshape(6, 2), np.ones((6, 2), bool))
    own = shares.own(batch)
    # The response to a prompt that another host has as well is not taken for that one's.
    assert [example.id for example in own.examples] == list("dad") and own.earlier == [0, 1, 1]
    assert own.prompts.tolist() == [[6, 7], [8, 9], [10, 11]] and own.mask.shape == (3, 2)


def test_answers_come_back_to_whoever_asked_and_only_the_first_host_buys(second_of_two):
    cloud = far.FarCloud()
    questions = [[{"role": "user", "content": text}] for text in "ab"]
    first, second = cloud.submit(questions, ["a", "b"]), cloud.submit(questions[:1])
    reply = protocol.Reply("yes", 1, 2, 0.5, 0.25)
    assert not first.done()

    class Bought:
        def __init__(self, prompts):
            self.prompts = prompts

        def answers(self, wait):
            assert 0 <= wait <= 5
            known = {"a": reply}
            return far.Answers([known.get(m[0]["content"]) for m in self.prompts], 1, 0)

    class Shop:
        def submit(self, prompts, names):
            return Bought(prompts)

    asked = [[], [[questions, ["a", "b"]], [questions[:1], None]]]  # as `settle` hears it
    replies = json.loads(json.dumps(far._bought(Shop(), asked, 5.0)))
    second_of_two([[], replies])
    far.settle(cloud, 5.0)
    assert first.answers().replies == [reply, None] and second.answers().replies == [reply]
    assert cloud.take_asked() == [] and cloud.take_tally().bought == 0


# ---- jobs

STEPS = 8


def command(workdir, data_dir, *more, **overrides):
    small = {"task.data_dir": data_dir, "train.steps": STEPS, "eval.prompts": 0}
    settings = SMALL | small | overrides
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = "--config=configs/countdown_tiny.py"
    return ["-m", "collab_jax.train", config, f"--workdir={workdir}", *flags, *more]


EVALUATED = {"eval.prompts": 20, "eval.batch_size": 8}
ENVIRONMENT = {**os.environ, "NPROC": "4", "PYTHON": sys.executable}


def job(number, devices, arguments):
    """Starts a job of so many hosts with so many devices each."""
    if number == 1:
        start = [sys.executable, *arguments, f"--config.cpu_devices={devices}"]
    else:
        start = ["launch/local_hosts.sh", str(number), str(devices), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        start, cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, process_group=0
    )


def ended(process, seconds=300):
    """Waits for a job; its status and what it wrote."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    status, said = ended(job(1, 4, command(workdir, data_dir, **EVALUATED)))
    assert status == 0, said
    return workdir


def assert_same_runs(a, b):
    jax.tree.map(np.testing.assert_array_equal, saved_state(a, STEPS), saved_state(b, STEPS))
    assert comparable_metrics(a) == comparable_metrics(b)


@pytest.mark.slow
def test_two_hosts_of_two_devices_equal_one_of_four_bit_for_bit(alone, data_dir, tmp_path):
    status, said = ended(job(2, 2, command(tmp_path / "two", data_dir, **EVALUATED)))
    assert status == 0, said
    assert "4 cpu devices of 2 hosts" in said
    assert_same_runs(alone, tmp_path / "two")
    for table in ("before.parquet", "after.parquet"):
        assert (alone / table).read_bytes() == (tmp_path / "two" / table).read_bytes()
    bought = [[row["cloud_bought"] for row in metrics.read(w / "metrics.jsonl")] for w in
              (alone, tmp_path / "two")]  # fmt: skip
    assert bought[0] == bought[1] and sum(bought[0]) > 0


@pytest.mark.slow
def test_two_hosts_evaluate_as_one_does(alone, data_dir, tmp_path):
    """Of the last batch the second host has none."""
    arguments = command(tmp_path, data_dir, **EVALUATED)
    arguments[1] = "collab_jax.evaluate"
    status, said = ended(job(2, 2, arguments))
    assert status == 0, said
    assert said.count("step 0, 20 validation prompts") == 1  # the first host alone tells
    assert (tmp_path / "validation.parquet").read_bytes() == (alone / "before.parquet").read_bytes()
    assert json.loads((tmp_path / "validation.json").read_text())["cloud_unknown"]["value"] == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_two_hosts_make_the_warm_start_of_one(data_dir, tmp_path, sharded):
    """With relabelling: two tunings, the samples of each, and the last one."""
    models = []
    for name, number, devices in (("one", 1, 4), ("two", 2, 2)):
        workdir = tmp_path / name
        sizes = {"sft.relabel_steps": 2, "sft.prompts": 12, "sft.check_prompts": 12}
        sizes["train.sharded"] = sharded
        arguments = command(workdir, data_dir, **sizes)
        arguments[1] = "collab_jax.sft"
        status, said = ended(job(number, devices, arguments))
        assert status == 0, said
        assert said.count(f"wrote {workdir}") == 1  # the first host alone tells
        figures = json.loads((workdir / "sft.json").read_text())
        samples = [file.read_text() for file in sorted(workdir.glob("warm_start/*/samples.jsonl"))]
        models.append(((workdir / "model.safetensors").read_bytes(), figures, samples))
    assert len(models[0][2]) == 2
    assert models[0] == models[1]


SWEEP = """
from collab_jax.rl.search import Search
from collab_jax.rl.sweeps import Cell, Sweep

def get_sweep():
    cells = {{"a": Cell({{}}, (0,)), "b": Cell({{"group": 8}}, (0,), like="a")}}
    search = Search("optim.learning_rate", (1e-5,))
    return Sweep("configs/countdown_tiny.py", {settings}, cells, search=search)
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_hosts_run_a_sweep(data_dir, tmp_path):
    """With a search; stopped in the second run after it, of which one host alone is told."""
    settings = SMALL | EVALUATED | {"task.data_dir": str(data_dir), "cpu_devices": 2}
    (tmp_path / "sweep.py").write_text(SWEEP.format(settings=settings))
    out, pipe = tmp_path / "out", subprocess.PIPE
    arguments = ["-m", "collab_jax.sweep", f"--config={tmp_path / 'sweep.py'}", f"--out={out}"]

    def started():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            at = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        return [
            subprocess.Popen(
                [sys.executable, *arguments, "--hosts=2", f"--host={host}", at],
                cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True,
            )
            for host in (0, 1)
        ]  # fmt: skip

    both, second = started(), out / "b" / "seed-0" / "metrics.jsonl"
    while not second.exists() and both[0].poll() is None:
        time.sleep(0.1)
    os.kill(both[1].pid, signal.SIGTERM)
    results = [ended(one) for one in both]
    assert [status for status, _ in results] == [75, 75], results
    results = [ended(one) for one in started()]
    assert [status for status, _ in results] == [0, 0], results
    assert (out / "report.md").exists() and results[1][1].count("seed-0") == 0
    assert len(metrics.read(second)) == SMALL["train.steps"]


def both(data_dir, tmp_path, settings):
    """The workdirs of a run of one process with four devices, and of two hosts with two each."""
    workdirs = []
    for name, number, devices in (("one", 1, 4), ("two", 2, 2)):
        workdirs.append(tmp_path / name)
        arguments = command(workdirs[-1], data_dir, **settings)
        status, said = ended(job(number, devices, arguments))
        assert status == 0, said
    assert_same_runs(*workdirs)
    return workdirs


@pytest.mark.slow
def test_two_hosts_divide_their_parameters_over_all_devices(alone, data_dir, tmp_path):
    """As one process does, to the bit."""
    _, two = both(data_dir, tmp_path, {"train.sharded": True})
    # Sums are taken in another order than by whole parameters, so samples may differ in time.
    rows = [metrics.read(workdir / "metrics.jsonl")[:2] for workdir in (two, alone)]
    for got, want in zip(*rows, strict=True):
        assert (got["kept"], got["tokens"]) == (want["kept"], want["tokens"])
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 2])
def test_hosts_that_have_parts_evaluate_and_go_on_as_one_that_has_all(data_dir, tmp_path, rank):
    """From a checkpoint of the other."""
    settings = EVALUATED | {"train.sharded": True, "lora.rank": rank}
    settings["routers.record"] = "('token_margin',)"
    one, two = both(data_dir, tmp_path, settings)
    assert (one / "before.parquet").read_bytes() == (two / "before.parquet").read_bytes()
    after = [records.read(workdir / "after.parquet") for workdir in (one, two)]
    # A router runs on the first host alone, which has fewer devices there.
    np.testing.assert_allclose(*(table.pop("score_token_margin") for table in after), atol=1e-5)
    np.testing.assert_equal(*({key: list(x) for key, x in table.items()} for table in after))
    shutil.rmtree(one / "checkpoints" / str(STEPS))
    (one / "after.parquet").unlink()
    status, said = ended(job(2, 2, command(one, data_dir, **settings)))
    assert status == 0, said
    assert_same_runs(one, two)


ENDS = """
import sys, time
from collab_jax.runtime import hosts
from collab_jax.runtime.errors import UserError

hosts.LEAVE_SECONDS = 2  # after which jax ends a host that works on while another one has left
hosts.join(2, int(sys.argv[1]), sys.argv[2])
start = time.monotonic()
try:
    with hosts.failure_told():
        assert len(hosts.gathered("its number", hosts.index())) == 2
        if hosts.index() == int(sys.argv[3]):
            if sys.argv[4] == "stops":
                sys.exit(75)
            raise ValueError("no more\\nmemory")
        time.sleep(8)
        hosts.gathered("what comes next", None)
except UserError as error:
    assert time.monotonic() - start < 60
    sys.exit(f"heard: {error}")
"""


def two_of_which_one_ends(ending, how):
    """The status of the host that ends, what it says, and the same of the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS, str(host), address, str(ending), how],
            cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True,
        )
        for host in (0, 1)
    ]  # fmt: skip
    return [*ended(both[ending], 120), *ended(both[1 - ending], 120)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_host_that_fails_tells_those_that_wait_for_it(failing):
    status, said, other_status, other_said = two_of_which_one_ends(failing, "fails")
    assert status == other_status == 1, said + other_said
    assert "ValueError: no more" in said
    assert f"heard: host {failing} failed: ValueError('no more" in other_said


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_host_that_is_asked_to_stop_before_its_steps_stops_the_others(stopped):
    status, said, other_status, other_said = two_of_which_one_ends(stopped, "stops")
    assert status == other_status == 75, said + other_said


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_lost_a_host_goes_on_with_another_number(alone, data_dir, tmp_path):
    """Stopped once by SIGTERM, killed once; then four hosts, then one."""
    workdir = tmp_path / "lost"
    arguments = command(workdir, data_dir, **{"train.checkpoint_every": 1})
    rows = lambda: len(metrics.read(workdir / "metrics.jsonl"))  # noqa: E731
    for number in (signal.SIGTERM, signal.SIGKILL):
        before, started = rows(), job(2, 2, arguments)
        deadline = time.monotonic() + 250
        while rows() <= before:
            assert started.poll() is None and time.monotonic() < deadline, ended(started)
            time.sleep(0.01)
        if number == signal.SIGTERM:
            started.send_signal(number)
            status, said = ended(started)
            assert status == 75, said
        else:
            found = subprocess.run(
                ["pgrep", "-f", f"workdir={workdir} .*--host=1"], capture_output=True, text=True
            )
            os.kill(int(found.stdout.split()[0]), number)
            status, said = ended(started, 120)
            assert status == 128 + signal.SIGKILL, said
    status, said = ended(job(4, 1, arguments))
    assert status == 0, said
    assert_same_runs(alone, workdir)


@pytest.fixture
def two_machines():
    """Two network namespaces with a cable between them: their names, which are addresses too."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = ["10.77.83.1", "10.77.83.2"]
    ip = lambda words: subprocess.run(["ip", *words.split()], check=True, capture_output=True)  # noqa: E731
    try:
        for name in names:
            ip(f"netns add {name}")
        first, second = names
        ip(f"link add cable0 netns {first} type veth peer name cable0 netns {second}")
        for name in names:
            ip(f"-n {name} addr add {name}/24 dev cable0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set cable0 up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made: {error.stderr.decode().strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_job_whose_network_is_cut_ends_and_goes_on(alone, data_dir, tmp_path, two_machines):
    arguments = command(tmp_path, data_dir, **EVALUATED, **{"train.checkpoint_every": 1})
    pipe = subprocess.PIPE

    def started():
        flags = ["--hosts=2", f"--coordinator={two_machines[0]}:8476", "--config.cpu_devices=2"]
        # Where a host's collectives listen follows from its name.
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *named, name, sys.executable]
                + [*arguments, f"--host={host}", *flags],
                cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True,
            )
            for host, name in enumerate(two_machines)
        ]  # fmt: skip

    both = started()
    while len(metrics.read(tmp_path / "metrics.jsonl")) < 2:
        assert all(one.poll() is None for one in both), [ended(one) for one in both]
        time.sleep(0.05)
    cable = ["ip", "-n", two_machines[1], "link", "set", "cable0"]
    subprocess.run([*cable, "down"], check=True)
    results = [ended(one, 240) for one in both]
    assert all(status not in (0, 75) for status, _ in results), results
    subprocess.run([*cable, "up"], check=True)
    results = [ended(one) for one in started()]
    assert [status for status, _ in results] == [0, 0], results
    assert_same_runs(alone, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_a_rehearsal_on_two_hosts_takes_each_its_share_and_leaves_nothing(data_dir, tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    settings = SMALL | {"task.data_dir": str(data_dir), "decode.slot_counts": 1}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    rehearsal = ["-m", "collab_jax.bench", "rehearse", "--config", "configs/countdown_tiny.py"]
    rehearsal += ["--layers=1", "--steps=1", *flags]
    status, said = ended(job(2, 1, [*rehearsal, f"--scratch={scratch}"]))
    assert status == 0, said
    row = next(line for line in said.splitlines() if line.startswith("| 1 (compiles)"))
    asked = row.split("|")[8]
    assert int(asked) == SMALL["prompts_per_step"], "each host asks for its own prompts"
    assert "of the first of 2 hosts" in said and not any(scratch.iterdir())
    status, said = ended(job(2, 1, rehearsal))
    assert status == 1 and "error: several hosts need --scratch" in said


@pytest.mark.slow
def test_hosts_with_other_settings_end_at_once_and_say_so(data_dir, tmp_path):
    pipe = subprocess.PIPE
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                sys.executable,
                *command(tmp_path / "run", data_dir, seed=host, cpu_devices=1),
                "--hosts=2",
                f"--host={host}",
                f"--coordinator=127.0.0.1:{port}",
            ],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for host in range(2)
    ]
    for process in started:
        status, said = ended(process, 120)
        assert status == 1
        assert "error: host 1 has seed=1, host 0 has 0: start all hosts with the same" in said
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hosts=2", "--host=1"], "--host and --coordinator go together"),
        (["--hosts=2", "--host=2", "--coordinator=x:1"], "--host=2 must lie in 0 to 1"),
        (["--hosts=0"], "--hosts=0 must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, says, data_dir, tmp_path):
    status, said = ended(job(1, 1, command(tmp_path, data_dir, *flags)))
    assert status == 1 and f"error: {says}" in said
