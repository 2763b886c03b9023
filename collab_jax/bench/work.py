"""What a bench runs: models of several shapes, a mix of response lengths, and our own work on them.

A mix needs rows that end where they should in any program that samples. So its model is a clock:
the outputs of attention and MLP are zero (they are computed all the same), and a row of the head
names each token's successor. After the prompt nine rows in ten start to count and write EOS at a
quarter of the limit; the tenth repeats one token until the limit.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax import gapg
from collab_jax.bench import measure
from collab_jax.models import decoder, hf
from collab_jax.models.blocks import LAYERS
from collab_jax.models.decision import Marker, opening
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler, SamplerSettings
from collab_jax.rl import algorithms, optim, rollout, sampling, step
from collab_jax.runtime import parallel

TINY = "countdown-tiny"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=32,
        model_type="qwen3",
    ),
    "25m": dict(
        num_hidden_layers=8,
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=32000,
        model_type="qwen3",
    ),
    "smollm2-135m": dict(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        model_type="llama",
    ),
    "qwen2.5-0.5b": dict(
        num_hidden_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        model_type="qwen2",
    ),
    "qwen2.5-1.5b": dict(
        num_hidden_layers=28,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        model_type="qwen2",
    ),
}
PAD, EOS, START, FOREVER, FIRST = range(5)  # tokens of a clock; FIRST is the first that counts
LONG_SHARE = 0.1  # rows of the mix that run to the limit
DRAWN = 4_194_301  # a prime: no row of a matrix repeats another one


class Load(NamedTuple):
    """The size of the work. lengths: "fixed" (every row runs to the limit) or "long_tail"."""

    shape: str
    lengths: str
    prompts: int  # Q
    group: int  # G
    prompt_length: int  # L
    max_new: int  # T
    dtype: str
    micro_rows: int


def hf_config(load: Load) -> dict:
    """Returns config.json of the load's model. A clock's head is not tied to its embeddings."""
    shape = SHAPES[load.shape]
    return {
        "architectures": [f"{shape['model_type'].capitalize()}ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": load.lengths == "fixed",
        "pad_token_id": PAD,
        "eos_token_id": None,
        "bos_token_id": None,
        **shape,
    }


def make_model(load: Load) -> tuple[DecoderConfig, Params]:
    """Returns the load's decoder and its parameters on the host: random ones, or a clock's."""
    cfg = hf.config_from_hf(hf_config(load), load.dtype)
    params = random_params(cfg, load.dtype)
    return cfg, params if load.lengths == "fixed" else make_clock(cfg, params, load.max_new // 4)


def random_params(cfg: DecoderConfig, dtype: str) -> Params:
    """Returns random parameters on the host: matrices normal with standard deviation 0.02.

    DRAWN numbers, over and over: billions of draws would take longer than what is measured.
    """
    draw = np.random.default_rng(0)
    drawn = (0.02 * draw.standard_normal(DRAWN, np.float32)).astype(dtype)
    shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))

    def one(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), dtype)
        return np.resize(np.roll(drawn, -draw.integers(DRAWN)), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, shapes)


def make_clock(cfg: DecoderConfig, params: Params, ticks: int) -> Params:
    """Returns `params` as those of a clock that writes EOS as its token number `ticks`.

    The last layers of all blocks are zero, the embeddings one-hot, and the head names each token's
    successor.
    """
    size = FIRST + ticks - 1
    if size > min(cfg.hidden_size, cfg.vocab_size):
        raise ValueError(f"a clock of {ticks} ticks does not fit {cfg.hidden_size} wide")
    params = without_blocks(params)
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


def without_blocks(params: Params) -> Params:
    """Returns `params` with zeros for the last layers of all blocks, which then add nothing."""
    layers = params[LAYERS]
    attention, mlp = layers["self_attn"], layers["mlp"]
    o_proj = {"kernel": np.zeros_like(attention["o_proj"]["kernel"])}
    down_proj = {"kernel": np.zeros_like(mlp["down_proj"]["kernel"])}
    silent = {
        "self_attn": attention | {"o_proj": o_proj},
        "mlp": mlp | {"down_proj": down_proj},
    }
    return params | {LAYERS: layers | silent}


def save(load: Load, params: Params, folder: pathlib.Path) -> None:
    """Writes the model as a Hugging Face folder, for the peers."""
    hf.save(folder, params, hf_config(load), load.dtype, hf.locate(TINY))


def eos_ids(load: Load) -> tuple[int, ...]:
    """Returns the tokens that end a response: none where every row runs to the limit."""
    return () if load.lengths == "fixed" else (EOS,)


def make_prompts(load: Load) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts i32[Q, L] and their mask bool[Q, L], without padding."""
    shape = load.prompts, load.prompt_length
    return np.full(shape, START, np.int32), np.ones(shape, bool)


def response_lengths(load: Load) -> np.ndarray:
    """Returns the lengths i[Q, G] of an update's responses: what the mix would sample."""
    draw = np.random.default_rng(0).random((load.prompts, load.group))
    return np.where(
        (draw < LONG_SHARE) | (load.lengths == "fixed"), load.max_new, load.max_new // 4
    )


class Case(NamedTuple):
    """Work that can be timed: run() does it once and returns its useful tokens.

    flop(), bytes(): what its latest run had to compute, and to read from memory.
    """

    run: Callable[[], float]
    flop: Callable[[], float]
    bytes: Callable[[], float] | None = None


class Decode:
    """Sampling of a whole batch, with another seed at each call."""

    def __init__(
        self, load: Load, cfg: DecoderConfig, params: Params, segments: int, slot_counts: int
    ):
        self._load, self._cfg, self._params, self._seed = load, cfg, params, 0
        settings = SamplerSettings(
            group=load.group,
            max_new=load.max_new,
            temperature=1.0,
            top_p=1.0,
            eos_ids=eos_ids(load),
            pad_id=PAD,
            marker=Marker(3, opening(["."] * cfg.vocab_size)),
            segments=segments,
            slot_counts=slot_counts,
            cache_dtype=load.dtype,
        )
        self._sampler = Sampler(cfg, settings, sampling.begin_body(cfg, settings), parallel.pmap)
        self._prompts, self._mask = make_prompts(load)

    def __call__(self) -> float:
        """Samples once; returns the tokens."""
        self._seed += 1
        samples = rollout.draw(
            self._sampler, self._params, self._prompts, self._mask, seed=self._seed, step=0
        )
        mask = np.asarray(jax.block_until_ready(samples).mask)
        self._lengths = mask.sum(-1).reshape(-1)  # [B]
        return float(self._lengths.sum())

    def flop(self) -> float:
        """Returns the FLOP of the latest call's tokens and of the prompts."""
        load, L = self._load, self._load.prompt_length
        none_before, whole = np.zeros(load.prompts), np.full(load.prompts, L)
        prompts = measure.forward_flop(self._cfg, none_before, whole, logits=False)
        return prompts + measure.forward_flop(self._cfg, L - 1.0, self._lengths, logits=True)

    def bytes(self) -> float:
        """Returns the bytes that the latest call had to read."""
        load, size = self._load, np.dtype(jax.numpy.dtype(self._load.dtype)).itemsize
        return measure.decode_bytes(
            self._cfg, load.prompts, load.prompt_length, self._lengths, size, size
        )


def decode(load: Load, cfg: DecoderConfig, params: Params, segments: int, slot_counts: int) -> Case:
    """Returns the sampling of a whole batch; params with axis D.

    One segment and one slot count make it the loop with a fixed batch.
    """
    work = Decode(load, cfg, params, segments, slot_counts)
    return Case(work, work.flop, work.bytes)


def update_batch(load: Load) -> gapg.Rollout:
    """Returns a rollout on the host in which every group has a gradient."""
    Q, G, T = load.prompts, load.group, load.max_new
    # Annotated as Any: on the host the fields of a Rollout are NumPy arrays.
    prompts: Any
    prompt_mask: Any
    prompts, prompt_mask = make_prompts(load)
    mask: Any = np.arange(T) < response_lengths(load)[..., None]
    random = np.random.default_rng(1).integers(4, SHAPES[load.shape]["vocab_size"], mask.shape)
    tokens: Any = np.where(mask, random, PAD).astype(np.int32)
    logp: Any = np.zeros(mask.shape, np.float32)
    half: Any = np.broadcast_to(np.arange(G) % 2 == 0, (Q, G))
    none_called: Any = np.zeros((Q, G), bool)
    all_formatted: Any = np.ones((Q, G), bool)
    cloud: Any = np.ones(Q, bool)
    return gapg.Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=tokens,
        logp=logp,
        mask=mask,
        correct=half,
        called=none_called,
        formatted=all_formatted,
        cloud_correct=cloud,
        cloud_known=cloud,
    )


class Update:
    """One update at each call, on a batch in which every response counts."""

    def __init__(self, load: Load, cfg: DecoderConfig, params: Params):
        optimizer = optim.make_optimizer(lambda _: 1e-6, 0.0, optim.unit_norm())
        body = step.make_step(
            cfg,
            optimizer,
            gapg.GAPG._replace(prompt_filter=algorithms.no_filter),
            axis=parallel.AXIS,
            micro_rows=load.micro_rows,
            temperature=1.0,
            chunk=64,
        )
        self._update = parallel.pmap(
            lambda state, batch: body(state, batch, jax.random.key(0)), donate=(0,)
        )
        state = gapg.init_state(
            params, optimizer, gapg.init_reward(2.0, 0.5, 0.2), gapg.init_filter(0.3)
        )
        self._state = parallel.replicate(jax.device_get(state))
        self._batch = parallel.shard(update_batch(load), jax.local_device_count())
        self._load, self._cfg, self._lengths = load, cfg, response_lengths(load)

    def __call__(self) -> float:
        """Updates once; returns the tokens of the batch's responses."""
        self._state, metrics = self._update(self._state, self._batch)
        jax.block_until_ready(metrics)
        return float(self._lengths.sum())

    def flop(self) -> float:
        """Returns the FLOP of one call."""
        return measure.update_flop(self._cfg, self._load.prompt_length, self._lengths)


def update(load: Load, cfg: DecoderConfig, params: Params) -> Case:
    """Returns one update as a case; params on the host."""
    work = Update(load, cfg, params)
    return Case(work, work.flop)
