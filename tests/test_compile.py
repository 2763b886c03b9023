"""The programs that are compiled from shapes are those of a run, for devices there or not."""

import dataclasses
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import gapg
from collab_jax.bench import compile
from collab_jax.models import decoder, hf, lora
from collab_jax.rl import experiment, memory_plan, rollout, training
from collab_jax.runtime import parallel, process
from collab_jax.runtime.errors import UserError

FEW = {
    "prompts_per_step": 2,
    "group": 2,
    "max_new_tokens": 9,
    "eval__batch_size": 2,
    "routers__batch_size": 2,
}


def decoder_of(config, layers=1):
    architecture = compile.rehearse.architecture_of(config, layers)
    cfg = hf.config_from_hf(architecture, config.model.dtype, config.train.remat)
    return lora.configure(cfg, config.lora, compile.CALL)


def of(tree):
    return jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), tree)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_state_has_the_shapes_of_a_runs(small, tmp_path, rank):
    config = small(lora__rank=rank, optim__average=0.5, model__param_dtype="bfloat16")
    run = experiment.prepare(config, tmp_path)
    assert of(compile.state_shapes(run.cfg, run.config)) == of(experiment.load_state(run))


def test_the_rollout_has_the_shapes_of_a_runs_and_more_where_the_config_asks_for_it(small):
    config = small(**FEW)
    D, P, G, T = 1, 2, 2, 9
    samples = types.SimpleNamespace(
        tokens=jax.ShapeDtypeStruct((D, P, G, T), jnp.int32),
        logp=jax.ShapeDtypeStruct((D, P, G, T), jnp.float32),
        mask=jax.ShapeDtypeStruct((D, P, G, T), bool),
        ended=jax.ShapeDtypeStruct((D, P, G), bool),
        hidden=None,
    )
    prompts = jax.ShapeDtypeStruct((D, P, 16), jnp.int32)
    mask = jax.ShapeDtypeStruct((D, P, 16), bool)
    plain = compile.rollout_shapes(config, samples, prompts, mask)
    assert plain.barred is None and plain.level is None
    real = gapg.Rollout(
        prompts=np.zeros((D, P, 16), np.int32),
        prompt_mask=np.zeros((D, P, 16), bool),
        tokens=np.zeros((D, P, G, T), np.int32),
        logp=np.zeros((D, P, G, T), np.float32),
        mask=np.zeros((D, P, G, T), bool),
        correct=np.zeros((D, P, G), bool),
        called=np.zeros((D, P, G), bool),
        formatted=np.zeros((D, P, G), bool),
        cloud_correct=np.zeros((D, P), bool),
        cloud_known=np.zeros((D, P), bool),
    )
    assert of(plain) == of(real)
    config = small(**FEW, algorithm__decision="scored", task__budgets=(0.1, 0.3))
    more = compile.rollout_shapes(config, samples, prompts, mask)
    assert of(more.barred) == of(real.tokens) and of(more.level)[0] == (D, P)
    assert of(more.margin) == ((D, P, G), np.float32) and more.hidden is None
    samples.hidden = jax.ShapeDtypeStruct((D, P, G, 8), jnp.float32)
    assert compile.rollout_shapes(config, samples, prompts, mask).hidden is samples.hidden


def test_a_program_is_measured_by_hand_numbers():
    def body(x, y):
        return x + y, jnp.zeros(3)

    shapes = (jax.ShapeDtypeStruct((2, 1000), jnp.float32),) * 2
    lowered = compile.lower("sum", body, (0,), jax.local_devices(), shapes)
    assert lowered.program.out_info[0].shape == (2, 1000) and lowered.lines > 3
    memory = compile.compile_one(lowered).memory
    # A device has 1,000 numbers of each argument; the sum lies where the first one did.
    arguments, temporaries, outputs, aliased, needed = compile.used_bytes(memory)
    assert (arguments, aliased) == (8000, 4000) and 4012 <= outputs <= 4100
    assert needed == arguments + temporaries + outputs - aliased


def test_the_table_adds_up_and_sets_the_plan_beside_it():
    plan = memory_plan.Plan({"parameters": 2**30, "optimizer": 2**31}, {"a": 1}, {"b": 2**29}, {})
    memory = types.SimpleNamespace(
        argument_size_in_bytes=3 * 2**30,
        temp_size_in_bytes=2**29,
        output_size_in_bytes=2**30,
        alias_size_in_bytes=2**30,
    )
    programs = [
        compile.Compiled(compile.Lowered(name, None, 1.25, 1234), 10.04, memory)
        for name in ("update", "decode")
    ]
    head, _, update, decode = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in compile.table(programs, plan).splitlines()
    )
    assert head[:4] == ["program", "lower s", "compile s", "lines of StableHLO"]
    names = ("arguments", "temporaries", "outputs", "aliased", "in all", "planned")
    assert head[4:] == [f"{name} GiB" for name in names]
    sizes = ["3.00", "0.50", "1.00", "1.00", "3.50"]
    assert update == ["update", "1.2", "10.0", "1,234", *sizes, "3.00"]
    assert decode[4:] == [*sizes, "1.50"]


def test_a_program_that_does_not_fit_is_one_line():
    class Full:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
                "space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal"
            )

    says = "update .1,234 lines of StableHLO. does not fit a device: Used 20.10G of 15.75G hbm;"
    with pytest.raises(UserError, match=says) as error:
        compile.compile_one(compile.Lowered("update", Full(), 0.0, 1234))
    assert "\n" not in str(error.value)


def test_what_cannot_be_compiled_is_refused(small, monkeypatch):
    from collab_jax.bench import __main__ as bench

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='pip install "jax.tpu.", or this package with its extra'):
        parallel.tpu_topology("v5e:2x4")
    monkeypatch.setattr(process, "set_up", lambda devices: None)
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    command = ["compile", "--config", "configs/countdown_tiny.py"]
    for wrong, says in (
        (["--config.prompts_per_step=3"], "prompts_per_step=3 must be a positive multiple of the"),
        (["--layers", "9"], "--layers=9 must lie in 1 to 4"),
        (["--config.group=1"], "config.group=1 must be at least 2"),
    ):
        with pytest.raises(UserError, match=says):
            bench.main([*command, *wrong])


def test_no_program_grows_with_the_number_of_blocks(small):
    def lines(layers):
        cfg = dataclasses.replace(decoder_of(config, layers), platform="gpu")
        programs = compile.lower_run(cfg, config, jax.local_devices())
        return {program.name: program.lines for program in programs}

    config = small(**FEW)
    assert lines(3) == lines(4)


@pytest.mark.slow
def test_divided_parameters_are_gathered_by_a_program_of_their_own(small):
    config = small(train__sharded=True, **FEW)
    cfg = decoder_of(config, 2)
    _, gather, prefill, _ = compile.lower_run(cfg, config, jax.local_devices())
    assert gather.name == "gather"
    whole = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(gather.program.out_info)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(whole)]
    taken = jax.tree.leaves(prefill.program.args_info[0][0])
    assert [leaf.shape[1:] for leaf in taken] == shapes


@pytest.mark.slow
def test_the_update_is_that_of_a_run(small, tmp_path):
    run = experiment.prepare(small(**FEW), tmp_path)
    update, prefill, decode = compile.lower_run(run.cfg, run.config, jax.local_devices())
    assert [update.name, prefill.name, decode.name] == ["update", "prefill", "decode"]
    sampler = rollout.make_sampler(run.cfg, run.text, run.config, group=2, temperature=1.0)
    state = parallel.replicate(experiment.load_state(run))
    prompts, mask = np.zeros((2, 16), np.int32), np.ones((2, 16), bool)
    samples = rollout.draw(sampler, state.sampling_model, prompts, mask, seed=0, step=0)
    shapes = compile.rollout_shapes(run.config, samples, *parallel.shard((prompts, mask), 2))
    body = training.update_body(run.cfg, run.optimizer, run.config)
    own = parallel.pmap(body, (0,)).lower(state, shapes)
    assert own.as_text() == update.program.as_text()


@pytest.mark.slow
def test_the_command_compiles_for_the_devices_that_are_there(tmp_path):
    settings = [f"--config.{key.replace('__', '.')}={value}" for key, value in FEW.items()]
    command = "-m collab_jax.bench compile --config configs/countdown_tiny.py --layers 1"
    done = subprocess.run(
        [sys.executable, *command.split(), *settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, update, prefill, decode = done.stdout.splitlines()
    assert first == "countdown-tiny: 1 blocks, for 2 x cpu"
    for line, name in ((update, "update"), (prefill, "prefill"), (decode, "decode")):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[0] == name and len(cells) == 10
        assert all(float(cell.replace(",", "")) >= 0 for cell in cells[1:])
        assert float(cells[8]) > 0 and float(cells[9]) > 0


@pytest.fixture
def one_chip(monkeypatch):
    """A v5e chip to compile for; without libtpu the test is skipped."""
    for name in process.TPU_COMPILER:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    process.without_accelerator()
    try:
        return parallel.tpu_topology("v5e:1x1")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_decoding_of_the_tiny_model_compiles_for_a_tpu(small, one_chip):
    with pytest.raises(UserError, match="'v5e' is no TPU slice"):
        parallel.tpu_topology("v5e")
    config = small()
    _, _, decode = compile.lower_run(decoder_of(config), config, one_chip)
    memory = compile.compile_one(decode).memory
    assert memory.argument_size_in_bytes > memory.alias_size_in_bytes > 0
