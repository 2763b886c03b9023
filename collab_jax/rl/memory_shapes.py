"""What a memory plan counts by tracing: a model's parameters, and what its backward pass keeps.

Neither is written down here: jax traces the model, or one block of it, and says so, whatever the
block is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from ml_collections import ConfigDict

from collab_jax.models import decoder, lora
from collab_jax.models.blocks import LAYERS
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.rl import gradient


class Adapter(NamedTuple):
    """What `config.lora` says about the shapes of an adapter; hashable. Rank 0 is no adapter."""

    rank: int
    targets: tuple[str, ...]


# ----------------------------------------------------------------------------- parameters, by count


@functools.cache
def model_shapes(
    cfg: DecoderConfig, adapter: Adapter, param_dtype: str
) -> tuple[Params, Params | None]:
    """(trained, frozen) parameters, as shapes."""

    def cast(tree, dtype: str):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)

    whole = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    if not adapter.rank:
        return cast(whole, param_dtype), None
    settings = ConfigDict({"rank": adapter.rank, "targets": adapter.targets})
    trained = jax.eval_shape(lambda: lora.init(cfg, settings, jax.random.key(0), "float32"))
    return cast(trained, param_dtype), cast(whole, cfg.dtype)


def plain_shapes(cfg: DecoderConfig, adapter: Adapter) -> tuple[Params, Params | None]:
    """`model_shapes` for counting: traced once for all configs that differ only in other things."""
    plain = dataclasses.replace(cfg, dtype="float32", remat=False, lora_scale=1.0)
    return model_shapes(plain, adapter, "float32")


def count(tree: Params | None) -> int:
    """How many numbers a tree of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def adapted_width(cfg: DecoderConfig, adapter: Adapter) -> int:
    """How many numbers a token a block's adapter puts out.

    They are kept beside those of the projections: XLA adds the two where it uses the sum.
    """
    trained = plain_shapes(cfg, adapter)[0] if adapter.rank else {}
    modules = trained.get(LAYERS, {}).values()
    return sum(leaf["lora_b"].shape[-1] for module in modules for leaf in module.values())


# ----------------------------------------------------------------------- what a backward pass keeps

_VIEWS = (
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "broadcast_in_dim",
    "stop_gradient",
    "split",
)


def _result_buffers(jaxpr, inputs: list) -> list:
    """For each result of `jaxpr`, the buffer it lies in: (an object that stands for it, its bytes).

    inputs: the same for each argument. A view lies where its operand does.
    """
    buffers = dict(zip(jaxpr.invars, inputs, strict=True))
    nothing = object(), 0
    for eqn in jaxpr.eqns:
        operands = [
            nothing if isinstance(v, Literal) else buffers.get(v, nothing) for v in eqn.invars
        ]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if eqn.primitive.name == "pallas_call":
            inner = None  # what is in a kernel is no buffer
        if inner is not None:
            made = _result_buffers(getattr(inner, "jaxpr", inner), operands)
            if eqn.primitive.name == "scan":
                made = _stacked(made, getattr(inner, "jaxpr", inner).outvars, eqn.outvars)
        elif eqn.primitive.name in _VIEWS:
            made = operands[:1] * len(eqn.outvars)
        else:
            made = [(object(), v.aval.size * v.aval.dtype.itemsize) for v in eqn.outvars]
        buffers.update(zip(eqn.outvars, made, strict=True))
    return [
        buffers.get(v, nothing) if not isinstance(v, Literal) else nothing for v in jaxpr.outvars
    ]


def _stacked(made: list, of_pass: Sequence, results: Sequence) -> list:
    """The buffers of a scan's results, from those of one pass: what passes leave lies stacked.

    A result that is carried has the shape that a pass gives it; a stack has one axis more.
    """
    stacks = {buffer: object() for buffer, _ in made}
    return [
        (buffer, size)
        if v.aval.ndim == one.aval.ndim
        else (stacks[buffer], v.aval.size * v.aval.dtype.itemsize)
        for (buffer, size), one, v in zip(made, of_pass, results, strict=True)
    ]


def _residual_bytes(cfg: DecoderConfig, adapter: Adapter, L: int, T: int, layers: int) -> float:
    """`backward_bytes` of a whole model of so many layers."""
    ROWS = 2
    small = dataclasses.replace(cfg, num_layers=layers, vocab_size=8)
    trained, frozen = model_shapes(small, adapter, cfg.dtype)
    places = gradient.RESPONSES if T else 1
    tokens, real = jnp.zeros((ROWS, T or L), jnp.int32), jnp.ones((ROWS * places, L), bool)

    def residuals(trained: Params, frozen: Params | None, past):
        def hidden(trained: Params, past):
            whole, (last, prompt) = lora.join(frozen, trained), past
            if T:
                at = gradient.Columns(tokens, tokens, tokens > 0)  # as far as shapes go
                kv = last[:, None, None], prompt
                of_places = real.reshape(ROWS, places, L)
                return gradient.packed_hidden(whole, small, kv, of_places, tokens, at)
            return decoder.prefill(whole, small, tokens, real)

        return jax.vjp(hidden, trained, past)[1]

    prompts = jnp.zeros(real.shape, jnp.int32)
    past = jax.eval_shape(
        lambda p: decoder.prefill(p, small, prompts, real), lora.join(frozen, trained)
    )
    jaxpr = jax.make_jaxpr(residuals)(trained, frozen, past).jaxpr
    buffers = _result_buffers(jaxpr, [(object(), 0) for _ in jaxpr.invars])
    return sum(dict(buffers).values()) / ROWS  # each buffer once


@functools.cache
def backward_bytes(cfg: DecoderConfig, adapter: Adapter, L: int, T: int) -> tuple[float, float]:
    """(bytes of one block, bytes that come once) that a backward pass needs of its forward pass.

    Of one row of T tokens to prompts of L tokens, or, with T = 0, of one prompt. Parameters
    are not among them.
    """
    one, two = (_residual_bytes(cfg, adapter, L, T, layers) for layers in (1, 2))
    return two - one, max(one - (two - one), 0.0)
