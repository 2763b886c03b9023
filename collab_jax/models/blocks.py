"""The blocks of a decoder: stacked in memory, one after the other in a program, apart in files.

In memory there is one leaf for all layers (`layers/mlp/up_proj/kernel`), with an axis of layers in
front. A file has a tensor for each layer (`model.layers.3.mlp.up_proj.weight`): what reads or
writes files sees the parameters by `unstacked`.

A program goes over the layers in one loop (`over_layers`), so that it does not grow with their
number. For a CPU it is straight code over a tuple of layers instead: the loop would copy each
layer's weights and cache out of the stacked ones, and a column of a response is little work beside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from collab_jax.models.decoder_config import DecoderConfig, Params
from collab_jax.runtime.split import Split

LAYERS = "layers"
Layers = Any  # a tree whose leaves are stacked, [layers, ...]; or a tuple with the tree of each


# --------------------------------------------------------------------------- in a program


def platform(cfg: DecoderConfig) -> str:
    """For what devices programs are: cpu, gpu or tpu."""
    return cfg.platform or jax.default_backend()


def is_looped(cfg: DecoderConfig) -> bool:
    """Whether the blocks are one loop of the program, or straight code."""
    return platform(cfg) != "cpu"


def unfolded(cfg: DecoderConfig, params: Params) -> Params:
    """Parameters as `over_layers` uses them: where it is straight code, a tuple of layers.

    It takes them apart itself; inside a loop of columns, though, it would do so for each of them.
    """
    return params | {LAYERS: _unfolded(cfg, params[LAYERS])}


def _unfolded(cfg: DecoderConfig, layers: Layers) -> Layers:
    if is_looped(cfg) or isinstance(layers, tuple):
        return layers
    leaves, tree = jax.tree.flatten(layers)
    # Unlike that of indexing, the gradient of a split is one concatenation.
    apart = [jax.lax.split(leaf, (1,) * cfg.num_layers) for leaf in leaves]
    return tuple(
        tree.unflatten([jax.lax.squeeze(leaf, (0,)) for leaf in layer])
        for layer in zip(*apart, strict=True)
    )


def over_layers(cfg: DecoderConfig, body: Callable, carry: Any, layers: Layers) -> tuple[Any, Any]:
    """(the carry after all layers, what they put out): a scan of body(carry, i, layer).

    body returns carry and output; i is the number of the layer, an int in straight code. layers is
    a pair of the parameters and of a list of tuples of Layers; the output is a tuple of Layers.
    """
    if is_looped(cfg):
        numbered = jnp.arange(cfg.num_layers), layers
        return jax.lax.scan(lambda carry, layer: body(carry, *layer), carry, numbered)
    outputs = []
    weights, others = layers
    for i, own in enumerate(_unfolded(cfg, weights)):
        carry, output = body(carry, i, (own, [tuple(x[i] for x in other) for other in others]))
        outputs.append(output)
    return carry, None if outputs[0] is None else tuple(zip(*outputs, strict=True))


def zeros(cfg: DecoderConfig, shape: tuple[int, ...], dtype: str) -> Layers:
    """Zeros of this shape for each layer."""
    if is_looped(cfg):
        return jnp.zeros((cfg.num_layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))


def written(
    layers: Layers, i: int | jax.Array, part: jax.Array, index: int | jax.Array, axis: int
) -> tuple[jax.Array, Layers]:
    """(layer number i with `part` written from `index` on, counted on `axis`; all layers then)."""
    put = jax.lax.dynamic_update_slice_in_dim
    if isinstance(layers, tuple):
        own = put(layers[i], part.astype(layers[i].dtype), index, axis)
        return own, (*layers[:i], own, *layers[i + 1 :])
    # In place: a layer that was taken out, changed and put back would be copied twice.
    start = [jnp.int32(0)] * layers.ndim
    start[0], start[axis] = jnp.int32(i), jnp.asarray(index, jnp.int32)
    layers = jax.lax.dynamic_update_slice(layers, part[None].astype(layers.dtype), start)
    return jax.lax.dynamic_index_in_dim(layers, i, keepdims=False), layers


# ------------------------------------------------------------------------------ on the host


def unstacked(params: Params) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves on the host by their path, those of each layer on their own.

    ('layers', 'mlp', 'up_proj', 'kernel') becomes ('layers', '0', 'mlp', 'up_proj', 'kernel') and
    so on. They are views, through which NumPy's arrays can be written.
    """
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        whole = np.asarray(leaf)
        if path[0] == LAYERS:
            leaves |= {(LAYERS, str(i), *path[1:]): layer for i, layer in enumerate(whole)}
        else:
            leaves[path] = whole
    return leaves


def empty(shapes: Params, dtype: str) -> Params:
    """A tree on the host with these shapes, to be filled through `unstacked`."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, jnp.dtype(dtype)), shapes)


def axes(path: tuple[Any, ...], leaf: Any) -> int:
    """How many axes a leaf has, at this path of a tree, beside the one of layers."""
    return len(leaf.shape) - any(getattr(key, "key", None) == LAYERS for key in path)


def divided(tree: Any, devices: int, over: str) -> Any:
    """Parameters, or what has their shapes, with every matrix as a `Split` over so many devices.

    Its part has an axis D in front, as on all devices. It is cut along its longer side, or along
    the other one where the number of devices divides that alone; where it divides neither, zeros
    fill up the last parts. With one device the matrix stays whole.
    """

    def one(path: tuple[Any, ...], x: Any) -> Any:
        sides = range(-1, -1 - axes(path, x), -1)
        if devices == 1 or len(sides) < 2:
            return x
        axis = max(sides, key=lambda axis: (x.shape[axis] % devices == 0, x.shape[axis]))
        size, at = x.shape[axis], len(x.shape) + axis  # `at`: of D, when it is an axis of its own
        if missing := -size % devices:
            pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
            x = pad(x, [(0, missing if i == at else 0) for i in range(len(x.shape))])
        apart = x.reshape(*x.shape[:at], devices, -1, *x.shape[at + 1 :])
        front = at, *range(at), *range(at + 1, apart.ndim)
        return Split(apart.transpose(front), axis, size, over)

    return jax.tree_util.tree_map_with_path(one, tree)
