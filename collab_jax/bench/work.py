"""What a bench runs: models of several shapes, a mix of response lengths, and our own decode,
update and step on them.

A mix needs rows that end where they should in any program that samples. So its model is a clock:
with the outputs of attention and MLP at zero (they are computed all the same) a token's successor
is a row of the head. After the prompt nine rows in ten start to count and write EOS at a quarter of
the limit; the tenth repeats one token for ever.
"""

import pathlib
import runpy
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.bench import measure
from collab_jax.models import decoder, hf, sampler
from collab_jax.models.decision import Marker
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler, SamplerSettings
from collab_jax.rl import algorithms, experiment, optim, rollout, step, training
from collab_jax.runtime import parallel

TINY = "countdown-tiny"
SHAPES = {
    "tiny": dict(num_hidden_layers=4, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32, vocab_size=32, model_type="qwen3"),
    "25m": dict(num_hidden_layers=8, hidden_size=384, intermediate_size=1024, num_attention_heads=6, num_key_value_heads=2,
                head_dim=64, vocab_size=32000, model_type="qwen3"),
    "qwen2.5-0.5b": dict(num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151936, model_type="qwen2"),
    "qwen2.5-1.5b": dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
                         num_key_value_heads=2, vocab_size=151936, model_type="qwen2"),
}  # fmt: skip
PAD, EOS, START, FOREVER, FIRST = range(5)  # tokens of a clock; FIRST is the first that counts
LONG_SHARE = 0.1  # rows of the mix that run to the limit


class Load(NamedTuple):
    """Size of the work. lengths: "fixed" (every row runs to the limit) or "long_tail"."""

    shape: str
    lengths: str
    prompts: int  # Q
    group: int  # G
    prompt_length: int  # L
    max_new: int  # T
    dtype: str
    micro_rows: int


def hf_config(load: Load) -> dict:
    """config.json of the load's model; a clock's head is its own."""
    return {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": load.lengths == "fixed",
        "pad_token_id": PAD,
        "eos_token_id": None,
        "bos_token_id": None,
        **SHAPES[load.shape],
    }


def make_model(load: Load) -> tuple[DecoderConfig, Params]:
    """The load's decoder with parameters of its dtype on the host: random, or a clock."""
    cfg = hf.config_from_hf(hf_config(load), load.dtype)
    params = random_params(cfg, load.dtype)
    return cfg, params if load.lengths == "fixed" else make_clock(cfg, params, load.max_new // 4)


def random_params(cfg: DecoderConfig, dtype: str) -> Params:
    """Random parameters on the host: matrices normal with standard deviation 0.02."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))

    def one(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), dtype)
        return (0.02 * draw.standard_normal(leaf.shape, np.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def make_clock(cfg: DecoderConfig, params: Params, ticks: int) -> Params:
    """`params` with the last layers of all blocks at zero, embeddings one-hot and a head that says
    what follows.
    """
    size = FIRST + ticks - 1
    if size > min(cfg.hidden_size, cfg.vocab_size):
        raise ValueError(f"a clock of {ticks} ticks does not fit {cfg.hidden_size} wide")
    for name, layer in params.items():
        if name.startswith("layers_"):
            layer["self_attn"]["o_proj"]["kernel"] = np.zeros_like(
                layer["self_attn"]["o_proj"]["kernel"]
            )
            layer["mlp"]["down_proj"]["kernel"] = np.zeros_like(layer["mlp"]["down_proj"]["kernel"])
    embedding = np.zeros_like(params["embed_tokens"]["embedding"])
    embedding[range(size), range(size)] = 1
    logits = np.zeros((size, cfg.vocab_size), np.float32)
    logits[START, [FIRST, FOREVER]] = 40 + np.log([1 - LONG_SHARE, LONG_SHARE])
    logits[FOREVER, FOREVER] = 40
    for token in range(FIRST, size):
        logits[token, token + 1 if token + 1 < size else EOS] = 40
    head = np.zeros_like(params["lm_head"]["kernel"])
    head[:size] = (
        logits / cfg.hidden_size**0.5
    )  # the norm of a one-hot row is the root of its width
    return {**params, "embed_tokens": {"embedding": embedding}, "lm_head": {"kernel": head}}


def save(load: Load, params: Params, folder: pathlib.Path) -> None:
    """The model as a Hugging Face folder, for the peers."""
    hf.save(folder, params, hf_config(load), load.dtype, hf.locate(TINY))


def eos_ids(load: Load) -> tuple[int, ...]:
    return () if load.lengths == "fixed" else (EOS,)


def make_prompts(load: Load) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [Q, L], without padding."""
    shape = load.prompts, load.prompt_length
    return np.full(shape, START, np.int32), np.ones(shape, bool)


def response_lengths(load: Load) -> np.ndarray:
    """i[Q, G] for an update: what the mix would sample."""
    draw = np.random.default_rng(0).random((load.prompts, load.group))
    return np.where(
        (draw < LONG_SHARE) | (load.lengths == "fixed"), load.max_new, load.max_new // 4
    )


class Case(NamedTuple):
    """run() does the work once and returns its useful tokens; flop(), bytes(): of its latest run."""

    run: Callable[[], float]
    flop: Callable[[], float]
    bytes: Callable[[], float] | None = None


def decode(load: Load, cfg: DecoderConfig, params, segments: int, slot_counts: int) -> Case:
    """Sampling of a whole batch; params with axis D. One segment and one slot count: the fixed
    batch.
    """
    settings = SamplerSettings(
        group=load.group,
        max_new=load.max_new,
        temperature=1.0,
        top_p=1.0,
        eos_ids=eos_ids(load),
        pad_id=PAD,
        marker=Marker(3, ((3, 3),)),
        segments=segments,
        slot_counts=slot_counts,
        cache_dtype=load.dtype,
    )

    def begin(params, prompts, prompt_mask, seed, bias):
        index = jax.lax.axis_index(parallel.AXIS) * len(prompts) + jax.numpy.arange(len(prompts))
        return sampler.start(
            params, cfg, prompts, prompt_mask, sampler.prompt_keys(seed, 0, index), bias, settings
        )

    D = jax.local_device_count()
    sample, inputs = (
        Sampler(cfg, settings, begin, parallel.pmap),
        parallel.shard(make_prompts(load), D),
    )
    latest = {"seed": 0}

    def run() -> float:
        latest["seed"] += 1
        seed = np.full(D, latest["seed"], np.int32)
        samples = jax.block_until_ready(sample(params, *inputs, seed, bias=np.zeros(D, np.float32)))
        latest["lengths"] = np.asarray(samples.mask).sum(-1).reshape(-1)
        return float(latest["lengths"].sum())

    def flop() -> float:
        lengths, L = latest["lengths"], load.prompt_length
        prompts = measure.forward_flop(cfg, np.zeros(load.prompts), np.full(load.prompts, L), False)
        return prompts + measure.forward_flop(cfg, L - 1.0, lengths, True)

    def moved() -> float:
        size = np.dtype(jax.numpy.dtype(load.dtype)).itemsize
        return measure.decode_bytes(
            cfg, load.prompts, load.prompt_length, latest["lengths"], size, size
        )

    return Case(run, flop, moved)


def update_batch(load: Load) -> gapg.Rollout:
    """A rollout on the host in which every group has a gradient."""
    Q, G, T = load.prompts, load.group, load.max_new
    mask = np.arange(T) < response_lengths(load)[..., None]
    prompts, prompt_mask = make_prompts(load)
    half = np.broadcast_to(np.arange(G) % 2 == 0, (Q, G))
    return gapg.Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=np.where(
            mask,
            np.random.default_rng(1).integers(4, SHAPES[load.shape]["vocab_size"], mask.shape),
            PAD,
        ).astype(np.int32),
        logp=np.zeros(mask.shape, np.float32),
        mask=mask,
        correct=half,
        called=np.zeros((Q, G), bool),
        formatted=np.ones((Q, G), bool),
        cloud_correct=np.ones(Q, bool),
        cloud_known=np.ones(Q, bool),
    )


def update_flop(cfg: DecoderConfig, prompt_length: int, lengths: np.ndarray) -> float:
    """Of a forward and a backward pass over groups whose responses have `lengths` i[Q, G]; a prompt
    counts once.
    """
    L = prompt_length
    prompts = measure.forward_flop(cfg, np.zeros(len(lengths)), np.full(len(lengths), L), False)
    return 3 * (prompts + measure.forward_flop(cfg, L - 1.0, lengths, True))


def update(load: Load, cfg: DecoderConfig, params: Params, lengths: int) -> Case:
    """One step on a batch in which every response counts; params on the host."""
    optimizer = optim.make_optimizer(lambda _: 1e-6, 0.0, 1.0)
    body = step.make_step(
        cfg,
        optimizer,
        gapg.GAPG._replace(prompt_filter=algorithms.no_filter),
        axis=parallel.AXIS,
        micro_rows=load.micro_rows,
        lengths=step.cut_lengths(load.max_new, lengths),
        temperature=1.0,
        chunk=64,
    )
    update_step = parallel.pmap(
        lambda state, batch: body(state, batch, jax.random.key(0)), donate=(0,)
    )
    state = gapg.init_state(
        params, optimizer, gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(0.3)
    )
    held = {"state": parallel.replicate(jax.device_get(state))}
    batch = parallel.shard(update_batch(load), jax.local_device_count())
    tokens = response_lengths(load)

    def run() -> float:
        held["state"], metrics = update_step(held["state"], batch)
        jax.block_until_ready(metrics)
        return float(tokens.sum())

    return Case(run, lambda: update_flop(cfg, load.prompt_length, tokens))


def forward_flop(cfg: DecoderConfig, batch: gapg.Rollout) -> float:
    """Of a forward pass over a rollout on the host, with or without axis D: each prompt once, and
    its responses.
    """
    G = batch.tokens.shape[-2]
    lengths, real = batch.mask.sum(-1).reshape(-1, G), batch.prompt_mask.sum(-1).reshape(-1)
    start = np.repeat(real[:, None], G, axis=1) - 1
    prompts = measure.forward_flop(cfg, np.zeros(len(real)), real, False)
    return prompts + measure.forward_flop(cfg, start, lengths, True)


class Training(NamedTuple):
    """The tiny model's run, as `python -m collab_jax.train` has it; in a scratch folder."""

    case: Case
    config: ConfigDict
    run: experiment.Run
    folder: tempfile.TemporaryDirectory  # goes when this goes


def full_step(config_file: str, overrides: dict) -> Training:
    """One full step: sample, judge, ask the cloud, update; always from the first state, on new
    prompts.
    """
    config = runpy.run_path(config_file)["get_config"]()
    config.update_from_flattened_dict(overrides)
    folder = tempfile.TemporaryDirectory()
    run = experiment.prepare(config, pathlib.Path(folder.name))
    examples, Q = experiment.examples(run, "train"), config.prompts_per_step
    prompts = run.text.prompt_batch([run.task.prompt(e) for e in examples], config.prompt_length)
    sample = rollout.make_sampler(
        run.cfg, run.text, config, group=config.group, temperature=config.temperature
    )
    step, first = training.make_step(run), experiment.load_state(run)
    latest = {"i": 0, "state": parallel.replicate(first)}

    def one() -> float:
        i = latest["i"] = latest["i"] + 1
        chosen = training.prompt_indices(config.seed, i, Q, len(examples))
        batch = [examples[j] for j in chosen], *(x[chosen] for x in prompts)
        collected = rollout.collect(
            sample,
            latest["state"].sampling_model,
            run.text,
            run.task,
            run.cloud,
            *batch,
            config.seed,
            i,
        )
        latest["rollout"] = jax.tree.map(np.asarray, collected.rollout)
        latest["state"], metrics = step(latest["state"], collected.rollout)
        latest["metrics"] = parallel.unreplicate(metrics)
        return float(latest["metrics"]["tokens"])

    def flop() -> float:
        learnt = (
            int(latest["metrics"]["kept"] - latest["metrics"]["no_signal"]) / Q
        )  # of the prompts, by their number
        return (1 + 3 * learnt) * forward_flop(run.cfg, latest["rollout"])

    return Training(Case(one, flop), config, run, folder)
