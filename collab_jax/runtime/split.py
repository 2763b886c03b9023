"""Arrays that are divided over devices, and what devices do with them together.

A `Split` in a tree stands for an array of which every device holds a part. It is a node of the
tree, so what goes leaf by leaf (an optimizer, an average, zeros, a loop over layers) works on the
parts and need not know. Where the array itself is needed, `whole` gathers it; the gradient comes
back as this device's part of the sum over all devices. These functions run on a device, under the
axis `Split.over`; `parallel.py` brings arrays there and back. An array is divided over all devices
of the job, whatever host they belong to.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


class Split(flax.struct.PyTreeNode):
    """This device's part of an array that is cut into equal parts along one of its axes.

    Where they hold more than the array, the last ones end with zeros, which stay zeros.
    """

    part: Any
    axis: int = flax.struct.field(pytree_node=False)  # counted from the end, so below 0
    size: int = flax.struct.field(pytree_node=False)  # of the array along it
    over: str = flax.struct.field(pytree_node=False)  # the name of the devices' axis


def is_split(x: Any) -> bool:
    """Whether x stands for a divided array; what `jax.tree.map` takes as `is_leaf`."""
    return isinstance(x, Split)


def over(tree: Any) -> str | None:
    """The axis over which arrays of a tree are divided; None where none is."""
    return next((x.over for x in jax.tree.leaves(tree, is_leaf=is_split) if is_split(x)), None)


def whole(tree: Any, dtype: str | jnp.dtype) -> Any:
    """The tree with every Split gathered, as `dtype`; other leaves stay as they are.

    Gradients are summed over the devices in f32.
    """

    def one(x: Any) -> Any:
        return _gathered(x.part, x.axis, x.size, x.over, jnp.dtype(dtype)) if is_split(x) else x

    return jax.tree.map(one, tree, is_leaf=is_split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(part: jax.Array, axis: int, size: int, over: str, dtype: jnp.dtype) -> jax.Array:
    """The array of which this device holds `part`."""
    axis += part.ndim
    filled = jax.lax.all_gather(part.astype(dtype), over, axis=axis, tiled=True)
    return jax.lax.slice_in_dim(filled, 0, size, axis=axis)


def _forward(part: jax.Array, axis: int, size: int, over: str, dtype: jnp.dtype):
    # A residual that says what type the part's gradient has to have.
    return _gathered(part, axis, size, over, dtype), jnp.zeros(0, part.dtype)


def _backward(axis: int, size: int, over: str, dtype: jnp.dtype, like: jax.Array, dy: jax.Array):
    wide, axis, devices = dy.astype(jnp.float32), axis + dy.ndim, jax.lax.axis_size(over)
    missing = -size % devices
    wide = jnp.pad(wide, [(0, missing if i == axis else 0) for i in range(dy.ndim)])
    if _sums_in_order():
        parts = jnp.stack(jnp.split(wide, devices, axis))
        part = jax.lax.all_to_all(parts, over, split_axis=0, concat_axis=0).sum(0)
    else:
        part = jax.lax.psum_scatter(wide, over, scatter_dimension=axis, tiled=True)
    return (part.astype(like.dtype),)


_gathered.defvjp(_forward, _backward)


def all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps everything but what `whole` gathers.

    It sees `_gathered` as one call, in which it has to look.
    """
    return "all_gather" not in f"{primitive.name} {params.get('call_jaxpr', '')}"


def summed(tree: Any, over: str) -> Any:
    """A tree of gradients summed over the devices: those of divided arrays are already."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_split)
    sums = iter(total([x for x in leaves if not is_split(x)], over))
    return structure.unflatten([x if is_split(x) else next(sums) for x in leaves])


def _sums_in_order() -> bool:
    """Whether sums are made in the order of the devices, and not by the devices' own collective.

    Between hosts that compute on CPUs that one depends on how many devices each host has.
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def total(tree: Any, over: str) -> Any:
    """A tree summed over the devices."""
    if not _sums_in_order():
        return jax.lax.psum(tree, over)
    return jax.tree.map(lambda x: jax.lax.all_gather(x, over).sum(0), tree)


def norm(tree: Any) -> jax.Array:
    """The root of the sum of all squares f32[], as `optax.tree.norm`, of whole arrays."""
    squares = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))  # noqa: E731
    leaves = jax.tree.leaves(tree, is_leaf=is_split)
    of_all = sum((squares(x) for x in leaves if not is_split(x)), jnp.float32(0))
    if divided := [x for x in leaves if is_split(x)]:
        of_all += total(sum(squares(x.part) for x in divided), divided[0].over)
    return jnp.sqrt(of_all)
