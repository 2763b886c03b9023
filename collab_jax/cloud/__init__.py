"""The cloud: who answers what the device does not, the store of every answer bought, and what they cost."""

from pathlib import Path

from collab_jax.cloud import simulated
from collab_jax.cloud.cached import Answers, CachedCloud
from collab_jax.cloud.ledger import Ledger, ledger
from collab_jax.cloud.protocol import Cloud, Messages, Reply
from collab_jax.cloud.simulated import SimulatedCloud
from collab_jax.cloud.store import Store, StoreError
from collab_jax.errors import UserError

__all__ = [
    "Answers", "CachedCloud", "Cloud", "Ledger", "Messages", "Reply", "SimulatedCloud", "Store", "StoreError",
    "ledger", "make_cloud",
]  # fmt: skip

KINDS = {"simulated": simulated.from_config}  # cloud.kind -> (config.cloud, task) -> Cloud


def make_cloud(config, task, store_path: Path) -> CachedCloud:
    """Builds the cloud that `config.cloud` describes, behind the store at `store_path` (made if missing).

    Raises UserError for an unknown `cloud.kind`, or a task that this kind cannot serve; StoreError for a bad store.
    """
    if config.cloud.kind not in KINDS:
        raise UserError(f"config.cloud.kind={config.cloud.kind!r} is unknown: choose one of {', '.join(KINDS)}")
    return CachedCloud(KINDS[config.cloud.kind](config.cloud, task), Store(store_path))
