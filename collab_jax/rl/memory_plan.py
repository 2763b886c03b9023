"""The memory plan of a run: bytes on a device and on its host, estimated from the config alone.

Counted are, on one device: what is held throughout (parameters, what is frozen, optimizer, average)
and then the larger of an update (gradients, what one micro-batch keeps for its backward pass, its
logits) and of sampling (KV cache, logits), which do not overlap. `memory_shapes.py` counts what
depends on the model's shapes alone.

Against the compiler's own count, on a CPU, the estimate is right within 15 % (tests), whose
compiler makes nothing of narrow activations and remat. An allocator needs some room beside.

On the host are the process itself, its compiled programs, and copies of what the devices hold. The
constants of these were measured on a CPU, with the embedded model and three blocks of SmolLM2; a
test compares the plan of a warm start with the largest resident set of its process. What the
compiler needs while it works is not counted: at a first start, 0.4 GiB or more beside what is held.
`memory_check.py` compares a plan with the memory that there is.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax.models.blocks import LAYERS
from collab_jax.models.decoder import DecoderConfig
from collab_jax.rl import algorithms, gradient, packing
from collab_jax.rl.memory_shapes import (
    Adapter,
    adapted_width,
    backward_bytes,
    count,
    plain_shapes,
)
from collab_jax.runtime import hosts

GIB = 2**30
PURPOSES = ("parameters", "optimizer", "average", "gradients", "activations", "logits", "cache")
PROCESS = 0.5 * GIB  # Python, the libraries, a tokenizer of a large vocabulary
PROGRAM = 10 * 2**20  # what a compiled program keeps, whatever is in it
BLOCK = 1.5 * 2**20  # and beside for each forward pass of a block: its trace and machine code
BACKWARD = 3  # a block's forward and backward pass, in forward passes

Bytes = dict[str, float]  # by purpose


class Plan(NamedTuple):
    """Bytes by purpose."""

    held: Bytes  # on one device, throughout
    update: Bytes  # besides, in an update
    sampling: Bytes  # or while it samples
    host: Bytes  # on the host, beside what host devices hold

    @property
    def on_device(self) -> float:
        """The most bytes that one device needs at any time."""
        return sum(self.held.values()) + max(sum(self.update.values()), sum(self.sampling.values()))

    @property
    def on_host(self) -> float:
        """The most bytes that the process needs on its host, host devices apart."""
        return sum(self.host.values())


class Work(NamedTuple):
    """What is planned: how, and the config's key of the rows of a backward pass."""

    plan: Callable[[DecoderConfig, ConfigDict, int, bool], Plan]
    micro_rows: str


# ----------------------------------------------------------------------------------------- the plan


class Weights(NamedTuple):
    """The parameters of a run."""

    adapter: Adapter
    trained: int  # how many numbers are trained
    param: int  # bytes of a trained one
    held: Bytes  # on one device
    cast: int  # bytes of all again, in the computation's type, where that is another
    again: int  # bytes of what sampling holds twice: `cast`, or on a CPU the blocks, taken apart
    shards: int  # over how many devices they are divided
    gathered: float  # bytes that an update gathers of divided ones at once, with gradients
    whole: int  # and those that sampling gathers


def _weights(
    stored: DecoderConfig,
    cfg: DecoderConfig,
    config: ConfigDict,
    devices: int,
    average: bool,
    cpu: bool,
) -> Weights:
    """The parameters of a run that has them as `stored` and computes with `cfg`."""
    adapter = Adapter(config.lora.rank, tuple(config.lora.targets))
    trained, frozen = (count(tree) for tree in plain_shapes(cfg, adapter))
    compute, kept = jnp.dtype(cfg.dtype).itemsize, jnp.dtype(stored.dtype).itemsize
    param = jnp.dtype(config.model.param_dtype).itemsize
    shards = devices * hosts.count() if config.train.sharded else 1
    held: Bytes = {
        "parameters": (trained * param + frozen * kept) / shards,
        # Two f32 moments; or the first, and what rounding owes, in bf16.
        "optimizer": 8 * trained / shards,
        "average": 4 * trained / shards if average else 0,
    }
    cast = compute * (trained * (compute != param) + frozen * (compute != kept))
    layers = sum(count(tree.get(LAYERS)) for tree in plain_shapes(cfg, adapter) if tree)
    again = cast or (compute * layers if cpu else 0)
    gathered, whole = 0.0, 0
    if shards > 1:
        # All but the blocks, and one of these: as they lie and turned, a gradient of each use, and
        # their sum in f32.
        at_once = trained + frozen - layers + layers / cfg.num_layers
        gathered = at_once * (2 * compute + (0 if frozen else 2 * compute + 4))
        # And the parts of all in the computation's type, made once before they are gathered.
        gathered += cast / shards
        whole, cast, again = compute * (trained + frozen), 0, 0
    return Weights(adapter, trained, param, held, cast, again, shards, gathered, whole)


def _as_compiled(cfg: DecoderConfig, cpu: bool) -> DecoderConfig:
    """The model as XLA compiles it.

    For a CPU bfloat16 is widened to float32, and a block that was to be computed again (remat) is
    kept after all.
    """
    return dataclasses.replace(cfg, dtype="float32", remat=False) if cpu else cfg


def plan(cfg: DecoderConfig, config: ConfigDict, devices: int, cpu: bool = False) -> Plan:
    """The plan of training by `config` with the model `cfg` on so many devices, of a CPU or not.

    devices: of this host. Prompts are split over those of all hosts, and so is what
    `config.train.sharded` divides; all else is on each of them.
    """
    stored, cfg = cfg, _as_compiled(cfg, cpu)
    weights = _weights(stored, cfg, config, devices, config.optim.average > 0, cpu)
    adapter, trained, param, cast = weights.adapter, weights.trained, weights.param, weights.cast
    prompts = -(-config.prompts_per_step // (devices * hosts.count()))
    m, T = config.train.micro_rows, config.max_new_tokens
    update: Bytes = {
        "parameters": weights.gathered,
        "gradients": trained * (4 + param) / weights.shards,  # their sum, and a micro-batch's own
    }
    # The update passes through the prompts, then back through the responses and through them; or
    # it is of a row of the head, and computes nothing again.
    updating = 0 if algorithms.decision_alone(config) else 1 + 2 * BACKWARD
    if updating:
        update["activations"] = _update_activations(cfg, config, adapter, prompts) + cast
        update["logits"] = _logits(cfg, config, m, T, cpu)
    sampled = _sampling(cfg, config, prompts, config.group, config.decode.slot_counts)
    batch = -(-config.eval.batch_size // (devices * hosts.count())) if config.eval.prompts else 0
    evaluated = _sampling(cfg, config, batch, 1, 1)
    # The averaged parameters, in the others' type.
    evaluated["parameters"] = trained * param / weights.shards if config.optim.average else 0
    sampling = max(sampled, evaluated, key=lambda sizes: sum(sizes.values()))
    sampling["activations"] += weights.again
    sampling["parameters"] = sampling.get("parameters", 0) + weights.whole
    evaluating = 1 + config.decode.segments if config.eval.prompts else 0
    programs = _sampling_programs(config) + evaluating
    compiled = _compiled(cfg, programs + 1, programs + updating, cpu)
    # Whole ones, while they are loaded or saved.
    copies = 0 if cpu and weights.shards == 1 else weights.shards * sum(weights.held.values())
    host = {"process": PROCESS, "programs": compiled, "copies": copies}
    return Plan(weights.held, update, sampling, host)


def plan_warm_start(
    cfg: DecoderConfig, config: ConfigDict, devices: int, cpu: bool = False
) -> Plan:
    """As `plan`, of the warm start: tuning on packed rows, and trying what was tuned."""
    stored, cfg = cfg, _as_compiled(cfg, cpu)
    weights = _weights(stored, cfg, config, devices, average=False, cpu=cpu)
    S, taught = packing.columns(config), packing.taught_tokens(config)
    m = config.sft.micro_rows
    update: Bytes = {
        "parameters": weights.gathered,
        "gradients": weights.trained * (4 + weights.param) / weights.shards,
        "activations": m * _row_activations(cfg, weights.adapter, S, 0) + weights.cast,
        "logits": _logits(cfg, config, m, taught, cpu),
    }
    prompts = -(-config.prompts_per_step // (devices * hosts.count()))
    sampling = _sampling(cfg, config, prompts, config.group, config.decode.slot_counts)
    sampling["activations"] += weights.again
    sampling["parameters"] = weights.whole
    programs = _sampling_programs(config)
    compiled = _compiled(cfg, programs + 1, programs + BACKWARD, cpu)
    # What each tuning starts from stays on the host.
    held = weights.shards * sum(weights.held.values())
    copies = weights.trained * weights.param if cpu else held
    host = {"process": PROCESS, "programs": compiled, "copies": copies}
    return Plan(weights.held, update, sampling, host)


TRAINING = Work(plan, "train.micro_rows")
WARM_START = Work(plan_warm_start, "sft.micro_rows")


def _logits(cfg: DecoderConfig, config: ConfigDict, m: int, T: int, cpu: bool) -> int:
    """Bytes of the logits of m rows of T tokens in an update: those of a chunk, and its gradients.

    Chunks outside a loop (`logprobs.token_logprobs`) are all kept by the compiler for a CPU.
    """
    chunk = min(config.train.logprob_chunk, T)
    kept = T if cpu and T < 2 * chunk else chunk
    return 4 * m * cfg.vocab_size * (kept + chunk)


def _compiled(cfg: DecoderConfig, programs: int, passes: int, cpu: bool) -> float:
    """Bytes of so many programs, in which there are so many forward passes of the model.

    But for a CPU a program has its blocks once, in a loop.
    """
    return PROGRAM * programs + BLOCK * (cfg.num_layers if cpu else 1) * passes


def _sampling_programs(config: ConfigDict) -> int:
    """How many programs sample: one begins, and each number of slots and segments has one."""
    return 1 + config.decode.segments * config.decode.slot_counts


def _token_kv(cfg: DecoderConfig) -> int:
    """How many numbers the keys and values of one token are, in all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim


def _row_activations(cfg: DecoderConfig, adapter: Adapter, L: int, T: int) -> float:
    """Bytes that the backward pass of a row of T tokens needs, or, with T = 0, of a prompt of L."""
    block, once = backward_bytes(cfg, adapter, L, T)
    # What a block keeps, where it is computed again for its backward pass.
    again = 0.0
    if cfg.remat:
        again, _ = backward_bytes(dataclasses.replace(cfg, remat=False), adapter, L, T)
    # Of a token: what adapters put out, and the gradients of the block that is differentiated.
    compute = jnp.dtype(cfg.dtype).itemsize
    beside = compute * adapted_width(cfg, adapter) * (1 if cfg.remat else cfg.num_layers)
    gradients = compute * (4 * cfg.hidden_size + 2 * cfg.intermediate_size) + beside
    # The last block of a prompt is computed for one token, beside its keys and values.
    layers = cfg.num_layers if T else cfg.num_layers - 1
    return layers * block + once + again + (T or L) * gradients


def _update_activations(
    cfg: DecoderConfig, config: ConfigDict, adapter: Adapter, prompts: int
) -> float:
    """Bytes of the activations of an update: of a micro-batch, and the prompts' keys and values."""
    L, T, compute = config.prompt_length, config.max_new_tokens, jnp.dtype(cfg.dtype).itemsize
    m = config.train.micro_rows
    # With the keys and values of their prompts, and the gradients of these.
    places = m * gradient.RESPONSES
    of_responses = m * _row_activations(cfg, adapter, L, T)
    of_responses += 2 * places * L * _token_kv(cfg) * compute
    of_prompts = min(prompts, m) * _row_activations(cfg, adapter, L, 0)
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
