"""Launchers of several hosts: their files are parsed, and their scripts run with stand-ins."""

import os
import subprocess

import pytest
import yaml
from conftest import ROOT

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
