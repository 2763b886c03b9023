"""The sampler: prompts are computed once, then responses grow token by token in programs that the
host strings together.

    start    prefill; the first token of each of the G responses of a prompt, which share its keys and values
    advance  some columns further: one compiled loop, no word with the host
    compact  rows that ended leave; what goes on is half as many slots

The keys and values of a response lie in segments of a few columns. A segment that is full is only
read from then on, so attention reads what is filled, and the loop carries one small segment. A few
times a response the host looks which rows
ended: it starts the next program, then hands them over to be judged while that runs. So neither a
long tail nor the verdicts hold the devices up. All programs (slots times segments) are compiled at
the first call.

A row's samples depend on its key alone, never on its slot.

Margins. The marker's first token (the *decision token*) is what decides a call. Decision states are
the steps before `<answer>` opens; at one of them m_t = (logit of the decision token) - (best other
logit), before any bias. A bias beta on that logit at decision states leaves a greedy response as it
is until the first t with m_t + beta > 0, and calls there. So one greedy pass with beta = -inf (the
marker disallowed) holds, in its trace of m_t, the decision for every
beta: `call_at`. A response that was cut off has a trace too; that it goes first to the cloud is the
router's business.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.models import decoder
from collab_jax.models.decoder import DecoderConfig, Params, Segment


class PlainMarker(NamedTuple):
    """Tokens that decide a call spelt out in plain text: anywhere, and after one of stems
    (`models/text.py` finds them).
    """

    anywhere: tuple[int, ...]
    stems: tuple[int, ...]
    after: tuple[int, ...]

    def deciding(self, last: jax.Array, vocabulary: int) -> jax.Array:
        """bool[R, V]: the tokens that decide a call after the tokens last i32[R]; -1 at the
        beginning.
        """
        member = lambda ids: jnp.asarray(np.isin(np.arange(vocabulary), ids))  # noqa: E731
        after_stem = member(self.stems)[last] & (last >= 0)
        return member(self.anywhere) | (after_stem[:, None] & member(self.after))


class Marker(NamedTuple):
    """What the sampler knows of the call. answer_open: each token sequence that opens an answer.

    decision_id: the one token that decides, or None with `plain`: then m_t is the best deciding
    token's logit less the best other's, -inf where no token would decide, and a bias is added to
    all that would.
    """

    decision_id: int | None
    answer_open: tuple[tuple[int, ...], ...]
    plain: PlainMarker | None = None


class Settings(NamedTuple):
    """How to sample; static."""

    group: int  # G
    max_new: int  # T
    temperature: float  # 0: greedy
    top_p: float
    eos_ids: tuple[int, ...]
    pad_id: int
    marker: Marker
    segments: int  # pieces in which a response's keys and values lie, about; more: less is read, more is compiled
    slot_counts: (
        int  # B slots, half of it, a quarter, ...: so many programs a segment, down to MIN_SLOTS
    )
    cache_dtype: str  # of keys and values
    solo: int = (
        0  # the first so many responses of each group may not call: the marker is disallowed
    )

    @property
    def columns(self) -> int:
        """Columns of a segment, a multiple of 8. The last of T tokens is never computed."""
        return -(-max(self.max_new - 1, 1) // (8 * self.segments)) * 8

    def ladder(self, rows: int) -> list[int]:
        """The slot counts, falling."""
        counts = [rows]
        while len(counts) < self.slot_counts and counts[-1] > MIN_SLOTS:
            counts.append(-(-counts[-1] // 2))
        return counts


LOOKS = 8  # in T columns, at which rows that ended may leave
MIN_SLOTS = 8  # below, a column costs what starting its operations costs


@flax.struct.dataclass
class Samples:
    """G responses for each of P prompts, T columns."""

    tokens: jax.Array  # i32[P, G, T], pad off the mask
    logp: (
        jax.Array
    )  # f32[P, G, T], of the sampling distribution; for greedy, of the biased one at temperature 1
    mask: jax.Array  # bool[P, G, T], EOS in
    ended: jax.Array  # bool[P, G], False: cut off at T
    margins: jax.Array  # f32[P, G, T], m_t; -inf off decision states


@flax.struct.dataclass
class Context:
    """What `advance` only reads; R slots, of which each holds a row of the B = P * G."""

    row: jax.Array  # i32[R]
    keys: jax.Array  # [R]
    prompt_mask: jax.Array  # bool[R, L]
    prompt: Segment  # of L columns; P rows until the first `compact`, then R
    past: tuple[Segment, ...]  # full ones, of C columns


@flax.struct.dataclass
class SampleState:
    """What `advance` changes."""

    t: jax.Array  # i32[], columns sampled so far
    token: jax.Array  # i32[R], the last one, whose keys and values are not computed yet
    window: jax.Array  # i32[R, W], last tokens, to see an answer open
    opened: jax.Array  # bool[R], the answer is open: no decision state any more
    ended: jax.Array  # bool[R]
    open: Segment  # of C columns, being filled; what lies past column t - 1 is stale
    samples: Samples  # of all rows


def prompt_keys(seed: int | jax.Array, step: int | jax.Array, index: jax.Array) -> jax.Array:
    """A key for each prompt, [P], from its *global* index i32[P]: the same on any number of devices
    and in any slot.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """logits [B, V] with all but the smallest set of tokens of probability >= top_p at -inf; the
    best always stays.
    """
    order = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(order), axis=-1) - jax.nn.softmax(
        order
    )  # mass of the strictly better ones
    threshold = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, order[:, :1]), logits, -jnp.inf)


def _pick(
    state: SampleState, context: Context, logits: jax.Array, marker_bias: jax.Array, s: Settings
) -> SampleState:
    """The state after one more token, from logits f32[R, V]."""
    if s.marker.plain is None:
        is_decision = jnp.arange(logits.shape[1]) == s.marker.decision_id
        others = jnp.where(is_decision, -jnp.inf, logits)
        call, gap = s.marker.decision_id, logits[:, s.marker.decision_id] - others.max(-1)
    else:
        is_decision = s.marker.plain.deciding(state.window[:, -1], logits.shape[1])
        others, calls = (
            jnp.where(is_decision, -jnp.inf, logits),
            jnp.where(is_decision, logits, -jnp.inf),
        )
        call, gap = jnp.argmax(calls, axis=-1), calls.max(-1) - others.max(-1)
    bias = jnp.where(context.row % s.group < s.solo, -jnp.inf, marker_bias)
    bias = jnp.where(state.opened, 0.0, bias)
    scaled = jnp.where(is_decision, logits + bias[:, None], logits)
    if s.temperature > 0:
        scaled = scaled / s.temperature
        scaled = nucleus(scaled, s.top_p) if s.top_p < 1 else scaled
        now = jax.vmap(jax.random.fold_in, (0, None))(context.keys, state.t)
        token = jax.vmap(jax.random.categorical)(now, scaled)
    else:
        # The comparison of `call_at`; argmax of `scaled` differs from it at a tie and where the sum
        # is rounded.
        token = jnp.where(gap > -bias, call, jnp.argmax(others, axis=-1))
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    logp = chosen - jax.nn.logsumexp(scaled, axis=-1)

    live = ~state.ended
    token = jnp.where(live, token, s.pad_id).astype(jnp.int32)
    window = jnp.concatenate([state.window[:, 1:], token[:, None]], axis=1)
    opened = state.opened
    for ids in s.marker.answer_open:
        opened |= (window[:, window.shape[1] - len(ids) :] == jnp.array(ids, jnp.int32)).all(1)
    ended = state.ended | jnp.isin(token, jnp.array(s.eos_ids, jnp.int32))
    home = context.row // s.group, context.row % s.group
    at = *home, state.t  # a row that ended writes what is there already
    samples = state.samples
    samples = Samples(
        tokens=samples.tokens.at[at].set(token),
        logp=samples.logp.at[at].set(jnp.where(live, logp, 0.0)),
        mask=samples.mask.at[at].set(live),
        ended=samples.ended.at[home].set(ended),
        margins=samples.margins.at[at].set(jnp.where(live & ~state.opened, gap, -jnp.inf)),
    )
    return state.replace(
        t=state.t + 1, token=token, window=window, opened=opened, ended=ended, samples=samples
    )


def start(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    marker_bias: jax.Array,
    s: Settings,
) -> tuple[Context, SampleState]:
    """After the first token. prompts i32[P, L] padded on the left, prompt_mask bool[P, L], keys
    [P], marker_bias f32[].
    """
    P, G, T = len(prompts), s.group, s.max_new
    last, prompt = decoder.prefill(params, cfg, prompts, prompt_mask)
    logits = jnp.repeat(decoder.logits(params, cfg, last), G, axis=0)
    context = Context(
        row=jnp.arange(P * G),
        keys=jax.vmap(lambda key: jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(G)))(
            keys
        ).reshape(P * G),
        prompt_mask=jnp.repeat(prompt_mask, G, axis=0),
        prompt=jax.tree.map(lambda x: x.astype(s.cache_dtype), prompt),
        past=(),
    )
    state = SampleState(
        t=jnp.zeros((), jnp.int32),
        token=jnp.zeros(P * G, jnp.int32),
        window=jnp.full((P * G, max(map(len, s.marker.answer_open))), -1, jnp.int32),
        opened=jnp.zeros(P * G, bool),
        ended=jnp.zeros(P * G, bool),
        open=decoder.empty_segment(cfg, P * G, s.columns, s.cache_dtype),
        samples=Samples(
            tokens=jnp.full((P, G, T), s.pad_id, jnp.int32),
            logp=jnp.zeros((P, G, T)),
            mask=jnp.zeros((P, G, T), bool),
            ended=jnp.zeros((P, G), bool),
            margins=jnp.full((P, G, T), -jnp.inf),
        ),
    )
    return context, _pick(state, context, logits, marker_bias, s)


def advance(
    params: Params,
    cfg: DecoderConfig,
    context: Context,
    state: SampleState,
    stop: jax.Array,
    marker_bias: jax.Array,
    s: Settings,
) -> SampleState:
    """On to `stop` columns, i32[], for which the open segment must have room."""
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
        logits = decoder.logits(params, cfg, hidden[:, 0])
        return _pick(state.replace(open=segment), context, logits, marker_bias, s)

    return jax.lax.fori_loop(state.t, stop, column, state)


def compact(context: Context, state: SampleState, slots: int) -> tuple[Context, SampleState]:
    """`slots` slots, at least as many as there are rows that go on; these first."""
    rows = len(context.row)
    stay = jnp.argsort(state.ended, stable=True)[:slots]
    segments = jax.tree.map(
        lambda segment: decoder.take_rows(segment, stay, rows),
        (context.prompt, context.past, state.open),
        is_leaf=lambda x: isinstance(x, Segment),
    )
    slot = lambda tree: jax.tree.map(lambda x: x[stay], tree)  # noqa: E731
    row, keys, prompt_mask = slot((context.row, context.keys, context.prompt_mask))
    token, window, opened, ended = slot((state.token, state.window, state.opened, state.ended))
    context = Context(
        row=row, keys=keys, prompt_mask=prompt_mask, prompt=segments[0], past=segments[1]
    )
    state = state.replace(token=token, window=window, opened=opened, ended=ended, open=segments[2])
    return context, state


class Sampler:
    """The programs of one shape, compiled at the first call, and the host's part of the work.

    wrap(body, donate=(argument, ...)) compiles a body: `jax.jit`, or pmap, whose arrays all have
    one more axis D in front. begin(params, *inputs) -> (Context, SampleState) is the body around
    `start`.
    """

    def __init__(self, cfg: DecoderConfig, settings: Settings, begin: Callable, wrap: Callable):
        self.settings = s = settings
        self._begin = wrap(begin)
        self._advance = wrap(
            lambda params, context, state, stop, bias: advance(
                params, cfg, context, state, stop, bias, s
            ),
            donate=(2,),
        )
        self._compact = functools.cache(
            lambda slots: wrap(lambda context, state: compact(context, state, slots))
        )
        self._programs = {}  # by shape of the prompts

    def _compile(self, params, context: Context, state: SampleState, stop, bias) -> dict:
        """(slots, number of full segments) -> advance, and (slots before, slots, number) ->
        compact.
        """
        ladder = self.settings.ladder(_slots(state))
        jobs = {}
        for j in range(-(-(self.settings.max_new - 1) // self.settings.columns)):
            here, there = context.replace(past=(state.open,) * j), state
            for slots in ladder:
                if slots != ladder[0]:
                    job = jobs[_slots(there), slots, j] = self._compact(slots).lower(
                        *_shapes((here, there))
                    )
                    here, there = job.out_info
                jobs[slots, j] = self._advance.lower(*_shapes((params, here, there, stop, bias)))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(jobs, pool.map(lambda job: job.compile(), jobs.values()), strict=True))

    def __call__(self, params, *inputs, bias, finished: Callable | None = None) -> Samples:
        """Samples of `inputs`, which are those of `begin` after `params`, without the marker's
        bias, which is the last.

        finished(tokens, mask, ended, now): called often while the devices go on, with what there is
        of the samples, on the host, and which rows have just ended or run to T, bool[(D,) P, G]:
        each row once.
        """
        s, T, C = self.settings, self.settings.max_new, self.settings.columns
        context, state = self._begin(params, *inputs, bias)
        full = lambda t: np.full_like(bias, t, np.int32)  # noqa: E731
        if (shape := context.prompt_mask.shape) not in self._programs:
            self._programs[shape] = self._compile(params, context, state, full(0), bias)
        programs = self._programs[shape]
        ladder, t, done = s.ladder(_slots(state)), 1, np.zeros(state.samples.ended.shape, bool)
        while True:
            if (
                t - 1 == (len(context.past) + 1) * C
            ):  # the open segment is full: a copy is kept, and it goes on as room
                context = context.replace(past=(*context.past, jax.tree.map(jnp.copy, state.open)))
            ended = np.asarray(state.samples.ended) | (t == T)
            now, done = ended & ~done, ended
            host = {
                name: np.asarray(getattr(state.samples, name))
                for name in ("tokens", "mask", "ended")
                if finished
            }
            if not done.all():
                # All devices keep the same number of slots, so that they run the same program.
                live = (~done).reshape(-1, ladder[0]).sum(1).max()
                for slots in ladder:
                    if live <= slots < _slots(state):
                        context, state = programs[_slots(state), slots, len(context.past)](
                            context, state
                        )
                t = min(T, t + -(-T // LOOKS), (len(context.past) + 1) * C + 1)
                state = programs[_slots(state), len(context.past)](
                    params, context, state, full(t), bias
                )
            if finished:
                finished(**host, now=now)
            if done.all():
                return state.samples


def _slots(state: SampleState) -> int:
    return state.token.shape[-1]


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.cache
def _single(cfg: DecoderConfig, settings: Settings, wrap: Callable) -> Sampler:
    return Sampler(
        cfg, settings, lambda params, *inputs: start(params, cfg, *inputs, settings), wrap
    )


def _jit(body: Callable, donate: tuple[int, ...] = ()) -> Callable:
    return jax.jit(body, donate_argnums=donate)


def sample(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    marker_bias: float = 0.0,
    *,
    settings: Settings,
    wrap: Callable = _jit,
) -> Samples:
    """Samples on one device: `group` responses of up to `max_new` tokens for each prompt.

    prompts i32[P, L] padded on the left, prompt_mask bool[P, L], keys [P] (ignored by greedy:
    temperature 0). marker_bias is added to the decision token's logit at decision states: 0 is
    natural, -inf disallows the marker.
    """
    return _single(cfg, settings, wrap)(
        params, prompts, prompt_mask, keys, bias=np.float32(marker_bias)
    )


def call_at(margins, beta: float):
    """First decision state with m_t + beta > 0, i32[...], or -1 where there is none; margins [...,
    T] of any array type.
    """
    crossed = margins > -float(beta)  # a weak scalar: in float32, as on the device
    return jnp.where(crossed.any(-1), crossed.argmax(-1), -1)
