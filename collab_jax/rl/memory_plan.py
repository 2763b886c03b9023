"""The memory plan of a run, from its config."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from ml_collections import ConfigDict

from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.runtime import markdown
from collab_jax.runtime.errors import UserError

GIB = 2**30


PURPOSES = ("parameters", "optimizer", "average", "gradients", "activations", "logits", "cache")


class Plan(NamedTuple):
    """Bytes on one device, by purpose."""

    held: dict[str, float]  # throughout
    update: dict[str, float]  # beside that in an update
    sampling: dict[str, float]  # or while it samples

    @property
    def total(self) -> float:
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.sampling.values()))


_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "stop_gradient")


def _results(jaxpr, inputs: list) -> list:
    """For each result of `jaxpr` where its numbers lie: (an object of its own, bytes). A view lies
    where its operand does.
    """
    place = dict(zip(jaxpr.invars, inputs, strict=True))
    nothing = object(), 0
    for eqn in jaxpr.eqns:
        operands = [
            nothing if isinstance(v, Literal) else place.get(v, nothing) for v in eqn.invars
        ]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None:
            made = _results(getattr(inner, "jaxpr", inner), operands)
        elif eqn.primitive.name in _VIEWS:
            made = operands[:1]
        else:
            made = [(object(), v.aval.size * v.aval.dtype.itemsize) for v in eqn.outvars]
        place.update(zip(eqn.outvars, made, strict=True))
    return [place.get(v, nothing) if not isinstance(v, Literal) else nothing for v in jaxpr.outvars]


@functools.cache
def _model(
    cfg: DecoderConfig, rank: int, targets: tuple[str, ...], param_dtype: str
) -> tuple[Params, Params | None]:
    """(trained, frozen) parameters, as shapes."""

    def cast(tree, dtype):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)

    whole = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    if not rank:
        return cast(whole, param_dtype), None
    settings = ConfigDict({"rank": rank, "targets": targets})
    adapter = jax.eval_shape(lambda: lora.init(cfg, settings, jax.random.key(0), "float32"))
    return cast(adapter, param_dtype), cast(whole, cfg.dtype)


@functools.cache
def backward_bytes(
    cfg: DecoderConfig, rank: int, targets: tuple[str, ...], L: int, T: int
) -> tuple[float, float]:
    """Bytes that the backward pass needs of the forward pass of one response of T tokens, or with T
    = 0 of one prompt of L
    tokens: (one block's, what comes once). Parameters are not among them.
    """
    ROWS = 2

    def total(layers: int) -> float:
        small = dataclasses.replace(cfg, num_layers=layers, vocab_size=8)
        trained, frozen = _model(small, rank, targets, cfg.dtype)
        tokens, real = jnp.zeros((ROWS, T or L), jnp.int32), jnp.ones((ROWS, L), bool)

        def residuals(trained, frozen, past):
            def hidden(trained, past):
                whole = lora.join(frozen, trained)
                if T:
                    return logprobs.continued_hidden(whole, small, *past, real, tokens)
                return decoder.prefill(whole, small, tokens, real)

            return jax.vjp(hidden, trained, past)[1]

        whole = lora.join(frozen, trained)
        past = jax.eval_shape(
            lambda p: decoder.prefill(p, small, jnp.zeros((ROWS, L), jnp.int32), real), whole
        )
        jaxpr = jax.make_jaxpr(residuals)(trained, frozen, past).jaxpr
        places = _results(jaxpr, [(object(), 0) for _ in jaxpr.invars])
        return sum(dict(places).values()) / ROWS

    one, two = total(1), total(2)
    return two - one, max(one - (two - one), 0.0)


def plan(cfg: DecoderConfig, config: ConfigDict, devices: int, cpu: bool = False) -> Plan:
    """The plan of a run of `config` with the model `cfg`; its prompts are split over `devices`, all
    else is on each of them.

    cpu: as XLA compiles for a CPU, where bfloat16 is widened to float32, and what was to be
    computed again (a block under remat, a chunk of logits) is kept after all.
    """
    stored = jnp.dtype(cfg.dtype).itemsize  # of what is frozen
    if cpu:
        cfg = dataclasses.replace(cfg, dtype="float32", remat=False)
    L, T, G, V = config.prompt_length, config.max_new_tokens, config.group, cfg.vocab_size
    P = -(-config.prompts_per_step // devices)
    m, chunk = config.train.micro_rows, min(config.train.logprob_chunk, T)
    compute, param = jnp.dtype(cfg.dtype).itemsize, jnp.dtype(config.model.param_dtype).itemsize
    adapter = config.lora.rank, tuple(config.lora.targets)
    trained, frozen = (_count(tree) for tree in _model(_plain(cfg), *adapter, "float32"))
    # Parameters again, in the computation's type.
    cast = compute * (trained * (compute != param) + frozen * (compute != stored))

    held = {
        "parameters": trained * param + frozen * stored,
        "optimizer": 8 * trained,  # two f32 moments; or the first, and what rounding owes, in bf16
        "average": 4 * trained if config.optim.average else 0,
    }
    block, once = backward_bytes(cfg, *adapter, L, T)
    prompt_block, prompt_once = backward_bytes(cfg, *adapter, L, 0)
    again = prompt_again = (
        0.0  # what a block keeps, where it is computed again for its backward pass
    )
    if cfg.remat:
        bare = dataclasses.replace(cfg, remat=False)
        again, prompt_again = (
            backward_bytes(bare, *adapter, L, T)[0],
            backward_bytes(bare, *adapter, L, 0)[0],
        )
    E, F, kv = (
        cfg.hidden_size,
        cfg.intermediate_size,
        2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim,
    )
    beside = (
        compute * _adapted_width(cfg, *adapter) * (1 if cfg.remat else cfg.num_layers)
    )  # of a token
    gradients = (
        compute * (4 * E + 2 * F) + beside
    )  # of the block that is being differentiated, a token
    responses = m * (cfg.num_layers * block + once + again + T * gradients)
    # The last block of a prompt is computed for one token, beside its keys and values.
    prompts = min(P, m) * (
        (cfg.num_layers - 1) * prompt_block + prompt_once + prompt_again + L * gradients
    )
    update = {
        "gradients": trained * (4 + param),  # their sum, and a micro-batch's own
        "activations": max(responses, prompts)
        + cast
        + P * L * kv * (compute + 4),  # prompts' keys, values; their gradients
        "logits": 4 * m * V * ((T if cpu else chunk) + chunk),  # and one chunk's gradients
    }
    sampled = _sampling(cfg, config, P, G, config.decode.slot_counts)
    evaluated = _sampling(
        cfg, config, -(-config.eval.batch_size // devices) if config.eval.prompts else 0, 1, 1
    )
    evaluated["parameters"] = (
        trained * param if config.optim.average else 0
    )  # the averaged ones, in the others' type
    sampling = max(sampled, evaluated, key=lambda parts: sum(parts.values()))
    return Plan(held, update, sampling | {"activations": sampling["activations"] + cast})


def _sampling(
    cfg: DecoderConfig, config: ConfigDict, P: int, G: int, slot_counts: int
) -> dict[str, float]:
    """Of P prompts with G responses each, at its end: beside the cache either a column's work, or,
    where slots go, a copy.
    """
    L, T, slots, compute = (
        config.prompt_length,
        config.max_new_tokens,
        P * G,
        jnp.dtype(cfg.dtype).itemsize,
    )
    token = (
        2
        * cfg.num_layers
        * cfg.num_kv_heads
        * cfg.head_dim
        * jnp.dtype(config.decode.cache_dtype).itemsize
    )
    logits = (
        5 * 4 * slots * cfg.vocab_size
    )  # themselves, scaled, the marker's aside, noise, and the sum
    activations = compute * slots * (4 * cfg.hidden_size + 3 * cfg.intermediate_size)
    copy = token * -(-slots // 2) * (L + T) if slot_counts > 1 else 0
    column = logits + activations
    return {
        "cache": token * (P * L + slots * T) + max(copy - column, 0),
        "logits": logits,
        "activations": activations,
    }


def _adapted_width(cfg: DecoderConfig, rank: int, targets: tuple[str, ...]) -> int:
    """Numbers a token that a block's adapter puts out. They are kept beside those of the
    projections: XLA adds where it uses.
    """
    adapter = _model(_plain(cfg), rank, targets, "float32")[0] if rank else {}
    return sum(
        leaf["lora_b"].shape[1]
        for part in adapter.get("layers_0", {}).values()
        for leaf in part.values()
    )


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _plain(cfg: DecoderConfig) -> DecoderConfig:
    """What counts for the number of parameters."""
    return dataclasses.replace(cfg, dtype="float32", remat=False, lora_scale=1.0)


def limit() -> float:
    """Bytes that one device may use: an accelerator's own, or this machine's, shared by the host
    devices.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = pathlib.Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total / jax.local_device_count()


def table(parts: Plan, devices: int, have: float) -> str:
    """The plan as a Markdown table with its sum against what a device has; in GiB, or a small one
    in MiB.
    """
    unit, size, rows = ("GiB", GIB, []) if parts.total >= GIB else ("MiB", 2**20, [])
    for name, sizes in zip(("held", "in an update, besides", "or in sampling"), parts, strict=True):
        cells = [f"{sizes[p] / size:.1f}" if sizes.get(p) else "" for p in PURPOSES]
        rows.append((name, *cells, f"{sum(sizes.values()) / size:.1f}"))
    head = (f"{unit} on each of {devices} device{'s' * (devices > 1)}", *PURPOSES, "sum")
    return f"{markdown.table(head, rows)}\nat most {parts.total / size:.1f} of {have / size:.1f} {unit}"


def _choices(config: ConfigDict, devices: int) -> Iterator[dict[str, object]]:
    """Settings that need less, as overrides ("devices" among them): those that change fewest first,
    the mildest first.
    """
    rows = config.train.micro_rows
    options = {
        "train.micro_rows": [n for n in (rows // 2, rows // 4, 1) if 1 <= n < rows],
        "train.remat": [True],
        "train.logprob_chunk": [16],
        "decode.cache_dtype": ["bfloat16"],
        "model.param_dtype": ["bfloat16"],
        "lora.rank": [] if config.lora.rank else [16],
        "devices": [n * devices for n in (2, 4, 8) if config.prompts_per_step % (n * devices) == 0],
    }
    for count in range(1, len(options) + 1):
        for keys in itertools.combinations(options, count):
            for values in itertools.product(*(options[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def fitting(
    cfg: DecoderConfig, config: ConfigDict, devices: int, have: float, cpu: bool = False
) -> dict[str, object] | None:
    """The first of `_choices` under which the run fits `have` bytes on each device, or None."""
    for changes in _choices(config, devices):
        if plan(*changed(cfg, config, changes), changes.get("devices", devices), cpu).total <= have:
            return changes
    return None


def changed(
    cfg: DecoderConfig, config: ConfigDict, changes: dict[str, object]
) -> tuple[DecoderConfig, ConfigDict]:
    """The model and the config under one of `_choices`."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        {key: value for key, value in changes.items() if key != "devices"}
    )
    return dataclasses.replace(cfg, remat=config.train.remat), config


def check_here(cfg: DecoderConfig, config: ConfigDict) -> str:
    """`check` for this process's devices."""
    return check(cfg, config, jax.local_device_count(), limit(), jax.default_backend() == "cpu")


def check(
    cfg: DecoderConfig, config: ConfigDict, devices: int, have: float, cpu: bool = False
) -> str:
    """The plan as text. Raises UserError, with the plan and with settings that would fit, where it
    needs more than `have`.
    """
    parts = plan(cfg, config, devices, cpu)
    shown = table(parts, devices, have)
    if parts.total <= have:
        return shown
    changes = fitting(cfg, config, devices, have, cpu)
    advice = (
        "nothing that could be changed makes it fit: use a smaller model, group or max_new_tokens"
    )
    if changes:
        more = f"{changes.pop('devices')} devices" if "devices" in changes else ""
        named = [f"--config.{key}={value}" for key, value in changes.items()] + [more] * bool(more)
        advice = f"it fits with {' and '.join(named)}"
    raise UserError(
        f"this run needs about {parts.total / GIB:.3g} GiB on each of {devices} devices, which have {have / GIB:.3g}: {advice}\n"
        + shown
    )
