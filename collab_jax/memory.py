"""Memory of a run, estimated from its config before anything is allocated; a run that does not fit
is refused.

    python -m collab_jax.memory --config configs/countdown_qwen2p5_3b.py --devices 8 --gib 16 [--config.KEY=VALUE ...]

prints the plan for any number of devices of any size; none of them, and no weights, need be there.

Counted, on one device: what is held throughout (parameters, what is frozen, optimizer, average) and
then the larger of an update (gradients, what one micro-batch keeps for its backward pass, its
logits) and of sampling (KV cache, logits), which do not overlap. What a backward pass keeps is not
written down here: jax traces one block and says so, whatever the block is. Against the compiler's
own count the estimate is right within 15 % (tests), on a CPU. What a CPU's compiler makes nothing
of, narrow activations, remat and chunks of logits, could not be checked so. An allocator needs some
room beside.
"""

from absl import flags
from ml_collections import ConfigDict

from collab_jax.models import hf, lora
from collab_jax.rl import memory_plan
from collab_jax.runtime import cli

# ----------------------------------------------------------------------------------- what a backward pass keeps


# ------------------------------------------------------------------------------------------------------ the plan


# ------------------------------------------------------------------------------------- against what there is


def main(config: ConfigDict, devices: int, gib: float) -> int:
    """Prints the plan for so many devices with so many GiB of memory each."""
    cfg = hf.config_from_hf(
        hf.architecture(config.model.path), config.model.dtype, config.train.remat
    )
    print(
        memory_plan.check(lora.configure(cfg, config.lora), config, devices, gib * memory_plan.GIB)
    )
    return 0


if __name__ == "__main__":
    devices = flags.DEFINE_integer("devices", 1, "Number of devices to plan for.", lower_bound=1)
    gib = flags.DEFINE_float("gib", 80.0, "Memory of each of them, in GiB.", lower_bound=0.0)
    cli.run_with_config(lambda config: main(config, devices.value, gib.value), workdir=False)
