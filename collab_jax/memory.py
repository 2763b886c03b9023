"""Prints the memory plan of a run; exits with an error, and with what would help, if it won't fit.

    python -m collab_jax.memory --config configs/countdown_qwen2p5_3b.py --devices 8 --gib 16

(and any --config.KEY=VALUE) plans for any number of devices of any size; none of them, and no
weights, need be there. What is counted, and how far it can be trusted: `rl/memory_plan.py`.
"""

from absl import flags
from ml_collections import ConfigDict

from collab_jax.models import hf, lora
from collab_jax.rl import memory_check
from collab_jax.rl.memory_plan import GIB
from collab_jax.runtime import cli


def show_plan(config: ConfigDict, devices: int, gib: float) -> int:
    """Prints the plan for so many devices of `gib` GiB each, and returns the exit status 0."""
    architecture = hf.architecture(config.model.path)
    cfg = hf.config_from_hf(architecture, config.model.dtype, config.train.remat)
    cfg = lora.configure(cfg, config.lora, decision_id=None)
    print(memory_check.check_fits(cfg, config, memory_check.Machine(devices, gib * GIB)))
    return 0


if __name__ == "__main__":
    # Here, and not at the top: flags belong to all of a process, so that a command that imported
    # this module would take them too.
    devices = flags.DEFINE_integer("devices", 1, "Number of devices to plan for.", lower_bound=1)
    gib = flags.DEFINE_float("gib", 80.0, "Memory of each of them, in GiB.", lower_bound=0.0)
    cli.run_with_config(lambda config: show_plan(config, devices.value, gib.value), workdir=False)
