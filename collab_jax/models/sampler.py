"""The sampler: responses token by token, in compiled programs that the host strings together.

    start    computes the prompts, and samples the first token of each of the G responses of a
             prompt, which share its keys and values
    advance  samples some columns more, in one compiled loop, without a word with the host
    compact  drops rows that have ended: half as many slots go on

The keys and values of a response lie in segments of a few columns. A segment that is full is only
read from then on, so attention reads no more than what is filled, and the loop carries one small
segment. A few times in a response the host looks which rows have ended: it starts the next program,
then hands these rows over to be judged while the program runs. So neither a long tail nor the
verdicts hold the devices up. All programs (slots times segments) are compiled at the first call.
How one token is chosen stands in `decision.py`.

A row's samples depend on its key alone, never on its slot.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.models import blocks, decision, decoder
from collab_jax.models.decision import Marker
from collab_jax.models.decoder import DecoderConfig, Params, Segment
from collab_jax.runtime import process

LOOKS = 8  # in T columns, at which rows that have ended may leave their slots
MIN_SLOTS = 8  # below, a column costs what starting its operations costs

# ----------------------------------------------------------------------------------------- settings


class SamplerSettings(NamedTuple):
    """How to sample; static.

    segments: about how many pieces the keys and values of a response lie in; with more, less is
    read and more is compiled. slot_counts: how many numbers of slots there are: B, half of it, a
    quarter, down to MIN_SLOTS; each is one more program for each segment.
    """

    group: int  # G
    max_new: int  # T
    temperature: float  # 0: greedy
    top_p: float
    eos_ids: tuple[int, ...]
    pad_id: int
    marker: Marker
    segments: int
    slot_counts: int
    cache_dtype: str  # of keys and values
    keep_hidden: bool = False  # of each response, where its margin was highest

    @property
    def columns(self) -> int:
        """Columns of a segment, a multiple of 8. The last of T tokens is never computed."""
        return -(-max(self.max_new - 1, 1) // (8 * self.segments)) * 8

    @property
    def filled_segments(self) -> int:
        """How many segments T tokens fill, the last perhaps in part."""
        return -(-(self.max_new - 1) // self.columns)

    def ladder(self, rows: int) -> list[int]:
        """The numbers of slots for so many rows, falling."""
        counts = [rows]
        while len(counts) < self.slot_counts and counts[-1] > MIN_SLOTS:
            counts.append(-(-counts[-1] // 2))
        return counts


# ------------------------------------------------------------------------ what the programs pass on


class Samples(flax.struct.PyTreeNode):
    """G responses for each of P prompts, T columns.

    logp is of the sampling distribution; for greedy, of the biased one at temperature 1.
    """

    tokens: jax.Array  # i32[P, G, T], pad off the mask
    logp: jax.Array  # f32[P, G, T]
    mask: jax.Array  # bool[P, G, T], EOS in
    ended: jax.Array  # bool[P, G], False: cut off at T
    margins: jax.Array  # f32[P, G, T], m_t; -inf off decision states
    hidden: jax.Array | None = None  # [P, G, E], the last hidden state where m_t was highest


class Context(flax.struct.PyTreeNode):
    """What `advance` only reads; R slots, each of which holds one of the B = P * G rows."""

    row: jax.Array  # i32[R]
    keys: jax.Array  # [R]
    prompt_mask: jax.Array  # bool[R, L]
    prompt: Segment  # of L columns; P rows until the first `compact`, then R
    past: tuple[Segment, ...]  # full ones, of C columns


class SampleState(flax.struct.PyTreeNode):
    """What `advance` changes."""

    t: jax.Array  # i32[], columns sampled so far
    token: jax.Array  # i32[R], the last one, whose keys and values are not computed yet; -1: none
    opening: jax.Array  # i8[R], see `decision.Opening`; no decision state once it is OPEN
    ended: jax.Array  # bool[R]
    open: Segment  # of C columns, being filled; what lies past column t - 1 is stale
    samples: Samples  # of all rows


# -------------------------------------------------------------------------------- compiled programs


def _append(
    state: SampleState,
    context: Context,
    hidden: jax.Array,
    logits: jax.Array,
    marker_bias: jax.Array,
    s: SamplerSettings,
) -> SampleState:
    """The state after one more token, from hidden [R, E] and its logits f32[R, V]."""
    opened = state.opening == decision.Opening.OPEN
    decided = decision.decide(s.marker, state.token, logits)
    bias = jnp.where(opened, 0.0, marker_bias)
    token, logp = decision.choose(
        decided, logits, bias, context.keys, state.t, s.temperature, s.top_p
    )
    live = ~state.ended
    token = jnp.where(live, token, s.pad_id).astype(jnp.int32)
    ended = state.ended | jnp.isin(token, jnp.array(s.eos_ids, jnp.int32))
    home = context.row // s.group, context.row % s.group
    at = *home, state.t  # a row that ended writes what is there already
    samples = state.samples
    margin = jnp.where(live & ~opened, decided.margin, -jnp.inf)
    if (kept := samples.hidden) is not None:
        higher = margin > samples.margins[home].max(axis=1)
        kept = kept.at[home].set(jnp.where(higher[:, None], hidden, kept[home]))
    samples = Samples(
        tokens=samples.tokens.at[at].set(token),
        logp=samples.logp.at[at].set(jnp.where(live, logp, 0.0)),
        mask=samples.mask.at[at].set(live),
        ended=samples.ended.at[home].set(ended),
        margins=samples.margins.at[at].set(margin),
        hidden=kept,
    )
    opening = s.marker.answer_open.after(state.opening, token)
    return state.replace(t=state.t + 1, token=token, opening=opening, ended=ended, samples=samples)


def start(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    marker_bias: jax.Array,
    s: SamplerSettings,
) -> tuple[Context, SampleState]:
    """The context, and the state after the first token.

    prompts i32[P, L] padded on the left, prompt_mask bool[P, L], keys [P], marker_bias f32[].
    """
    P, G, T = len(prompts), s.group, s.max_new
    last, prompt = decoder.prefill(params, cfg, prompts, prompt_mask)
    logits = decoder.logits(params, cfg, last)
    hidden, logits = (jnp.repeat(x, G, axis=0) for x in (last, logits))
    of_group = lambda key: jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(G))  # noqa: E731
    context = Context(
        row=jnp.arange(P * G),
        keys=jax.vmap(of_group)(keys).reshape(P * G),
        prompt_mask=jnp.repeat(prompt_mask, G, axis=0),
        prompt=jax.tree.map(lambda x: x.astype(s.cache_dtype), prompt),
        past=(),
    )
    state = SampleState(
        t=jnp.zeros((), jnp.int32),
        token=jnp.full(P * G, -1, jnp.int32),
        opening=jnp.zeros(P * G, jnp.int8),
        ended=jnp.zeros(P * G, bool),
        open=decoder.empty_segment(cfg, P * G, s.columns, s.cache_dtype),
        samples=Samples(
            tokens=jnp.full((P, G, T), s.pad_id, jnp.int32),
            logp=jnp.zeros((P, G, T)),
            mask=jnp.zeros((P, G, T), bool),
            ended=jnp.zeros((P, G), bool),
            margins=jnp.full((P, G, T), -jnp.inf),
            hidden=jnp.zeros((P, G, cfg.hidden_size), last.dtype) if s.keep_hidden else None,
        ),
    )
    return context, _append(state, context, hidden, logits, marker_bias, s)


def advance(
    params: Params,
    cfg: DecoderConfig,
    context: Context,
    state: SampleState,
    stop: jax.Array,
    marker_bias: jax.Array,
    s: SamplerSettings,
) -> SampleState:
    """The state at `stop` columns, i32[], for which the open segment must have room."""
    params = blocks.unfolded(cfg, decoder.with_ends(params, cfg))
    R, C, before = len(context.row), s.columns, len(context.past) * s.columns
    prompt_length = context.prompt_mask.sum(1)

    def column(_, state: SampleState) -> SampleState:
        at = state.t - 1  # the column of the token that goes in
        filled = jnp.broadcast_to(jnp.arange(before + C) <= at, (R, before + C))
        hidden, segment = decoder.forward(
            params,
            cfg,
            state.token[:, None],
            (prompt_length + at)[:, None],
            jnp.concatenate([context.prompt_mask, filled], axis=1)[:, None],
            (context.prompt, *context.past),
            state.open,
            at - before,
        )
        hidden = hidden[:, 0]
        logits = decoder.logits(params, cfg, hidden)
        return _append(state.replace(open=segment), context, hidden, logits, marker_bias, s)

    return jax.lax.fori_loop(state.t, stop, column, state)


def advance_body(cfg: DecoderConfig, s: SamplerSettings) -> Callable[..., SampleState]:
    """The body (params, context, state, stop, bias) -> state of `advance`; state may be donated."""
    return lambda params, context, state, stop, bias: advance(
        params, cfg, context, state, stop, bias, s
    )


def compact(context: Context, state: SampleState, slots: int) -> tuple[Context, SampleState]:
    """The same with `slots` slots, at least as many as there are rows that go on; these first."""
    rows = len(context.row)
    stay = jnp.argsort(state.ended, stable=True)[:slots]
    prompt, past, open = jax.tree.map(
        lambda segment: decoder.take_rows(segment, stay, rows),
        (context.prompt, context.past, state.open),
        is_leaf=lambda x: isinstance(x, Segment),
    )
    slot = lambda tree: jax.tree.map(lambda x: x[stay], tree)  # noqa: E731
    row, keys, prompt_mask = slot((context.row, context.keys, context.prompt_mask))
    token, opening, ended = slot((state.token, state.opening, state.ended))
    context = Context(row=row, keys=keys, prompt_mask=prompt_mask, prompt=prompt, past=past)
    state = state.replace(token=token, opening=opening, ended=ended, open=open)
    return context, state


# -------------------------------------------------------------------------------------- on the host

# finished(tokens, mask, ended, now), see `Sampler.__call__`.
Finished = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Wrap(Protocol):
    """What compiles a body: `jax.jit`, or pmap, whose arrays all have one more axis D in front."""

    def __call__(self, body: Callable, donate: tuple[int, ...] = ()) -> Any: ...


class _Programs(NamedTuple):
    """The compiled programs of one shape of prompts."""

    advance: dict[tuple[int, int], Callable]  # by slots, and number of full segments
    compact: dict[tuple[int, int, int], Callable]  # by slots before, slots after, full segments


class Sampler:
    """The programs of one model and its settings, and the host's part of the work.

    begin(params, *inputs, bias) -> (Context, SampleState) is the body around `start`.
    """

    def __init__(self, cfg: DecoderConfig, settings: SamplerSettings, begin: Callable, wrap: Wrap):
        self.settings = settings
        self._wrap = wrap
        self._begin = wrap(begin)
        self._advance = wrap(advance_body(cfg, settings), donate=(2,))
        self._programs: dict[tuple[int, ...], _Programs] = {}  # by shape of the prompts

    def __call__(
        self, params: Params, *inputs: Any, bias: Any, finished: Finished | None = None
    ) -> Samples:
        """Samples for `inputs`, those of `begin` between params and bias, the marker's bias.

        finished(tokens, mask, ended, now) is called often while the devices go on: with the samples
        so far, on the host, and which rows have just ended or run to T, bool[(D,) P, G]. Each row
        is reported once.
        """
        s, T, C = self.settings, self.settings.max_new, self.settings.columns
        context, state = self._begin(params, *inputs, bias)
        full = lambda t: np.full_like(bias, t, np.int32)  # noqa: E731
        if (shape := context.prompt_mask.shape) not in self._programs:
            self._programs[shape] = self._compile(params, context, state, full(0), bias)
        programs = self._programs[shape]
        ladder, t, done = s.ladder(_slots(state)), 1, np.zeros(state.samples.ended.shape, bool)
        while True:
            # If the open segment is full, a copy of it is kept, and it goes on as room.
            if t - 1 == (len(context.past) + 1) * C:
                context = context.replace(past=(*context.past, jax.tree.map(jnp.copy, state.open)))
            ended = np.asarray(state.samples.ended) | (t == T)
            now, done = ended & ~done, ended
            # Read before the next program, to which the state's memory is given.
            whole = state.samples
            so_far = None
            if finished is not None:
                so_far = np.asarray(whole.tokens), np.asarray(whole.mask), np.asarray(whole.ended)
            if not done.all():
                # All devices keep the same number of slots, so that they run the same program.
                live = (~done).reshape(-1, ladder[0]).sum(1).max()
                for slots in ladder:
                    if live <= slots < _slots(state):
                        smaller = programs.compact[_slots(state), slots, len(context.past)]
                        context, state = smaller(context, state)
                t = min(T, t + -(-T // LOOKS), (len(context.past) + 1) * C + 1)
                further = programs.advance[_slots(state), len(context.past)]
                state = further(params, context, state, full(t), bias)
            if finished is not None and so_far is not None:
                tokens, mask, ended_so_far = so_far
                finished(tokens, mask, ended_so_far, now)
            if done.all():
                return state.samples

    def _compile(
        self, params: Params, context: Context, state: SampleState, stop: Any, bias: Any
    ) -> _Programs:
        """Compiles the programs for these shapes, as many at a time as there are cores."""
        ladder = self.settings.ladder(_slots(state))
        advancing, compacting = {}, {}
        for j in range(self.settings.filled_segments):
            here, there = context.replace(past=(state.open,) * j), state
            for slots in ladder:
                if slots != ladder[0]:
                    body = functools.partial(compact, slots=slots)
                    job = self._wrap(body).lower(_shapes(here), _shapes(there))
                    compacting[_slots(there), slots, j] = job
                    here, there = job.out_info
                shapes = _shapes((params, here, there, stop, bias))
                advancing[slots, j] = self._advance.lower(*shapes)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for programs in (advancing, compacting):
                built = pool.map(lambda job: job.compile(), programs.values())
                programs.update(zip(programs, built, strict=True))
        process.return_free_memory()  # the compiler's
        return _Programs(advancing, compacting)


def _slots(state: SampleState) -> int:
    return state.token.shape[-1]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.cache
def _single(cfg: DecoderConfig, settings: SamplerSettings, wrap: Wrap) -> Sampler:
    """The Sampler behind `sample`, compiled once for each of these."""

    def begin(params, prompts, prompt_mask, keys, bias):
        return start(params, cfg, prompts, prompt_mask, keys, bias, settings)

    return Sampler(cfg, settings, begin, wrap)


def _jit(body: Callable, donate: tuple[int, ...] = ()) -> Any:
    return jax.jit(body, donate_argnums=donate)


def sample(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    marker_bias: float = 0.0,
    *,
    settings: SamplerSettings,
    wrap: Wrap = _jit,
) -> Samples:
    """Samples on one device: `group` responses of up to `max_new` tokens for each prompt.

    prompts i32[P, L] padded on the left, prompt_mask bool[P, L], keys [P] (ignored by greedy:
    temperature 0). marker_bias is added to the decision token's logit at decision states: 0 is
    natural, -inf disallows the marker.
    """
    one_device = _single(cfg, settings, wrap)
    return one_device(params, prompts, prompt_mask, keys, bias=np.float32(marker_bias))
