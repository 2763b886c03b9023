"""What the hosts of a job share out and agree on: a step's prompts, and what came of them.

With one host the batch is its own, and it agrees with itself.
"""

from collab_jax.rl.batch import Batch
from collab_jax.rl.missing_verdicts import NOTHING_MISSING, make_row, read_row
from collab_jax.rl.rollout import Collected
from collab_jax.runtime import hosts


def own(batch: Batch) -> Batch:
    """Returns the part of a step's batch that this host samples; all of it where there is one."""
    part = hosts.part(len(batch.examples))
    return Batch(batch.examples[part], batch.prompts[part], batch.mask[part], batch.earlier[part])


def agreed(step: int, collected: Collected, stop: bool) -> tuple[Collected, bool]:
    """Returns what all hosts collected, but for texts and rollout, and whether one is to stop."""
    if hosts.count() == 1:
        return collected, stop
    said = {
        "stop": stop,
        "cut_off": collected.cut_off,
        "cloud_asked": collected.cloud_asked,
        "missing": make_row(step, collected.missing),
    }
    heard = hosts.gathered(f"what it collected for step {step + 1}", said)
    missing = NOTHING_MISSING
    for of_host in heard:
        missing = missing.union(read_row(of_host["missing"]))
    collected = collected._replace(
        cut_off=sum(of_host["cut_off"] for of_host in heard) / len(heard),
        cloud_asked=sum(of_host["cloud_asked"] for of_host in heard),
        missing=missing,
    )
    return collected, any(of_host["stop"] for of_host in heard)
