"""Launchers of several hosts: their files are parsed, and their scripts run with stand-ins."""

import os
import re
import string
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

from collab_jax.runtime.process import STOPPED

STAND_IN = """#!/bin/bash
echo "$(basename "$0") $* [${JAX_LOCAL_DEVICE_IDS:-all}]" >>"$CALLS"
eval "$DOES"
"""


@pytest.fixture
def stand_ins(tmp_path):
    """run(script, *arguments, **environment) -> status and calls; it runs in tmp_path."""
    for name in ("srun", "scontrol", ".venv/bin/python"):
        file = tmp_path / "bin" / name if "/" not in name else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STAND_IN)
        file.chmod(0o755)

    def run(*command, **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(calls), "DOES": ""}
        done = subprocess.run(
            command, cwd=tmp_path, env=env | environment, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


SLURM = ROOT / "launch" / "slurm.sbatch"


def test_slurm_starts_a_process_on_each_node_and_is_asked_to_stop_before_its_time():
    options = [
        line.removeprefix("#SBATCH ")
        for line in SLURM.read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--ntasks-per-node=1", "--signal=TERM@120", "--requeue"} <= set(options)


@pytest.mark.parametrize(
    ("does", "status", "requeued"),
    [
        ("[[ $0 != *srun ]] || exit 75", 0, True),  # asked to stop: saved, and not done
        ("", 0, False),
        ("exit 1", 1, False),  # an error would come again
    ],
)
def test_slurm_queues_again_what_is_not_complete(stand_ins, tmp_path, does, status, requeued):
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    command = ["bash", str(SLURM), "a.py", "a run", "--config.seed=1"]
    done, calls = stand_ins(*command, DOES=does, SLURM_GPUS_ON_NODE="4", **slurm)
    assert done.returncode == status, done.stderr
    assert calls[0] == (
        "srun --kill-on-bad-exit=0 .venv/bin/python -m collab_jax.train --config a.py "
        "--workdir a run --hosts 2 --config.seed=1 [0,1,2,3]"
    )
    assert [call.split(" [")[0] for call in calls[1:]] == ["scontrol requeue 7"] * requeued


def test_slurm_needs_a_config_and_a_workdir(stand_ins, tmp_path):
    done, calls = stand_ins("bash", str(SLURM), "a.py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("usage: sbatch") and not calls


def test_sky_tells_each_machine_its_number_and_the_first_one_s_address(stand_ins):
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done, calls = stand_ins("bash", "-c", task["run"], **sky, **task["envs"])
    assert done.returncode == 0, done.stderr
    assert calls == [
        f"python -m collab_jax.train --config {task['envs']['CONFIG']} "
        f"--workdir {task['envs']['WORKDIR']} --hosts 2 --host 1 --coordinator 10.0.0.4:8476 [all]"
    ]
    assert (ROOT / task["envs"]["CONFIG"]).exists() and task["num_nodes"] == 2


def test_jobset_gives_each_pod_its_number_and_starts_again_what_has_saved():
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    exported = re.findall(r"(\w+)=(\S+)", "".join(re.findall("#   export (.*\n)", text)))
    rendered = string.Template(text).safe_substitute(dict(exported))
    assert not re.search(r"\$\{|\$[A-Z]", rendered)
    job_set = yaml.safe_load(rendered)
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    [group] = job_set["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    # JobSet names pods NAME-GROUP-REPLICA-INDEX, and its service as the set.
    assert container["args"] == [
        "--config=configs/math_qwen2p5_1p5b.py",
        "--workdir=/runs/math",
        "--hosts=4",
        "--host=$(JOB_COMPLETION_INDEX)",
        f"--coordinator=math-{group['name']}-0-0.math:8476",
    ]
    assert container["args"][1].endswith(f"{container['volumeMounts'][0]['mountPath']}/math")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [STOPPED]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0  # else there is no policy
    failure = job_set["spec"]["failurePolicy"]
    assert failure["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert failure["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


GCLOUD = """#!/bin/bash
echo "$(printf '%s|' "$@")" >>"$CALLS"
case "$4" in
  describe) echo "$HOSTS" ;;
  scp) tar -tzf "$5" | grep ^collab_jax/train.py >>"$CALLS" ;;
  ssh) if [[ $7 == --command=*setsid* ]]; then cd "$HOME" && bash -c "${7#--command=}"; fi ;;
esac
"""
TRAINS = """#!/bin/bash
printf '%s|' "$@"
echo
if mkdir ../stopped; then exit 75; else exit "$STATUS"; fi 2>/dev/null
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the last commit is what is copied")
@pytest.mark.parametrize("status", [0, 1])
def test_a_slice_trains_on_all_hosts_and_starts_again_what_was_asked_to_stop(tmp_path, status):
    for name, text in (("bin/gcloud", GCLOUD), ("home/collab_jax/.venv/bin/python", TRAINS)):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    arguments = ["a slice", "z", "configs/x y.py", "/shared/it's", "--config.seed=1"]
    calls, log = tmp_path / "calls", tmp_path / "home" / "collab_jax.log"
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CALLS": str(calls),
        "HOME": str(tmp_path / "home"),
        "HOSTS": "10.0.0.1;10.0.0.2",
        "STATUS": str(status),
    }
    done = subprocess.run(
        ["launch/tpu_slice.sh", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "starting 2 hosts" in done.stdout
    asked = calls.read_text().splitlines()
    assert [call.split("|")[3] for call in asked if "|" in call] == [
        "describe",
        "scp",
        "ssh",
        "ssh",
    ]
    assert "collab_jax/train.py" in asked and "prepare tpu" in asked[-2]
    assert all("|--zone=z|" in call for call in asked if "|" in call)
    train = "-m|collab_jax.train|--config|configs/x y.py|--workdir|/shared/it's|--hosts|2|"
    deadline = time.monotonic() + 20
    while len(log.read_text().splitlines()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert log.read_text().splitlines() == [f"{train}--config.seed=1|"] * 2


RAY = {  # what launch/ray_job.py takes of Ray, with one worker of four, the third
    "ray/__init__.py": "from ray import train, util",
    "ray/util.py": "def get_node_ip_address(): return '10.0.0.6'",
    "ray/train/__init__.py": """
class Given:
    def __init__(self, **given): self.__dict__.update(given)
    def get_world_size(self): return scaling.num_workers
    def get_world_rank(self): return 2
    def __call__(self): return self
ScalingConfig = RunConfig = FailureConfig = Given
get_context = Given()
""",
    "ray/train/collective.py": """
def broadcast_from_rank_zero(own):
    assert own.startswith('10.0.0.6:')
    return own.replace('.6:', '.4:')
""",
    "ray/train/v2/jax.py": """
from ray import train
JaxConfig = train.Given
class JaxTrainer:
    def __init__(self, loop, *, train_loop_config, jax_config, scaling_config, run_config):
        assert not vars(jax_config) and run_config.failure_config.max_failures == 3
        train.scaling = scaling_config
        self.fit = lambda: loop(train_loop_config)
""",
    "collab_jax/train.py": "import sys; print(*sys.argv[1:], sep='|'); sys.exit(len(sys.argv) > 6)",
}


@pytest.mark.parametrize(("more", "status"), [((), 0), (("--config.seed=1",), 1)])
def test_a_worker_of_ray_starts_a_host_and_fails_with_it(tmp_path, more, status):
    for name, text in RAY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script, given = ROOT / "launch" / "ray_job.py", ["--config=x", "-w", *more]
    done = subprocess.run(
        [sys.executable, script, '{"num_workers": 4}', *given],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    joined = ["--hosts=4", "--host=2", r"--coordinator=10[.]0[.]0[.]4:\d+\n"]
    assert re.fullmatch("[|]".join([*given, *joined]), done.stdout)
