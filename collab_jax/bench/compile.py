"""A run's programs, compiled at their full shape from shapes alone: no weights, no devices.

Three are compiled, as the run would have them: `update`, the policy-gradient update; `prefill`, the
prompts and the first tokens; `decode`, the columns of the last segment with a slot for every row,
which is the largest of the programs that sample. A compiler counts what each needs on a device,
and the memory plan stands beside it. TPUs are compiled for without one, by libtpu. Which tokens
end a response, call or fill a row changes no program's size, so no tokenizer is needed; a marker in
plain text is counted as one token.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.bench import rehearse
from collab_jax.models import decoder, hf, lora, sampler
from collab_jax.models.decision import Marker, opening
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.sampler import SamplerSettings, Samples
from collab_jax.rl import algorithms, experiment, memory_plan, memory_shapes, sampling, training
from collab_jax.rl.memory_plan import GIB
from collab_jax.rl.settings import check_config
from collab_jax.runtime import markdown, parallel, process
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.split import is_split

PAD, EOS, CALL = range(3)  # stand-ins for a tokenizer's


class Lowered(NamedTuple):
    """A program before XLA sees it."""

    name: str
    program: jax.stages.Lowered
    seconds: float  # to lower it, tracing included
    lines: int  # of StableHLO


class Compiled(NamedTuple):
    """A program as compiled. memory: jax's `CompiledMemoryStats`, bytes on a device."""

    lowered: Lowered
    seconds: float  # to compile it
    memory: Any


def lower(
    name: str,
    body: Callable,
    donate: tuple[int, ...],
    devices: Sequence[Any],
    arguments: Sequence[Any],
) -> Lowered:
    """Lowers the body of one device for `devices`; `arguments` are shapes with axis D."""
    started = time.perf_counter()
    program = parallel.pmap(body, donate, devices).lower(*arguments)
    seconds = time.perf_counter() - started
    return Lowered(name, program, seconds, program.as_text().count("\n"))


def compile_one(lowered: Lowered) -> Compiled:
    """Compiles a program. Raises UserError where the compiler finds that a device is too small."""
    started = time.perf_counter()
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{lowered.name} ({lowered.lines:,} lines of StableHLO) does not fit a device: "
            f"{used(str(error))}; `python -m collab_jax.memory` names settings that need less"
        ) from None
    return Compiled(lowered, time.perf_counter() - started, compiled.memory_analysis())


def used(message: str) -> str:
    """Returns the sentence of a compiler's message that says how much memory was used, or all."""
    one_line = " ".join(message.split())
    found = re.search(r"Used \S+ of \S+ \w+", one_line)
    return found[0] if found else one_line


# ------------------------------------------------------------------------------------------ shapes


def on_each(devices: int, tree: Any) -> Any:
    """Returns the shapes of a tree with axis D in front; a Split has it already."""

    def one(x: Any) -> Any:
        return x if is_split(x) else jax.ShapeDtypeStruct((devices, *x.shape), x.dtype)

    return jax.tree.map(one, tree, is_leaf=is_split)


def gathered(cfg: DecoderConfig, model: Any, cut: Any) -> Any:
    """Returns the shapes of a model that is gathered from `cut`, what devices have of it."""

    def one(x: Any, part: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, cfg.dtype if is_split(part) else x.dtype)

    return jax.tree.map(one, model, cut)


def state_shapes(cfg: DecoderConfig, config: ConfigDict) -> gapg.TrainState:
    """Returns the state before the first step, as shapes."""
    adapter = memory_shapes.Adapter(config.lora.rank, tuple(config.lora.targets))
    trained, frozen = memory_shapes.model_shapes(cfg, adapter, config.model.param_dtype)
    optimizer = experiment.make_optimizer(config)
    state = jax.eval_shape(functools.partial(experiment.first_state, config, optimizer), trained)
    return state.replace(frozen=frozen)


def rollout_shapes(config: ConfigDict, samples: Samples, prompts: Any, mask: Any) -> gapg.Rollout:
    """Returns the rollout that has these samples, as shapes; all have axis D."""
    # Annotated as Any: the fields of a Rollout are arrays.
    per_response: Any = jax.ShapeDtypeStruct(samples.ended.shape, jnp.bool_)  # [D, P, G]
    per_prompt: Any = jax.ShapeDtypeStruct(samples.ended.shape[:2], jnp.bool_)
    level: Any = jax.ShapeDtypeStruct(per_prompt.shape, jnp.int32)
    margin: Any = jax.ShapeDtypeStruct(samples.ended.shape, jnp.float32)
    scored = algorithms.scores_decisions(config)
    return gapg.Rollout(
        prompts=prompts,
        prompt_mask=mask,
        tokens=samples.tokens,
        logp=samples.logp,
        mask=samples.mask,
        correct=per_response,
        called=per_response,
        formatted=per_response,
        cloud_correct=per_prompt,
        cloud_known=per_prompt,
        barred=samples.tokens if scored else None,
        margin=margin if scored else None,
        hidden=samples.hidden,
        level=level if len(config.task.budgets) else None,
    )


def sampler_settings(cfg: DecoderConfig, config: ConfigDict) -> SamplerSettings:
    """Returns how training samples, with the tokens that stand in for a tokenizer's."""
    return sampling.sampler_settings(
        config,
        eos_ids=(EOS,),
        pad_id=PAD,
        marker=Marker(CALL, opening(["."] * cfg.vocab_size)),
        group=config.group,
        temperature=config.temperature,
        keep_hidden=algorithms.decision_alone(config),
    )


# ---------------------------------------------------------------------------------------- programs


def lower_run(cfg: DecoderConfig, config: ConfigDict, devices: Sequence[Any]) -> list[Lowered]:
    """Lowers the update, the prefill and the decoding of a run for its devices.

    Where parameters are divided, what gathers them for sampling comes second.
    """
    D, L = len(devices), config.prompt_length
    array = jax.ShapeDtypeStruct
    prompts = array((D, config.prompts_per_step // D, L), jnp.int32)
    mask, number = array(prompts.shape, jnp.bool_), array((D,), jnp.int32)
    bias = array((D,), jnp.float32)
    settings, whole = sampler_settings(cfg, config), state_shapes(cfg, config)
    cut = jax.eval_shape(lambda state: experiment.cut_state(config, state, D), whole)
    state, model = (
        on_each(D, cut),
        on_each(D, gathered(cfg, whole.sampling_model, cut.sampling_model)),
    )

    gather = lower("gather", lambda p: decoder.whole(p, cfg), (), devices, (state.sampling_model,))
    prefill = lower(
        "prefill",
        sampling.begin_body(cfg, settings),
        (),
        devices,
        (model, prompts, mask, number, number, bias),
    )
    context, sampled = jax.tree.map(lambda x: array(x.shape, x.dtype), prefill.program.out_info)
    context = context.replace(past=(sampled.open,) * (settings.filled_segments - 1))
    decode = lower(
        "decode",
        sampler.advance_body(cfg, settings),
        (2,),
        devices,
        (model, context, sampled, number, bias),
    )
    update = lower(
        "update",
        training.update_body(cfg, experiment.make_optimizer(config), config),
        (0,),
        devices,
        (state, rollout_shapes(config, sampled.samples, prompts, mask)),
    )
    return [update, *([gather] if config.train.sharded else []), prefill, decode]


def compile_programs(config: ConfigDict, topology: str | None, layers: int | None) -> str:
    """Compiles a run's programs and returns a page with their sizes, against the memory plan.

    topology: TPU chips by name; None: the devices that are there. layers: blocks, instead of all
    that the model has. Raises UserError for what cannot be compiled, with what to change.
    """
    if topology is not None:
        process.without_accelerator()
    process.set_up(config.cpu_devices)
    jax.config.update("jax_enable_compilation_cache", False)  # else a second start shows no time
    devices = jax.local_devices() if topology is None else parallel.tpu_topology(topology)
    check_config(config, len(devices))
    architecture = rehearse.architecture_of(config, layers)
    cfg = hf.config_from_hf(architecture, config.model.dtype, config.train.remat)
    cfg = lora.configure(cfg, config.lora, CALL)
    cfg = dataclasses.replace(cfg, platform=devices[0].platform)
    plan = memory_plan.plan(cfg, config, len(devices), devices[0].platform == "cpu")
    chips = f"{len(devices)} x {devices[0].device_kind}"
    programs = [compile_one(lowered) for lowered in lower_run(cfg, config, devices)]
    return (
        f"{config.model.path}: {cfg.num_layers} blocks, for {chips}\n"
        f"jax {jax.__version__}, compiled on {process.machine()['processor']}\n\n"
        f"{table(programs, plan)}"
    )


SIZES = ("arguments", "temporaries", "outputs", "aliased", "in all", "planned")


def table(programs: Sequence[Compiled], plan: memory_plan.Plan) -> str:
    """Returns the programs as a Markdown table; memory is on a device, in GiB, or in MiB.

    Aliased are outputs in the place of arguments. The plan of the update is of what training holds
    and what an update adds; that of the others, of the model and the most that sampling adds. Where
    the model has been gathered, its parts are held too, which is not among what these two take.
    """
    gathered = any(p.lowered.name == "gather" for p in programs)
    model, sampling = plan.held["parameters"], sum(plan.sampling.values())
    planned = {
        "update": sum(plan.held.values()) + sum(plan.update.values()),
        "gather": model + sampling,
    }
    others = sampling if gathered else model + sampling
    sizes = [(*used_bytes(p.memory), planned.get(p.lowered.name, others)) for p in programs]
    unit, size = ("GiB", GIB) if max(map(max, sizes)) >= GIB else ("MiB", 2**20)
    head = ("program", "lower s", "compile s", "lines of StableHLO")
    rows = [
        (
            p.lowered.name,
            f"{p.lowered.seconds:.1f}",
            f"{p.seconds:.1f}",
            f"{p.lowered.lines:,}",
            *(f"{b / size:.2f}" for b in row),
        )
        for p, row in zip(programs, sizes, strict=True)
    ]
    return markdown.table((*head, *(f"{name} {unit}" for name in SIZES)), rows)


def used_bytes(memory: Any) -> tuple[int, ...]:
    """Returns the bytes on a device: all of SIZES but what is planned."""
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs, aliased = memory.output_size_in_bytes, memory.alias_size_in_bytes
    return arguments, temporaries, outputs, aliased, arguments + temporaries + outputs - aliased
