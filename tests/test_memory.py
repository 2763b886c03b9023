"""The estimate of memory against the compiler's own, and the refusal of what does not fit."""

import jax
import numpy as np
import pytest

from collab_jax import algorithms, gapg, memory, optim, parallel, train
from collab_jax.bench import work
from collab_jax.errors import UserError
from collab_jax.models import hf


@pytest.mark.parametrize("changes", [{}, {"train__micro_rows": 32, "max_new_tokens": 96}], ids=["small", "large"])
def test_plan_is_near_what_the_compiler_reserves(small, changes):
    config = small(prompts_per_step=32, group=8, **changes)
    load = work.Load("tiny", "fixed", 32, 8, 16, config.max_new_tokens, "float32", config.train.micro_rows)
    cfg = hf.config_from_hf(work.hf_config(load))
    optimizer = optim.make_optimizer(lambda _: 0.0, 0.0, 1.0)
    body = gapg.make_step(
        cfg, optimizer, gapg.GAPG._replace(prompt_filter=algorithms.no_filter), axis=parallel.AXIS, micro_rows=load.micro_rows,
        lengths=(load.max_new,), temperature=1.0, chunk=config.train.logprob_chunk,
    )  # fmt: skip
    step = parallel.pmap(lambda state, batch: body(state, batch, jax.random.key(0)), donate=(0,))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: work.make_model(load)[1]))
    state = gapg.init_state(params, optimizer, gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(0.3))
    state = parallel.replicate(jax.device_get(state))
    compiled = step.lower(state, parallel.shard(work.update_batch(load), 2)).compile().memory_analysis()
    parts = memory.plan(cfg, config, devices=2)
    real = compiled.temp_size_in_bytes + compiled.argument_size_in_bytes
    assert 0.75 < (parts["weights"] + parts["update"]) / real < 1.33


def test_what_does_not_fit_is_refused_before_it_is_allocated_with_figures_and_fix(small, tmp_path, monkeypatch):
    config = small()
    cfg = hf.config_from_hf(hf.read_config(hf.locate("countdown-tiny")))
    memory.check(cfg, config)
    parts = memory.plan(cfg, config, 2)
    need = parts["weights"] + max(parts["sampling"], parts["update"])
    monkeypatch.setattr(memory, "limit", lambda: need)
    memory.check(cfg, config)
    monkeypatch.setattr(memory, "limit", lambda: need - 1)
    with pytest.raises(UserError, match=r"GiB on each of 2 devices.*weights.*sampling.*update.*use a smaller config"):
        memory.check(cfg, config)
    with pytest.raises(UserError, match="GiB"):  # the command line asks
        train.main(config, tmp_path / "run")


@pytest.mark.parametrize(
    "change, part, names",
    [
        ({"prompts_per_step": 2048}, "sampling", "config.group"),
        ({"train__micro_rows": 4096}, "update", "micro_rows"),
    ],
)
def test_the_fix_names_what_is_largest(small, change, part, names, monkeypatch):
    config = small(**change)
    cfg = hf.config_from_hf(hf.read_config(hf.locate("countdown-tiny")))
    parts = memory.plan(cfg, config, 2)
    assert max(parts, key=parts.get) == part
    monkeypatch.setattr(memory, "limit", lambda: 1.0)
    with pytest.raises(UserError, match=names):
        memory.check(cfg, config)


def test_half_precision_remat_and_more_devices_need_less(small):
    cfg = hf.config_from_hf(hf.read_config(hf.locate("countdown-tiny")))
    plain = memory.plan(cfg, small(), 2)
    assert memory.plan(cfg, small(decode__cache_dtype="bfloat16"), 2)["sampling"] < plain["sampling"]
    assert memory.plan(cfg, small(), 4)["sampling"] < plain["sampling"]
    remat = hf.config_from_hf(hf.read_config(hf.locate("countdown-tiny")), remat=True)
    assert memory.plan(remat, small(), 2)["update"] < plain["update"]
    assert memory.limit() > 2**28
