"""Devices: the only file that says pmap. A body sees its own device's share and the axis name AXIS;
nothing else does.

Arrays that differ by device carry a leading axis D outside the body; state is replicated while a
run lasts and is always saved without that axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from collab_jax.runtime.errors import UserError

AXIS = "devices"


def replicate(tree: Any) -> Any:
    """Every leaf on every local device: [...] -> [D, ...], with the sharding that a pmap's results
    have.

    (Another axis name in the sharding, as flax's `replicate` gives, would compile each function a
    second time.)
    """
    devices = jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    return jax.device_put(
        jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *np.shape(x))), tree), sharding
    )


def pmap(body: Callable, donate: tuple[int, ...] = ()) -> Callable:
    """`body` on every local device at once; every argument and result has a leading axis D."""
    return jax.pmap(body, axis_name=AXIS, donate_argnums=donate)


def unreplicate(tree: Any) -> Any:
    """The first device's copy, on the host. Reads its shard: indexing would compile a program for
    every shape.
    """
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


def shard(tree: Any, devices: int) -> Any:
    """[n, ...] -> [D, n / D, ...] for every leaf, in order. Raises UserError where D does not
    divide n.
    """

    def one(x):
        if x.shape[0] % devices:
            raise UserError(
                f"a batch of {x.shape[0]} does not divide over {devices} devices: change the batch size, or config.cpu_devices"
            )
        return x.reshape(devices, -1, *x.shape[1:])

    return jax.tree.map(one, tree)


def gather(tree: Any) -> Any:
    """[D, n / D, ...] -> [n, ...] on the host: the inverse of `shard`."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), jax.device_get(tree))
