"""The estimate of memory against the compiler's own and a process's, and what does not fit."""

import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from collab_jax import gapg, train
from collab_jax.bench import compile as bench_compile
from collab_jax.bench import measure
from collab_jax.models import decision, hf, lora, published, sampler
from collab_jax.rl import (
    experiment,
    memory_check,
    memory_plan,
    memory_shapes,
    optim,
    sampling,
    step,
)
from collab_jax.rl.memory_check import Machine
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError

TINY = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 224,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = {
    "prompts_per_step": 8, "group": 4, "prompt_length": 24, "max_new_tokens": 57,
    "decode.segments": 2, "decode.slot_counts": 2, "train.logprob_chunk": 16,
    "eval.prompts": 0,
}  # fmt: skip
NO_ADAPTER = memory_shapes.Adapter(0, ())


def make(changes=(), **architecture):
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    config.update_from_flattened_dict(SIZES | dict(changes))
    cfg = hf.config_from_hf(TINY | architecture, config.model.dtype, config.train.remat)
    return lora.configure(cfg, config.lora, decision_id=None), config


def shapes(tree):
    return bench_compile.on_each(2, tree)


def trained_and_frozen(cfg, config):
    adapter = memory_shapes.Adapter(config.lora.rank, tuple(config.lora.targets))
    return memory_shapes.model_shapes(cfg, adapter, config.model.param_dtype)


def update_bytes(cfg, config) -> int:
    """What the compiler reserves on one of two devices for an update: arguments and temporaries."""
    optimizer = optim.make_optimizer(
        lambda _: 0.0, 0.0, optim.unit_norm(), config.model.param_dtype
    )
    params, frozen = trained_and_frozen(cfg, config)
    reward, prompts_kept = gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(0.3)
    averaged = config.optim.average > 0
    state = jax.eval_shape(
        lambda p: gapg.init_state(p, optimizer, reward, prompts_kept, averaged), params
    )
    body = step.make_step(
        cfg,
        optimizer,
        gapg.GAPG,
        axis=parallel.AXIS,
        micro_rows=config.train.micro_rows,
        temperature=1.0,
        chunk=config.train.logprob_chunk,
        average=config.optim.average,
    )
    P, G = config.prompts_per_step // 2, config.group
    L, T, array = config.prompt_length, config.max_new_tokens, jax.ShapeDtypeStruct
    batch = gapg.Rollout(
        prompts=array((P, L), jnp.int32),
        prompt_mask=array((P, L), bool),
        tokens=array((P, G, T), jnp.int32),
        logp=array((P, G, T), jnp.float32),
        mask=array((P, G, T), bool),
        correct=array((P, G), bool),
        called=array((P, G), bool),
        formatted=array((P, G), bool),
        cloud_correct=array((P,), bool),
        cloud_known=array((P,), bool),
    )
    update_step = parallel.pmap(
        lambda state, batch: body(state, batch, jax.random.key(0)), donate=(0,)
    )
    state = state.replace(frozen=frozen)
    cut = jax.eval_shape(lambda state: experiment.cut_state(config, state, 2), state)
    lowered = update_step.lower(shapes(cut), shapes(batch))
    used = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    return used.temp_size_in_bytes + used.argument_size_in_bytes


def sampling_bytes(cfg, config) -> int:
    """Likewise for the last columns of a response, or for the program that drops ended rows."""
    settings = sampler.SamplerSettings(
        group=config.group,
        max_new=config.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        eos_ids=(1,),
        pad_id=0,
        marker=decision.Marker(3, decision.opening(["."] * cfg.vocab_size)),
        segments=config.decode.segments,
        slot_counts=config.decode.slot_counts,
        cache_dtype=config.decode.cache_dtype,
    )
    P, L, array = config.prompts_per_step // 2, config.prompt_length, jax.ShapeDtypeStruct
    trained, frozen = trained_and_frozen(cfg, config)
    whole = lora.join(frozen, trained)
    keys = jax.eval_shape(lambda: sampling.prompt_keys(0, 0, jnp.arange(P)))
    context, state = jax.eval_shape(
        lambda *inputs: sampler.start(inputs[0], cfg, *inputs[1:], settings),
        whole,
        array((P, L), jnp.int32),
        array((P, L), bool),
        keys,
        array((), jnp.float32),
    )
    context = context.replace(
        past=(state.open,) * (-(-(settings.max_new - 1) // settings.columns) - 1)
    )
    options = {"xla_backend_optimization_level": 0}
    advance = jax.jit(lambda *a: sampler.advance(a[0], cfg, *a[1:], settings), donate_argnums=2)
    column = advance.lower(whole, context, state, array((), jnp.int32), array((), jnp.float32))
    column = column.compile(options).memory_analysis()
    fewer = jax.jit(lambda *a: sampler.compact(*a, settings.ladder(P * config.group)[-1]))
    fewer = fewer.lower(context, state).compile(options).memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
    return max(
        column.temp_size_in_bytes + column.argument_size_in_bytes,
        held + fewer.temp_size_in_bytes + fewer.argument_size_in_bytes + fewer.output_size_in_bytes,
    )


HALF = {"model.dtype": "bfloat16"}


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({"optim.average": 0.9}, {"num_hidden_layers": 1, "model_type": "qwen3", "head_dim": 24}),
        (
            {"max_new_tokens": 97, "train.micro_rows": 4},
            {"vocab_size": 6000, "tie_word_embeddings": False},
        ),
        ({"lora.rank": 4}, {}),
        ({"model.param_dtype": "bfloat16"} | HALF, {"num_hidden_layers": 1, "hidden_size": 128}),
        ({"train.sharded": True, "train.micro_rows": 2}, {"num_hidden_layers": 4}),
    ],
    ids=["qwen3-average", "large-vocabulary", "lora", "all-bf16", "divided"],
)
@pytest.mark.slow
def test_the_plan_of_an_update_is_what_the_compiler_reserves(changes, architecture):
    cfg, config = make(changes, **architecture)
    plan = memory_plan.plan(cfg, config, devices=2, cpu=True)
    real = update_bytes(cfg, config)
    assert (sum(plan.held.values()) + sum(plan.update.values())) / real == pytest.approx(
        1, abs=0.15
    )


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({}, {"num_hidden_layers": 4}),
        ({"decode.slot_counts": 1, "lora.rank": 4} | HALF, {"vocab_size": 6000}),
    ],
    ids=["cache", "logits"],
)
@pytest.mark.slow
def test_the_plan_of_sampling_is_what_the_compiler_reserves(changes, architecture):
    cfg, config = make(changes, **architecture)
    plan = memory_plan.plan(cfg, config, devices=2, cpu=True)
    real = sampling_bytes(cfg, config)
    assert (plan.held["parameters"] + sum(plan.sampling.values())) / real == pytest.approx(
        1, abs=0.15
    )


def test_what_the_passes_of_a_scan_leave_is_stacked_and_what_they_carry_is_not():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c + 1, (c * 2, c[0])), x, None, length=3)

    jaxpr = jax.make_jaxpr(scanned)(jnp.zeros(4)).jaxpr
    found = memory_shapes._result_buffers(jaxpr, [(object(), 16)])
    assert [size for _, size in found] == [16, 48, 12]  # bytes of f32[4], f32[3, 4] and f32[3]


def test_remat_keeps_the_inputs_of_a_block_and_what_a_row_needs_once():
    """A block keeps x [T, E] alone, and masks.

    More cannot be said here: the compiler for a CPU undoes remat.
    """
    cfg, _ = make({"train.remat": True})
    block, _ = memory_shapes.backward_bytes(cfg, NO_ADAPTER, 24, 57)
    assert 56 * 64 * 4 <= block <= 1.5 * 56 * 64 * 4
    bare, _ = memory_shapes.backward_bytes(make()[0], NO_ADAPTER, 24, 57)
    # Five wide arrays of SiLU and its product, and the scores: much more than that lies between.
    assert bare > 5 * 56 * 224 * 4 + 4 * 56 * (24 + 56) * 4


def test_parameters_and_optimizer_by_hand():
    cfg, config = make()
    count = 768 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32 + 3 * 64 * 224 + 2 * 64)
    assert memory_plan.plan(cfg, config, 2).held == {
        "parameters": 4 * count,
        "optimizer": 8 * count,
        "average": 0,
    }
    cfg, config = make({"lora.rank": 2, "lora.targets": ("q_proj",), "optim.average": 0.5} | HALF)
    adapter = 2 * 2 * (64 + 64)
    held = {"parameters": 4 * adapter + 2 * count, "optimizer": 8 * adapter, "average": 4 * adapter}
    assert memory_plan.plan(cfg, config, 2).held == held


def test_divided_parameters_by_hand():
    cfg, config = make({"optim.average": 0.9, "train.sharded": True})
    plan = memory_plan.plan(cfg, config, 2)
    ends, block = 768 * 64 + 64, 2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32 + 3 * 64 * 224 + 2 * 64
    count = ends + 2 * block
    assert plan.held == {
        "parameters": 4 * count / 2,
        "optimizer": 8 * count / 2,
        "average": 4 * count / 2,
    }
    assert plan.update["gradients"] == 8 * count / 2
    assert plan.update["parameters"] == (ends + block) * (4 * 4 + 4)
    assert plan.sampling["parameters"] == 4 * count
    half = memory_plan.plan(*make({"train.sharded": True} | HALF), 2)
    assert half.update["parameters"] == (ends + block) * (4 * 2 + 4) + 2 * count / 2
    alone = memory_plan.plan(cfg, config, 1)
    assert alone == memory_plan.plan(*make({"optim.average": 0.9}), 1)


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_before_it_is_allocated_with_what_would(
    small, tmp_path, monkeypatch
):
    cfg, config = make()
    need = memory_plan.plan(cfg, config, 2).on_device
    assert f"at most {need / 2**20:.1f} of {need / 2**20:.1f} MiB" in memory_check.check_fits(
        cfg, config, Machine(2, need)
    )
    with pytest.raises(
        UserError, match=r"GiB on each of 2 devices.*it fits with --config.train.micro_rows=4\n"
    ):
        memory_check.check_fits(cfg, config, Machine(2, need - 1))
    with pytest.raises(UserError, match="no setting makes it fit: use a smaller model"):
        memory_check.check_fits(cfg, config, Machine(2, 1000))
    monkeypatch.setattr(memory_check, "host_memory", lambda: 1000.0)
    with pytest.raises(UserError, match="GiB of this machine"):  # the command line asks
        train.main(small(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()


def test_what_is_named_fits_and_nothing_milder_does():
    cfg, config = make()
    for have in (0.8, 0.6, 0.45, 0.3):
        have *= memory_plan.plan(cfg, config, 2).on_device
        changes = memory_check.settings_that_fit(cfg, config, Machine(2, have))
        fits = []
        for other in memory_check.smaller_settings(config, 2, memory_plan.TRAINING):
            devices = other.get("devices", 2)
            plan = memory_plan.plan(*memory_check.changed(cfg, config, other), devices)
            fits.append(plan.on_device <= have)
            if other == changes:
                break
        assert fits[-1] and not any(fits[:-1])


def test_host_devices_share_the_memory_of_the_host_with_their_process():
    cfg, config = make()
    plan = memory_plan.plan(cfg, config, 2, cpu=True)
    needed = plan.on_host + 2 * plan.on_device
    enough, short = Machine(2, needed, cpu=True), Machine(2, needed - 1, cpu=True)
    assert f"at most {needed / 2**20:.1f} of" in memory_check.check_fits(cfg, config, enough)
    with pytest.raises(UserError, match="GiB of this machine"):
        memory_check.check_fits(cfg, config, short)
    # An accelerator holds its part itself; the host then has a copy to load from and to save.
    apart = memory_plan.plan(cfg, config, 2)
    assert apart.host["copies"] == sum(apart.held.values()) and not plan.host["copies"]
    assert memory_check.host_memory() > 2**28


@pytest.mark.parametrize(
    ("said", "folders"),
    [
        ("0::/\n", [""]),
        ("1:cpu:/x\n0::/job/step\n", ["job/step", "job", ""]),
        ("1:memory:/x\n", [""]),
        (None, [""]),
    ],
)
def test_a_limit_may_be_of_any_group_above_a_process(tmp_path, said, folders):
    if said is not None:
        (tmp_path / "cgroup").write_text(said)
    files = memory_check.limits(tmp_path / "cgroup", tmp_path / "fs")
    assert files == [tmp_path / "fs" / folder / "memory.max" for folder in folders]


def test_the_plan_of_a_warm_start_by_hand():
    """One row a pass has 2 * (24 + 57) columns and teaches 2 * 57 tokens."""
    cfg, config = make({"sft.micro_rows": 1, "train.logprob_chunk": 16})
    plan = memory_plan.plan_warm_start(cfg, config, 1)
    assert plan.held == memory_plan.plan(cfg, config, 1).held
    assert plan.update["logits"] == 4 * 768 * (16 + 16)
    on_cpu = memory_plan.plan_warm_start(cfg, config, 1, cpu=True)
    assert on_cpu.update["logits"] == plan.update["logits"]  # the chunks are a loop
    wider = make({"sft.micro_rows": 1, "train.logprob_chunk": 64})  # no two of them
    assert memory_plan.plan_warm_start(*wider, 1).update["logits"] == 4 * 768 * (64 + 64)
    on_a_cpu = memory_plan.plan_warm_start(*wider, 1, cpu=True)
    assert on_a_cpu.update["logits"] == 4 * 768 * (2 * 57 + 64)
    assert on_cpu.host["copies"] == plan.held["parameters"]  # what each tuning starts from
    twice = make({"sft.micro_rows": 2, "train.logprob_chunk": 16})
    more = memory_plan.plan_warm_start(*twice, 1).update
    assert more["activations"] == 2 * plan.update["activations"]
    tight = Machine(1, memory_plan.plan_warm_start(*twice, 1).on_device - 1)
    assert memory_check.settings_that_fit(*twice, tight, memory_plan.WARM_START) == {
        "sft.micro_rows": 1
    }


def test_half_precision_remat_smaller_chunks_lora_and_more_devices_need_less():
    cfg, config = make()
    plain = memory_plan.plan(cfg, config, 2)

    def less(part, devices=2, **changes):
        other = make({key.replace("__", "."): value for key, value in changes.items()})
        needed = memory_plan.plan(*other, devices)
        return sum(getattr(needed, part).values()) < sum(getattr(plain, part).values())

    assert less("sampling", decode__cache_dtype="bfloat16") and less("sampling", devices=4)
    assert less("update", train__remat=True) and less("update", train__logprob_chunk=8)
    # A decision that is learnt alone computes nothing again.
    alone = {"algorithm__advantage": "none", "algorithm__decision": "scored"}
    assert less("update", **alone) and less("host", **alone)
    assert less("held", lora__rank=2) and less(
        "held", model__param_dtype="bfloat16", model__dtype="bfloat16"
    )


def test_published_shapes_have_the_sizes_of_their_names():
    counts = {
        name: measure.parameters(hf.config_from_hf(c)) / 1e9
        for name, c in published.CONFIGS.items()
    }
    want = {
        "smollm2-135m": 0.135,
        "Llama-3.2-1B": 1.236,
        "Llama-3.2-3B": 3.213,
        "Llama-3.1-8B": 7.505,  # and an embedding that is not tied
        "Qwen2.5-0.5B": 0.494,
        "Qwen2.5-1.5B": 1.544,
        "Qwen2.5-3B": 3.086,
    }
    found = {name.split("/")[-1].removesuffix("-Instruct"): count for name, count in counts.items()}
    assert found == pytest.approx(want, abs=1e-3)  # but for norms and biases


def command(module, *flags):
    """The process of one of the commands, when it has ended."""
    line = [sys.executable, "-m", f"collab_jax.{module}", "--config=configs/countdown_tiny.py"]
    return subprocess.run([*line, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)


FEW_PROGRAMS = [
    "--config.decode.segments=1",
    "--config.decode.slot_counts=1",
    "--config.eval.prompts=0",
    "--config.task.train_examples=64",
    "--config.task.test_examples=32",
    "--config.sft.steps=1",
    "--config.sft.check_prompts=32",
]


@pytest.mark.slow
def test_the_plan_of_a_warm_start_is_the_largest_that_its_process_becomes(data_dir, tmp_path):
    # VmHWM, since ru_maxrss of a child has the size of the process that it was forked from.
    code = (
        "import atexit, pathlib, runpy; "
        "atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text())); "
        "runpy.run_module('collab_jax.sft', run_name='__main__', alter_sys=True)"
    )
    flags = ["--config=configs/countdown_tiny.py", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.task.data_dir={data_dir}", *FEW_PROGRAMS]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    largest = re.search(r"VmHWM:\s*(\d+) kB", text)
    planned = re.search(r"at most ([\d.]+) of [\d.]+ (MiB|GiB): ", text)
    assert planned and largest, text
    size = float(planned[1]) * {"MiB": 2**20, "GiB": 2**30}[planned[2]]
    assert size / (int(largest[1]) * 1024) == pytest.approx(1, abs=0.2), text


@pytest.mark.slow
def test_the_command_line_plans_for_devices_that_are_not_there():
    done = command("memory", "--devices=8", "--gib=16", "--config.group=64")
    assert done.returncode == 0 and "on each of 8 devices" in done.stdout, done.stderr
    done = command("memory", "--devices=8", "--gib=0.001")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: this run needs about"), done.stderr


@pytest.mark.parametrize("flag", ["gib", "devices"])
@pytest.mark.slow
def test_flags_of_the_plan_are_unknown_to_other_commands(tmp_path, flag):
    done = command("train", f"--workdir={tmp_path / 'run'}", f"--{flag}=1")
    assert done.returncode == 1, done.stderr
    assert f"Unknown command line flag '{flag}'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_importing_the_command_defines_no_flag():
    code = (
        "from absl import flags; before = set(flags.FLAGS); import collab_jax.memory; "
        "print(sorted(set(flags.FLAGS) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    new = done.stdout.strip()
    assert done.returncode == 0 and "'gib'" not in new and "'devices'" not in new, done.stderr
