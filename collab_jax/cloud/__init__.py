"""The cloud: who answers what the device does not, the store of every answer bought, and what they
cost.

protocol    what a cloud is            simulated, openai, local    the three kinds
store       every answer bought        leases, budget, attempts    who may buy, for how much, and when again
cached      the cloud in front of its store: what the rest of the program uses
ledger      what it has cost           transfer, __main__          export, import, verify; the command line
"""

from pathlib import Path

from collab_jax.cloud import openai, simulated
from collab_jax.cloud.budget import BudgetSpent, Spent
from collab_jax.cloud.cached import MODES, Answers, CachedCloud, Pending, Policy
from collab_jax.cloud.ledger import Ledger, ledger
from collab_jax.cloud.protocol import Cloud, CloudError, Failure, Messages, Reply
from collab_jax.cloud.simulated import SimulatedCloud
from collab_jax.cloud.store import Store, StoreError
from collab_jax.runtime.errors import UserError

__all__ = [
    "Answers", "BudgetSpent", "CachedCloud", "Cloud", "CloudError", "Failure", "Ledger", "Messages", "Pending", "Policy",
    "Reply", "SimulatedCloud", "Spent", "Store", "StoreError", "ledger", "make_cloud",
]  # fmt: skip


def _local(config, task) -> Cloud:
    from collab_jax.cloud import local

    return local.from_config(config, task)


KINDS = {  # cloud.kind -> (config.cloud, task) -> Cloud
    "simulated": simulated.from_config,
    "openai": openai.from_config,
    "local": _local,
}


def make_cloud(config, task, store_path: Path) -> CachedCloud:
    """Builds the cloud that `config.cloud` describes, behind the store at `store_path` (made if
    missing).

    Raises UserError for a setting that cannot be used, or a task that this kind cannot serve;
    StoreError for a bad store.
    """
    c = config.cloud
    if c.kind not in KINDS:
        raise UserError(
            f"config.cloud.kind={c.kind!r} is unknown: choose one of {', '.join(KINDS)}"
        )
    if c.mode not in MODES:
        raise UserError(
            f"config.cloud.mode={c.mode!r} is unknown: choose one of {', '.join(MODES)}"
        )
    if c.when_spent not in ("continue", "stop"):
        raise UserError(
            f"config.cloud.when_spent={c.when_spent!r} is unknown: choose continue or stop"
        )
    if min(c.retries, c.wait, c.prefetch, c.concurrency - 1, c.batch_size - 1) < 0:
        raise UserError(
            "config.cloud: retries, wait and prefetch must be at least 0, concurrency and batch_size at least 1"
        )
    if any(
        limit is not None and not limit >= 0 for limit in (c.max_calls, c.max_usd)
    ):  # nan would be no limit
        raise UserError(
            f"config.cloud: max_calls={c.max_calls} and max_usd={c.max_usd} must be at least 0, or None"
        )
    cloud = KINDS[c.kind](c, task)
    policy = Policy(c.mode, c.retries, c.max_calls, c.max_usd, stop=c.when_spent == "stop")
    return CachedCloud(cloud, Store(store_path), policy)
