"""The memory plan of a run: bytes on one device, estimated from the config before anything is made.

Counted are, on one device: what is held throughout (parameters, what is frozen, optimizer, average)
and then the larger of an update (gradients, what one micro-batch keeps for its backward pass, its
logits) and of sampling (KV cache, logits), which do not overlap. What a backward pass keeps is not
written down here: jax traces one block and says so, whatever the block is.

Against the compiler's own count, on a CPU, the estimate is right within 15 % (tests). A CPU's
compiler makes nothing of narrow activations, remat and chunks of logits, so these could not be
checked in this way. An allocator needs some room beside.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

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

Bytes = dict[str, float]  # by purpose
# Overrides of the config by flat key, "train.micro_rows"; "devices" is the number of devices.
Changes = dict[str, Any]


class Plan(NamedTuple):
    """Bytes on one device, by purpose."""

    held: Bytes  # throughout
    update: Bytes  # besides, in an update
    sampling: Bytes  # or while it samples

    @property
    def total(self) -> float:
        """The most bytes that are needed at any time."""
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.sampling.values()))


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


def _plain_shapes(cfg: DecoderConfig, adapter: Adapter) -> tuple[Params, Params | None]:
    """`model_shapes` for counting: traced once for all configs that differ only in other things."""
    plain = dataclasses.replace(cfg, dtype="float32", remat=False, lora_scale=1.0)
    return model_shapes(plain, adapter, "float32")


def _count(tree: Params | None) -> int:
    """How many numbers a tree of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _adapted_width(cfg: DecoderConfig, adapter: Adapter) -> int:
    """How many numbers a token a block's adapter puts out.

    They are kept beside those of the projections: XLA adds the two where it uses the sum.
    """
    trained = _plain_shapes(cfg, adapter)[0] if adapter.rank else {}
    modules = trained.get("layers_0", {}).values()
    return sum(leaf["lora_b"].shape[1] for module in modules for leaf in module.values())


# ----------------------------------------------------------------------- what a backward pass keeps

_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "stop_gradient")


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
        if inner is not None:
            made = _result_buffers(getattr(inner, "jaxpr", inner), operands)
        elif eqn.primitive.name in _VIEWS:
            made = operands[:1]
        else:
            made = [(object(), v.aval.size * v.aval.dtype.itemsize) for v in eqn.outvars]
        buffers.update(zip(eqn.outvars, made, strict=True))
    return [
        buffers.get(v, nothing) if not isinstance(v, Literal) else nothing for v in jaxpr.outvars
    ]


def _residual_bytes(cfg: DecoderConfig, adapter: Adapter, L: int, T: int, layers: int) -> float:
    """`backward_bytes` of a whole model of so many layers."""
    ROWS = 2
    small = dataclasses.replace(cfg, num_layers=layers, vocab_size=8)
    trained, frozen = model_shapes(small, adapter, cfg.dtype)
    tokens, real = jnp.zeros((ROWS, T or L), jnp.int32), jnp.ones((ROWS, L), bool)

    def residuals(trained: Params, frozen: Params | None, past):
        def hidden(trained: Params, past):
            whole, (last, prompt) = lora.join(frozen, trained), past
            if T:
                return logprobs.continued_hidden(whole, small, last, prompt, real, tokens)
            return decoder.prefill(whole, small, tokens, real)

        return jax.vjp(hidden, trained, past)[1]

    prompts = jnp.zeros((ROWS, L), jnp.int32)
    past = jax.eval_shape(
        lambda p: decoder.prefill(p, small, prompts, real), lora.join(frozen, trained)
    )
    jaxpr = jax.make_jaxpr(residuals)(trained, frozen, past).jaxpr
    buffers = _result_buffers(jaxpr, [(object(), 0) for _ in jaxpr.invars])
    return sum(dict(buffers).values()) / ROWS  # each buffer once


@functools.cache
def backward_bytes(cfg: DecoderConfig, adapter: Adapter, L: int, T: int) -> tuple[float, float]:
    """(bytes of one block, bytes that come once) that a backward pass needs of its forward pass.

    Of one response of T tokens to a prompt of L tokens, or, with T = 0, of that prompt. Parameters
    are not among them.
    """
    one, two = (_residual_bytes(cfg, adapter, L, T, layers) for layers in (1, 2))
    return two - one, max(one - (two - one), 0.0)


# ----------------------------------------------------------------------------------------- the plan


def plan(cfg: DecoderConfig, config: ConfigDict, devices: int, cpu: bool = False) -> Plan:
    """The plan of a run of `config` with the model `cfg` on so many devices.

    The prompts are split over the devices; all else is on each of them. cpu: as XLA compiles for a
    CPU, where bfloat16 is widened to float32, and what was to be computed again (a block under
    remat, a chunk of logits) is kept after all.
    """
    stored = jnp.dtype(cfg.dtype).itemsize  # of what is frozen
    if cpu:
        cfg = dataclasses.replace(cfg, dtype="float32", remat=False)
    adapter = Adapter(config.lora.rank, tuple(config.lora.targets))
    compute, param = jnp.dtype(cfg.dtype).itemsize, jnp.dtype(config.model.param_dtype).itemsize
    trained, frozen = (_count(tree) for tree in _plain_shapes(cfg, adapter))
    # Parameters again, in the computation's type.
    cast = compute * (trained * (compute != param) + frozen * (compute != stored))

    held: Bytes = {
        "parameters": trained * param + frozen * stored,
        "optimizer": 8 * trained,  # two f32 moments; or the first, and what rounding owes, in bf16
        "average": 4 * trained if config.optim.average else 0,
    }
    prompts = -(-config.prompts_per_step // devices)
    m, T = config.train.micro_rows, config.max_new_tokens
    chunk = min(config.train.logprob_chunk, T)
    update: Bytes = {
        "gradients": trained * (4 + param),  # their sum, and a micro-batch's own
        "activations": _update_activations(cfg, config, adapter, prompts) + cast,
        # One chunk's gradients are counted too.
        "logits": 4 * m * cfg.vocab_size * ((T if cpu else chunk) + chunk),
    }
    sampled = _sampling(cfg, config, prompts, config.group, config.decode.slot_counts)
    batch = -(-config.eval.batch_size // devices) if config.eval.prompts else 0
    evaluated = _sampling(cfg, config, batch, 1, 1)
    # The averaged parameters, in the others' type.
    evaluated["parameters"] = trained * param if config.optim.average else 0
    sampling = max(sampled, evaluated, key=lambda sizes: sum(sizes.values()))
    return Plan(held, update, sampling | {"activations": sampling["activations"] + cast})


def _token_kv(cfg: DecoderConfig) -> int:
    """How many numbers the keys and values of one token are, in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim


def _update_activations(
    cfg: DecoderConfig, config: ConfigDict, adapter: Adapter, prompts: int
) -> float:
    """Bytes of the activations of an update: of a micro-batch, and the prompts' keys and values."""
    L, T, compute = config.prompt_length, config.max_new_tokens, jnp.dtype(cfg.dtype).itemsize
    block, once = backward_bytes(cfg, adapter, L, T)
    prompt_block, prompt_once = backward_bytes(cfg, adapter, L, 0)
    # What a block keeps, where it is computed again for its backward pass.
    again = prompt_again = 0.0
    if cfg.remat:
        bare = dataclasses.replace(cfg, remat=False)
        again, _ = backward_bytes(bare, adapter, L, T)
        prompt_again, _ = backward_bytes(bare, adapter, L, 0)
    # Of a token: what adapters put out, and the gradients of the block that is differentiated.
    beside = compute * _adapted_width(cfg, adapter) * (1 if cfg.remat else cfg.num_layers)
    gradients = compute * (4 * cfg.hidden_size + 2 * cfg.intermediate_size) + beside
    m = config.train.micro_rows
    of_responses = m * (cfg.num_layers * block + once + again + T * gradients)
    # The last block of a prompt is computed for one token, beside its keys and values.
    of_prompts = min(prompts, m) * (
        (cfg.num_layers - 1) * prompt_block + prompt_once + prompt_again + L * gradients
    )
    # The prompts' keys and values, and the gradients of these in f32.
    return max(of_responses, of_prompts) + prompts * L * _token_kv(cfg) * (compute + 4)


def _sampling(
    cfg: DecoderConfig, config: ConfigDict, prompts: int, group: int, slot_counts: int
) -> Bytes:
    """Bytes of sampling so many prompts with `group` responses each, at its end.

    Beside the cache there is either the work of one column, or, where slots go away, a copy of half
    the cache.
    """
    L, T, slots = config.prompt_length, config.max_new_tokens, prompts * group
    compute = jnp.dtype(cfg.dtype).itemsize
    token = _token_kv(cfg) * jnp.dtype(config.decode.cache_dtype).itemsize
    # Logits themselves, scaled, without the marker's, the noise, and the sum.
    logits = 5 * 4 * slots * cfg.vocab_size
    activations = compute * slots * (4 * cfg.hidden_size + 3 * cfg.intermediate_size)
    copy = token * -(-slots // 2) * (L + T) if slot_counts > 1 else 0
    column = logits + activations
    return {
        "cache": token * (prompts * L + slots * T) + max(copy - column, 0),
        "logits": logits,
        "activations": activations,
    }


# ---------------------------------------------------------------------------- against what there is


def device_memory() -> float:
    """Bytes that one device may use: an accelerator's own, or a share of this machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = pathlib.Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        total = min(total, float(text))
    return total / jax.local_device_count()


def table(plan: Plan, devices: int, available: float) -> str:
    """The plan as a Markdown table, with its sum against the bytes available on a device.

    In GiB; a plan of less than 1 GiB in MiB.
    """
    unit, size = ("GiB", GIB) if plan.total >= GIB else ("MiB", 2**20)
    names = ("held", "in an update, besides", "or in sampling")
    rows = []
    for name, sizes in zip(names, (plan.held, plan.update, plan.sampling), strict=True):
        cells = [f"{sizes[p] / size:.1f}" if sizes.get(p) else "" for p in PURPOSES]
        rows.append((name, *cells, f"{sum(sizes.values()) / size:.1f}"))
    head = (f"{unit} on each of {devices} device{'s' * (devices > 1)}", *PURPOSES, "sum")
    at_most = f"at most {plan.total / size:.1f} of {available / size:.1f} {unit}"
    return f"{markdown.table(head, rows)}\n{at_most}"


def smaller_settings(config: ConfigDict, devices: int) -> Iterator[Changes]:
    """Settings that need less memory: those that change fewest first, the mildest first."""
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


def changed(
    cfg: DecoderConfig, config: ConfigDict, changes: Changes
) -> tuple[DecoderConfig, ConfigDict]:
    """The model and the config under `changes`."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        {key: value for key, value in changes.items() if key != "devices"}
    )
    return dataclasses.replace(cfg, remat=config.train.remat), config


def settings_that_fit(
    cfg: DecoderConfig, config: ConfigDict, devices: int, available: float, cpu: bool = False
) -> Changes | None:
    """The first of `smaller_settings` with which the run fits the bytes available, or None."""
    for changes in smaller_settings(config, devices):
        smaller_cfg, smaller = changed(cfg, config, changes)
        if plan(smaller_cfg, smaller, changes.get("devices", devices), cpu).total <= available:
            return changes
    return None


def check_fits_here(cfg: DecoderConfig, config: ConfigDict) -> str:
    """`check_fits` for the devices of this process."""
    cpu = jax.default_backend() == "cpu"
    return check_fits(cfg, config, jax.local_device_count(), device_memory(), cpu)


def check_fits(
    cfg: DecoderConfig, config: ConfigDict, devices: int, available: float, cpu: bool = False
) -> str:
    """The plan as text, for so many devices with so many bytes available on each.

    Raises UserError, with the plan and with settings that would fit, where it needs more.
    """
    needed = plan(cfg, config, devices, cpu)
    shown = table(needed, devices, available)
    if needed.total <= available:
        return shown
    changes = settings_that_fit(cfg, config, devices, available, cpu)
    if changes is None:
        advice = "no setting makes it fit: use a smaller model, group or max_new_tokens"
    else:
        flags = [f"--config.{key}={value}" for key, value in changes.items() if key != "devices"]
        more = [f"{changes['devices']} devices"] if "devices" in changes else []
        advice = f"it fits with {' and '.join(flags + more)}"
    raise UserError(
        f"this run needs about {needed.total / GIB:.3g} GiB on each of {devices} devices, "
        f"which have {available / GIB:.3g}: {advice}\n{shown}"
    )
