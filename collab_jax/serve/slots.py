"""The device programs of the engine, pure functions over a pytree of R slots.

    prefill  computes a chunk of a prompt, in a row of its own
    insert   puts that row into a slot; with the last chunk of the prompt it is one program, `admit`
    step     samples K tokens for the first slots

All slots share one ring of C columns of keys and values, and the column that is written next. A
prompt is inserted so that it ends right before that column. So a row's tokens are always the last
columns, whatever the slot and whenever it came: one write serves all rows, and a row that needs no
more than C columns never meets its own beginning.

The last token of a prompt is left to the first step, which computes it like any other token: no
program but `step` has the head of the model, or chooses. How a token is chosen, and that a call is
decided by margin + bias > 0, is the sampler's (`models/decision.py`).

What passes between host and devices is one array of 32-bit words each time: with every other one,
and with every program that it starts, the engine's thread would wait once more for Python's lock,
which the threads of a busy server want.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.models import blocks, decision, decoder
from collab_jax.models.decision import Marker, Opening
from collab_jax.models.decoder import ROWS, DecoderConfig, Params, Segment

LOGIT_BIASES = 32  # at most, of one request
SMALLEST_BUCKET = 16  # columns
REQUEST_WORDS = 9 + 2 * LOGIT_BIASES  # of a packed `Request`
STEPS = (1, 8)  # K, tokens of one round
Leaf = Any  # a jax.Array on the device, numpy's on the host


class SlotSettings(NamedTuple):
    """What the programs are compiled for; static.

    columns: the longest prompt and response together. chunk: the most columns of one prefill.
    """

    slots: int  # R
    columns: int  # C
    chunk: int
    eos_ids: tuple[int, ...]
    marker: Marker
    cache_dtype: str

    @property
    def ladder(self) -> list[int]:
        """How many of the first slots a step may work on, rising."""
        return sorted({rows for rows in (1, 8, 32) if rows < self.slots} | {self.slots})

    @property
    def buckets(self) -> list[int]:
        """Columns that a prefill may have, rising to `chunk`."""
        sizes = [min(SMALLEST_BUCKET, self.chunk)]
        while sizes[-1] < self.chunk:
            sizes.append(min(2 * sizes[-1], self.chunk))
        return sizes

    @property
    def staging_columns(self) -> int:
        """C rounded up to whole chunks, so that the last one has room."""
        return -(-self.columns // self.chunk) * self.chunk


class Request(flax.struct.PyTreeNode):
    """What belongs to one request alone; one row of it, or R of them.

    bias is added to the decision token's logit where the call is decided; -inf: the marker is not
    allowed. written counts the response's tokens; opening is the state of `decision.Opening` after
    them.
    """

    token: Leaf  # i32, the last one, whose keys and values are not computed yet
    position: Leaf  # i32, of that token: how many are before it
    opening: Leaf  # i8
    written: Leaf  # i32
    limit: Leaf  # i32, of written
    seed: Leaf  # u32
    temperature: Leaf  # f32, 0: greedy
    top_p: Leaf  # f32
    bias: Leaf  # f32
    logit_ids: Leaf  # i32[LOGIT_BIASES], V or more: none
    logit_values: Leaf  # f32[LOGIT_BIASES]


class Slots(flax.struct.PyTreeNode):
    """The state of the engine on the device."""

    column: jax.Array  # i32[], of the ring, which is written next
    ring: Segment  # R rows, C columns
    live: jax.Array  # bool[R]
    request: Request  # R rows


class Round(NamedTuple):
    """What K steps wrote, [K, rows] each."""

    token: jax.Array  # i32
    logp: jax.Array  # f32, of the distribution that the token comes from
    margin: jax.Array  # f32, m_t; -inf once the answer is open
    real: jax.Array  # bool, the row was live
    called: jax.Array  # bool, the token decides a call, and the row ends
    ended: jax.Array  # bool, the row ends


def idle_request(vocabulary: int) -> Request:
    """A request of no meaning, for slots that hold none."""
    i32, f32 = jnp.int32(0), jnp.float32(0)
    return Request(
        token=i32,
        position=i32,
        opening=jnp.int8(0),
        written=i32,
        limit=i32,
        seed=jnp.uint32(0),
        temperature=f32,
        top_p=jnp.float32(1),
        bias=f32,
        logit_ids=jnp.full(LOGIT_BIASES, vocabulary, jnp.int32),
        logit_values=jnp.zeros(LOGIT_BIASES),
    )


def pack_request(request: Request) -> np.ndarray:
    """One request, of numpy's values, as i32 words."""
    as_words = lambda x: np.ravel(x if np.asarray(x).itemsize == 4 else np.int32(x)).view(np.int32)  # noqa: E731
    return np.concatenate([as_words(x) for x in jax.tree.leaves(request)])


def pack_last(request: Request, slot: int, start: int, tokens: np.ndarray) -> np.ndarray:
    """What `admit` wants: the slot of a request, and the last tokens of its prompt from `start`."""
    where = np.array([slot, start], np.int32)
    return np.concatenate([where, pack_request(request), tokens.astype(np.int32)])


def unpack_request(words: jax.Array) -> Request:
    """The request that `pack_request` has packed."""
    leaves, treedef = jax.tree.flatten(idle_request(0))
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(words, ends[:-1])
    return treedef.unflatten(
        _from_words(part, leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    )


def _from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """Words as what they were; smaller integers are a word each."""
    if jnp.dtype(dtype).itemsize == 4:
        return jax.lax.bitcast_convert_type(words, dtype)
    return words.astype(dtype)


def pack_round(written: Round) -> jax.Array:
    """What K steps wrote as words i32[4, K, rows]."""
    flags = written.real + 2 * written.called + 4 * written.ended
    words = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (written.logp, written.margin)]
    return jnp.stack([written.token, *words, flags.astype(jnp.int32)])


def unpack_round(words: np.ndarray) -> Round:
    """The round that `pack_round` has packed, of numpy's arrays."""
    token, logp, margin, flags = words
    return Round(
        token=token,
        logp=logp.view(np.float32),
        margin=margin.view(np.float32),
        real=flags & 1 > 0,
        called=flags & 2 > 0,
        ended=flags & 4 > 0,
    )


def empty(cfg: DecoderConfig, s: SlotSettings) -> Slots:
    """Slots without a request."""
    idle = idle_request(cfg.vocab_size)
    return Slots(
        column=jnp.int32(0),
        ring=decoder.empty_segment(cfg, s.slots, s.columns, s.cache_dtype),
        live=jnp.zeros(s.slots, bool),
        request=jax.tree.map(lambda x: jnp.broadcast_to(x, (s.slots, *x.shape)), idle),
    )


def prepared(params: Params, cfg: DecoderConfig) -> Params:
    """The parameters on the device, as the programs use them.

    These would bring them into that form themselves, each time that they run.
    """
    return jax.jit(lambda p: blocks.unfolded(cfg, decoder.with_ends(p, cfg)))(params)


def prefill(
    params: Params,
    staging: Segment,
    tokens: jax.Array,
    start: jax.Array,
    cfg: DecoderConfig,
) -> Segment:
    """`staging` with the keys and values of a chunk of a prompt, tokens i32[1, b], from `start` on.

    Columns before `start` i32[] are there already. What pads the last chunk on the right is never
    looked at.
    """
    b, S = tokens.shape[1], staging.columns
    position = start + jnp.arange(b)[None]  # [1, b]
    mask = jnp.arange(S) <= position[..., None]
    _, staging = decoder.forward(params, cfg, tokens, position, mask, (), staging, start)
    return staging


def insert(state: Slots, slot: jax.Array, staging: Segment, request: Request) -> Slots:
    """The slots with `request` in number `slot` i32[].

    Its prompt, the first `request.position` columns of `staging`, ends before the ring's column.
    """
    C = state.ring.columns
    source = (jnp.arange(C) - state.column + request.position) % C
    row = Segment(
        k=jax.tree.map(lambda x: x[..., source], staging.k),
        v=jax.tree.map(lambda x: x[..., source, :], staging.v),
    )
    put = lambda ring, row: jax.lax.dynamic_update_slice_in_dim(ring, row, slot, ROWS)  # noqa: E731
    return state.replace(
        ring=jax.tree.map(put, state.ring, row),
        live=state.live.at[slot].set(True),
        request=jax.tree.map(lambda rows, one: rows.at[slot].set(one), state.request, request),
    )


def step(
    params: Params,
    state: Slots,
    keep: jax.Array,
    cfg: DecoderConfig,
    s: SlotSettings,
    rows: int,
    count: int,
) -> tuple[Slots, Round]:
    """The slots after `count` tokens more in the first `rows` of them, and these tokens.

    It ends early where no row lives on, so that a round too many costs nothing.
    keep bool[R]: the other slots are emptied first. No slot past `rows` may hold a live request.
    """
    state = state.replace(live=state.live & keep)
    params = blocks.unfolded(cfg, decoder.with_ends(params, cfg))
    ring = jax.tree.map(lambda x: x[..., :rows, :, :, :], state.ring)
    live, request = jax.tree.map(lambda x: x[:rows], (state.live, state.request))
    # Those of the first response of a group in the sampler.
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(request.seed)

    def goes_on(carry):
        i, _, (_, live, _), _ = carry
        return (i < count) & live.any()

    def one(carry):
        i, column, (ring, live, request), written = carry
        age = (column - jnp.arange(s.columns)) % s.columns
        hidden, ring = decoder.forward(
            params,
            cfg,
            request.token[:, None],
            request.position[:, None],
            (age <= request.position[:, None])[:, None],
            (),
            ring,
            column,
        )
        logits = decoder.logits(params, cfg, hidden[:, 0])
        live, request, wrote = _choose(logits, live, request, keys, s)
        written = jax.tree.map(lambda rows, new: rows.at[i].set(new), written, wrote)
        return i + 1, (column + 1) % s.columns, (ring, live, request), written

    carry = jnp.int32(0), state.column, (ring, live, request), _nothing(count, rows)
    _, column, (ring, live, request), written = jax.lax.while_loop(goes_on, one, carry)
    put = jax.lax.dynamic_update_slice_in_dim
    ring = jax.tree.map(lambda whole, part: put(whole, part, 0, ROWS), state.ring, ring)
    live, request = jax.tree.map(
        lambda whole, part: put(whole, part, 0, 0), (state.live, state.request), (live, request)
    )
    return Slots(column=column, ring=ring, live=live, request=request), written


def _nothing(count: int, rows: int) -> Round:
    """A Round in which nobody was live."""
    shape = count, rows
    no = jnp.zeros(shape, bool)
    return Round(
        token=jnp.zeros(shape, jnp.int32),
        logp=jnp.zeros(shape),
        margin=jnp.full(shape, -jnp.inf),
        real=no,
        called=no,
        ended=no,
    )


def _choose(
    logits: jax.Array, live: jax.Array, request: Request, keys: jax.Array, s: SlotSettings
) -> tuple[jax.Array, Request, Round]:
    """(who lives on, the requests after one token more, that token), from logits f32[R, V]."""
    row = jnp.arange(len(logits))[:, None]
    logits = logits.at[row, request.logit_ids].add(request.logit_values, mode="drop")
    last = jnp.where(request.written > 0, request.token, -1)
    decided = decision.decide(s.marker, last, logits)
    opened = request.opening == Opening.OPEN
    # The margin decides a call at any temperature, which is for the other tokens.
    called = ~opened & (decided.margin > -request.bias)
    token, logp = decision.choose_each(
        decided,
        logits,
        jnp.where(opened, 0.0, -jnp.inf),
        keys,
        request.written,
        request.temperature,
        request.top_p,
    )
    token = jnp.where(called, decided.call, token).astype(jnp.int32)
    written = request.written + 1
    ended = called | jnp.isin(token, jnp.array(s.eos_ids, jnp.int32)) | (written >= request.limit)
    after = request.replace(
        token=token,
        position=request.position + 1,
        opening=s.marker.answer_open.after(request.opening, token),
        written=written,
    )
    wrote = Round(
        token=token,
        logp=logp,
        margin=jnp.where(opened, -jnp.inf, decided.margin),
        real=live,
        called=called & live,
        ended=ended & live,
    )
    return live & ~ended, after, wrote


class Programs(NamedTuple):
    """The compiled programs; what they change is given to them.

    prefill: of a whole chunk. admit: the last chunk of a prompt, and its insertion, from the words
    of `pack_last`. step returns a round as `pack_round` has it.
    """

    prefill: Callable
    admit: Callable
    step: dict[tuple[int, int], Callable]  # by rows and K


@functools.cache
def programs(cfg: DecoderConfig, s: SlotSettings) -> Programs:
    """The programs of a model and settings; each is compiled at its first call."""

    def admit(params: Params, state: Slots, staging: Segment, words: jax.Array):
        slot, start, rest = words[0], words[1], words[2:]
        request, tokens = rest[:REQUEST_WORDS], rest[REQUEST_WORDS:]
        staging = prefill(params, staging, tokens[None], start, cfg)
        return insert(state, slot, staging, unpack_request(request)), staging

    def packed_step(params: Params, state: Slots, keep: jax.Array, rows: int, count: int):
        state, written = step(params, state, keep, cfg, s, rows, count)
        return state, pack_round(written)

    return Programs(
        prefill=jax.jit(partial(prefill, cfg=cfg), donate_argnums=1),
        admit=jax.jit(admit, donate_argnums=(1, 2)),
        step={
            (rows, count): jax.jit(partial(packed_step, rows=rows, count=count), donate_argnums=1)
            for rows in s.ladder
            for count in STEPS
        },
    )
