"""Training on the hosts of a Ray cluster, by Ray Train (2.60): each of its workers starts one host.

    python launch/ray_job.py SCALING --config FILE --workdir DIR [--config.KEY=VALUE ...]
    ray job submit --working-dir . -- python launch/ray_job.py SCALING --config FILE --workdir DIR

SCALING is what ray.train.ScalingConfig takes, as JSON: '{"num_workers": 2}',
'{"num_workers": 4, "use_tpu": true, "topology": "4x4", "accelerator_type": "TPU-V5E"}',
'{"num_workers": 2, "use_gpu": true, "resources_per_worker": {"GPU": 8}}'. collab_jax is installed
on all of them, and DIR lies on a file system that they share. A run that lost a host or was asked
to stop goes on from its last checkpoint, three times; after that the same command does.
"""

import json
import os
import socket
import subprocess
import sys

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxConfig, JaxTrainer


def host(job: dict[str, list[str]]) -> None:
    """What a worker does; raises CalledProcessError unless the run is complete."""
    with socket.socket() as free:
        free.bind(("", 0))
        own = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    context = train.get_context()
    flags = [
        f"--hosts={context.get_world_size()}",
        f"--host={context.get_world_rank()}",
        f"--coordinator={broadcast_from_rank_zero(own)}",
    ]
    command = [sys.executable, "-m", "collab_jax.train", *job["arguments"], *flags]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # configs/X.py is meant from where the job starts
    JaxTrainer(
        host,
        train_loop_config={"arguments": sys.argv[2:]},
        jax_config=JaxConfig(),  # the hosts find each other, and their devices, by themselves
        scaling_config=train.ScalingConfig(**json.loads(sys.argv[1])),
        run_config=train.RunConfig(failure_config=train.FailureConfig(max_failures=3)),
    ).fit()
