"""The cloud: who answers what the device does not, and every answer bought, in a store.

It imports `models` and `runtime`; `tasks`, `rl` and what stands above them import it. The command
`python -m collab_jax.cloud` is the exception: it sets up a run.

protocol                    what a cloud is
simulated, openai, local    the three kinds
streaming                   one call of the second kind, text as it comes
redaction, personal         placeholders for personal data; what is personal data
store                       every answer ever bought
buyer                       buys what is missing
leases, budget, attempts    who buys, for how much, and when again
cached                      a cloud behind its store, which is what the rest of the program uses
far                         the cloud of several hosts: the first buys for all
ledger                      what it has cost
transfer, __main__          export, import, verify; the command line
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from collab_jax.cloud import openai, redaction, simulated
from collab_jax.cloud.budget import BudgetSpent, Spent
from collab_jax.cloud.buyer import Policy
from collab_jax.cloud.cached import MODES, Answers, CachedCloud, Pending
from collab_jax.cloud.ledger import Ledger, ledger
from collab_jax.cloud.protocol import Cloud, CloudError, Failure, Reply
from collab_jax.cloud.simulated import SimulatedCloud
from collab_jax.cloud.store import Store, StoreError
from collab_jax.runtime.errors import UserError

__all__ = [
    "Answers",
    "BudgetSpent",
    "CachedCloud",
    "Cloud",
    "CloudError",
    "Failure",
    "Ledger",
    "Pending",
    "Policy",
    "Reply",
    "SimulatedCloud",
    "Spent",
    "Store",
    "StoreError",
    "ledger",
    "make_cloud",
]


def _local(config: ConfigDict, task: Any) -> Cloud:
    from collab_jax.cloud import local  # imports the sampler, which the other kinds do not need

    return local.from_config(config, task)


# cloud.kind -> (config.cloud, task) -> Cloud. The task is a `tasks.Task`, which stands above us.
KINDS: dict[str, Callable[[ConfigDict, Any], Cloud]] = {
    "simulated": simulated.from_config,
    "openai": openai.from_config,
    "local": _local,
}


def make_cloud(config: ConfigDict, task: Any, store_path: Path) -> CachedCloud:
    """Returns the cloud that `config.cloud` describes, behind the store at `store_path`.

    The store is made if it is missing. Raises UserError for a setting that cannot be used, or a
    task that this kind cannot serve; StoreError for a bad store.
    """
    c = config.cloud
    _check_cloud_settings(c)
    policy = Policy(
        mode=c.mode,
        retries=c.retries,
        max_calls=c.max_calls,
        max_usd=c.max_usd,
        stop_when_spent=c.when_spent == "stop",
    )
    redact = redaction.from_config(c)
    return CachedCloud(KINDS[c.kind](c, task), Store(store_path), policy, redact)


def _check_cloud_settings(c: ConfigDict) -> None:
    """Raises UserError for settings of config.cloud that no kind of cloud can use."""
    choices = {"kind": tuple(KINDS), "mode": MODES, "when_spent": ("continue", "stop")}
    for name, possible in choices.items():
        if c[name] not in possible:
            raise UserError(
                f"config.cloud.{name}={c[name]!r} is unknown: choose one of {', '.join(possible)}"
            )
    if min(c.retries, c.wait, c.prefetch, c.concurrency - 1, c.batch_size - 1) < 0:
        raise UserError(
            "config.cloud: retries, wait and prefetch must be at least 0, concurrency and "
            "batch_size at least 1"
        )
    limits = c.max_calls, c.max_usd
    if any(limit is not None and not limit >= 0 for limit in limits):  # nan would be no limit
        raise UserError(
            f"config.cloud: max_calls={c.max_calls} and max_usd={c.max_usd} must be at least 0, "
            "or None"
        )
