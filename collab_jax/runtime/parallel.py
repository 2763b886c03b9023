"""Devices: the only module that names pmap, meshes and shardings.

A body sees its own device's share and the axis name AXIS. Arrays that differ by device carry a
leading axis D outside the body, and so do those that are the same on all. Where a `Split` stands in
a tree, D is that of its parts. The state is always saved without that axis, and whole.

In a job of several hosts D counts the devices of this one. What `pmap` compiles runs on those
alone; a `Program` runs on all devices of the job, and each host calls it with its own share. So
what brings the parts of a `Split` together is called by all hosts.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.split import is_split, total

AXIS = "devices"
# Bytes, or one row if that is more, that are gathered at once of what several hosts have parts of.
PIECE = 2**26


def replicate(tree: Any) -> Any:
    """Returns every leaf on every local device, [D, ...], as a pmap returns its results.

    Of a Split, whose axis counts all devices of the job, each device gets its part.

    The sharding is that of a pmap's results: with another axis name in it, as flax's `replicate`
    gives, each function would be compiled a second time.
    """
    devices = jax.local_devices()
    D, first = len(devices), first_device()
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def one(x: Any) -> Any:
        if is_split(x):
            return x.replace(part=x.part[first : first + D])
        return np.broadcast_to(x, (D, *np.shape(x)))

    return jax.device_put(jax.tree.map(one, tree, is_leaf=is_split), sharding)


def pmap(body: Callable, donate: tuple[int, ...] = (), devices: Sequence[Any] | None = None) -> Any:
    """Returns `body` compiled to run on every one of `devices` at once; None: every local device.

    Every argument and result has a leading axis D. donate: arguments whose memory the results may
    take. For devices of `tpu_topology` it can be lowered, from shapes, and compiled, but not run.
    """
    if devices is None and jax.process_count() > 1:
        return _on_this_host(body, donate)
    return jax.pmap(body, axis_name=AXIS, donate_argnums=donate, devices=devices)


class _Placed(NamedTuple):
    """What jax has compiled, or will, for the local devices: it takes NumPy's arrays too."""

    run: Any
    sharding: NamedSharding

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*jax.device_put(arguments, self.sharding))

    def lower(self, *shapes: Any) -> "_Placed":
        return self._replace(run=self.run.lower(*shapes))

    @property
    def out_info(self) -> Any:
        return self.run.out_info

    def compile(self) -> "_Placed":
        return self._replace(run=self.run.compile())


def _on_this_host(body: Callable, donate: tuple[int, ...]) -> _Placed:
    """`pmap` on the local devices of a job of several processes, where jax's own is not lowered."""
    mesh, spec = Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS)

    def one(*arguments: Any) -> Any:
        outputs = body(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], outputs)

    mapped = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sharding = NamedSharding(mesh, spec)
    compiled = jax.jit(mapped, in_shardings=sharding, out_shardings=sharding, donate_argnums=donate)
    return _Placed(compiled, sharding)


def first_device() -> int:
    """Returns the number of this host's first device among all devices of the job."""
    return jax.process_index() * jax.local_device_count()


def tpu_topology(name: str) -> Sequence[Any]:
    """Returns the chips of a TPU slice by name, as `v5e:2x4`, for programs to be compiled for.

    libtpu has the compiler; no chip need be there. `process.without_accelerator` comes first.
    Raises UserError without libtpu, and for a name that is no slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'libtpu, which compiles for TPUs, is not installed: pip install "jax[tpu]", or this '
            "package with its extra `tpu`"
        )
    # A host has four chips or eight unless it is said to have one.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"[^:]*:1(x1)+", name) else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"{name!r} is no TPU slice ({error}): write it as v5e:2x4, v5e:1x1 or v5p:2x2x2"
        ) from None


class Program:
    """A body on every device of the job, compiled for the shapes of its first call.

    Before it runs, what the compiler freed is given back to the system: a process is largest when a
    new program makes its temporary arrays.
    """

    def __init__(self, body: Callable, donate: tuple[int, ...] = ()):
        self._mapped: Any = jax.pmap(body, axis_name=AXIS, donate_argnums=donate)
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if jax.process_count() > 1:  # it cannot be lowered there
            return self._mapped(*arguments)
        if self._compiled is None:
            self._compiled = self._mapped.lower(*arguments).compile()
            process.return_free_memory()
        return self._compiled(*arguments)


def connect() -> None:
    """Sums a number over all devices of the job.

    On CPUs devices have 30 s to find each other when they first sum anything together. That is done
    here, when the hosts have just met: later one of them may be compiling for minutes. Raises
    UserError where they do not.
    """
    summed = Program(lambda x: total(x, AXIS))
    try:
        jax.block_until_ready(summed(np.ones(jax.local_device_count(), np.float32)))
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the hosts' devices did not find each other ({reason}): the name of each host must "
            "stand for an address that the others can reach, not for 127.0.1.1 in /etc/hosts"
        ) from None


def unreplicate(tree: Any) -> Any:
    """Returns the first device's copy of every leaf, on the host; in place of a Split, all of it.

    Where a Split is in the tree and the job has several hosts, all of them call this.
    """

    def one(x: Any) -> np.ndarray:
        if not is_split(x):
            return _first_copy(x)
        if jax.process_count() > 1:
            parts = list(_parts_of_all_hosts(x.part))
        else:
            parts = [np.asarray(shard.data)[0] for shard in x.part.addressable_shards]
        whole = np.concatenate(parts, axis=x.axis)
        return whole[(..., slice(x.size), *[slice(None)] * (-1 - x.axis))]

    return jax.tree.map(one, tree, is_leaf=is_split)


def _first_copy(x: jax.Array) -> np.ndarray:
    # Reads that device's shard: indexing would compile a program for every shape.
    return np.asarray(x.addressable_shards[0].data)[0]


def _parts_of_all_hosts(part: jax.Array) -> np.ndarray:
    """Returns the parts [devices of the job, n, ...] of [D, n, ...], some rows of n at a time.

    So a device never holds another array as a whole beside its own.
    """
    n, devices = part.shape[1], jax.device_count()
    row_bytes = devices * math.prod(part.shape[2:]) * part.dtype.itemsize
    rows = min(n, max(1, PIECE // row_bytes))
    whole = np.empty((devices, *part.shape[1:]), part.dtype)
    for start in (*range(0, n - rows, rows), n - rows):  # the last piece may have rows again
        at = np.full(jax.local_device_count(), start, np.int32)
        whole[:, start : start + rows] = _first_copy(_gathered_rows(rows)(part, at))
    return whole


@functools.cache
def _gathered_rows(rows: int) -> "Program":
    """Returns program(part [D, n, ...], start i32[D]) -> rows of all parts, for several hosts."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=rows)
    return Program(lambda part, start: jax.lax.all_gather(cut(part, start), AXIS))


def shard(tree: Any, devices: int) -> Any:
    """Returns every leaf [n, ...] as [D, n / D, ...], in order, for D = `devices`.

    Raises UserError where D does not divide n.
    """

    def one(x: Any) -> Any:
        if x.shape[0] % devices:
            raise UserError(
                f"a batch of {x.shape[0]} does not divide over {devices} devices: change the batch "
                "size, or config.cpu_devices"
            )
        return x.reshape(devices, -1, *x.shape[1:])

    return jax.tree.map(one, tree)


def gather(tree: Any) -> Any:
    """Returns every leaf [D, n / D, ...] as [n, ...] on the host: the inverse of `shard`."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), jax.device_get(tree))
