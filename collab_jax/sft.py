"""Warm start: supervised tuning on the task's demonstrations, so that format and marker are within reach of exploration.

    python -m collab_jax.sft --config configs/countdown_tiny_sft.py --workdir FOLDER

writes a Hugging Face folder. With `config.sft.architecture` the model and its vocabulary are made from nothing, else
tuning starts from `config.model.path`. The same command gives the same weights on the same machine.
"""

import itertools
import math
import pathlib
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax import cli, optim, parallel
from collab_jax.errors import UserError
from collab_jax.models import decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.tasks import make_task


class Batch(NamedTuple):
    """Demonstrations. prompts, prompt_mask: [B, L]; responses, response_mask: [B, T], EOS in."""

    prompts: np.ndarray
    prompt_mask: np.ndarray
    responses: np.ndarray
    response_mask: np.ndarray


def batches(task, text, config: ConfigDict):
    """Endless Batches of `config.sft.batch_size` demonstrations that fit `max_new_tokens`; the others are left out."""
    T, source = config.max_new_tokens, task.demonstrations(config.seed)
    fitting = ((e, ids) for e, r in source if len(ids := text.response_ids(r)) <= T)
    while True:
        pairs = list(itertools.islice(fitting, config.sft.batch_size))
        prompts, prompt_mask = text.prompt_batch([task.prompt(example) for example, _ in pairs], config.prompt_length)
        responses = np.full((len(pairs), T), text.pad_id, np.int32)
        mask = np.zeros((len(pairs), T), bool)
        for i, (_, ids) in enumerate(pairs):
            responses[i, : len(ids)], mask[i, : len(ids)] = ids, True
        yield Batch(prompts, prompt_mask, responses, mask)


def make_step(cfg: decoder.DecoderConfig, optimizer: optax.GradientTransformation, config: ConfigDict):
    """step(params, opt_state, frozen, Batch) -> params, opt_state, mean loss in nats a response token; all with axis D."""

    def body(params, opt_state, frozen, batch: Batch):
        def loss(params, part: Batch):
            model, chunk = lora.join(frozen, params), config.train.logprob_chunk
            logp = decoder.response_logprobs(model, cfg, *part[:3], temperature=1.0, chunk=chunk)
            return -jnp.sum(logp * part.response_mask)

        def micro(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        rows = batch.prompts.shape[0]
        parts = math.gcd(rows, max(rows // config.sft.micro_rows, 1))  # as even as the batch allows
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zeros = jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (total, grads), _ = jax.lax.scan(micro, zeros, split)
        total, grads, count = jax.lax.psum((total, grads, batch.response_mask.sum()), parallel.AXIS)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / count

    return parallel.pmap(body, donate=(0, 1))


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Tunes, and writes the model folder to `workdir`."""
    task = make_task(config)
    if task.demonstrations is None:
        raise UserError(f"task {task.name!r} makes no demonstrations")
    if config.sft.steps < 1:
        raise UserError(
            "config.sft.steps must be at least 1: start from a config such as configs/countdown_tiny_sft.py"
        )
    with tempfile.TemporaryDirectory() as scratch:
        if config.sft.architecture:
            tokenizer_folder, hf_config = pathlib.Path(scratch), dict(config.sft.architecture)
            words = text_lib.word_tokenizer(config.sft.words, config.text.pad, config.text.eos[0], "<unk>")
            words.save_pretrained(tokenizer_folder)
            cfg = hf.config_from_hf(hf_config, config.model.dtype)
            params = decoder.init(cfg, jax.random.key(config.seed))
        else:
            tokenizer_folder = hf.locate(config.model.path)
            hf_config = hf.read_config(tokenizer_folder)
            cfg = hf.config_from_hf(hf_config, config.model.dtype, config.train.remat)
            params = hf.load(tokenizer_folder, cfg, config.model.param_dtype)
        text = text_lib.load(tokenizer_folder, config.text)
        params = tune(params, cfg, batches(task, text, config), config)
        hf.save(workdir, params, hf_config, config.model.param_dtype, tokenizer_folder)
    print(f"wrote {workdir}")
    return 0


def tune(params, cfg, source, config: ConfigDict):
    """Params after `config.sft.steps` updates on the batches of `source`; of an adapter, which is then merged, under LoRA."""
    cfg, base, frozen = lora.configure(cfg, config.lora), params, None
    if config.lora.rank:
        params = lora.init(cfg, config.lora, jax.random.key(config.seed), config.model.param_dtype)
        frozen = parallel.replicate(jax.tree.map(lambda x: np.asarray(x).astype(cfg.dtype), base))
    sft, D = config.sft, jax.local_device_count()
    schedule = optim.make_schedule(sft.learning_rate, sft.warmup_steps, decay_steps=sft.steps)
    optimizer = optim.make_optimizer(schedule, sft.weight_decay, config.optim.clip_norm, config.model.param_dtype)
    state = parallel.replicate(params), parallel.replicate(optimizer.init(params))
    step, started = make_step(cfg, optimizer, config), time.monotonic()
    with tqdm(total=sft.steps, desc="warm start", unit="step") as bar:
        for i in range(sft.steps):
            batch = parallel.shard(next(source), D)
            jax.block_until_ready(state)  # one at a time: updates of host devices, queued, can lock in the collective
            *state, loss = step(*state, frozen, batch)
            if i % 20 == 0 or i == sft.steps - 1:
                bar.set_postfix(loss=f"{float(loss[0]):.3f}", refresh=False)
            bar.update()
    print(f"{sft.steps} steps in {time.monotonic() - started:.0f} s, last loss {float(loss[0]):.3f} nats a token")
    tuned = parallel.unreplicate(state[0])
    return lora.merge(base, tuned, cfg.lora_scale) if config.lora.rank else tuned


if __name__ == "__main__":
    cli.main(run)
