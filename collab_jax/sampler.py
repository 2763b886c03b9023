"""The sampler: one prefill a prompt, its cache repeated G times, then one `while_loop` that ends when all rows ended.

Margins. The marker's first token (the *decision token*) is what decides a call. Decision states are the steps before
`<answer>` opens; at one of them m_t = (logit of the decision token) - (best other logit), before any bias. A bias beta
on that logit at decision states leaves a greedy response as it is until the first t with m_t + beta > 0, and calls
there. So one greedy pass with beta = -inf (the marker disallowed) holds, in its trace of m_t, the decision for every
beta: `call_at`. A response that was cut off has a trace too; that it goes first to the cloud is the router's business.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from collab_jax.models import decoder
from collab_jax.models.decoder import Cache, DecoderConfig, Params


class Marker(NamedTuple):
    """What the sampler knows of the call. decision_id: one token; answer_open: each token sequence that opens an answer."""

    decision_id: int
    answer_open: tuple[tuple[int, ...], ...]


@flax.struct.dataclass
class Samples:
    """G responses for each of P prompts, T columns."""

    tokens: jax.Array  # i32[P, G, T], pad off the mask
    logp: jax.Array  # f32[P, G, T], of the sampling distribution; for greedy, of the biased one at temperature 1
    mask: jax.Array  # bool[P, G, T], EOS in
    ended: jax.Array  # bool[P, G], False: cut off at T
    margins: jax.Array  # f32[P, G, T], m_t; -inf off decision states


@flax.struct.dataclass
class SampleState:
    """The loop's state over B = P * G rows."""

    t: jax.Array  # i32[], column to be written next
    cache: Cache
    logits: jax.Array  # f32[B, V], for column t
    window: jax.Array  # i32[B, W], last tokens, to see an answer open
    opened: jax.Array  # bool[B], the answer is open: no decision state any more
    ended: jax.Array  # bool[B]
    tokens: jax.Array  # i32[B, T]
    logp: jax.Array  # f32[B, T]
    mask: jax.Array  # bool[B, T]
    margins: jax.Array  # f32[B, T]


def prompt_keys(seed: int | jax.Array, step: int | jax.Array, index: jax.Array) -> jax.Array:
    """A key for each prompt, [P], from its *global* index i32[P]: the same on any number of devices and in any slot."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """logits [B, V] with all but the smallest set of tokens of probability >= top_p at -inf; the best always stays."""
    order = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(order), axis=-1) - jax.nn.softmax(order)  # mass of the strictly better ones
    threshold = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, order[:, :1]), logits, -jnp.inf)


def sample(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    marker_bias: float | jax.Array = 0.0,
    *,
    group: int,
    max_new: int,
    temperature: float,
    top_p: float,
    eos_ids: tuple[int, ...],
    pad_id: int,
    marker: Marker,
) -> Samples:
    """`group` responses of up to `max_new` tokens for each prompt.

    prompts i32[P, L] padded on the left, prompt_mask bool[P, L], keys [P] (ignored by greedy: temperature 0).
    marker_bias is added to the decision token's logit at decision states: 0 is natural, -inf disallows the marker.
    """
    P, L = prompts.shape
    B, T = P * group, max_new
    hidden, cache = decoder.forward(
        params,
        cfg,
        prompts,
        decoder.positions_of(prompt_mask),
        jnp.pad(decoder.causal_mask(prompt_mask), ((0, 0), (0, 0), (0, T))),
        decoder.init_cache(cfg, P, L + T),
    )
    first = decoder.logits(params, cfg, hidden[:, -1])
    prompt_length = jnp.repeat(prompt_mask.sum(1), group)  # [B]
    seen_prompt = jnp.repeat(prompt_mask, group, axis=0)  # [B, L]
    row_keys = jax.vmap(lambda key: jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(group)))(keys).reshape(B)
    width = max(len(ids) for ids in marker.answer_open)
    is_decision = jnp.arange(cfg.vocab_size) == marker.decision_id

    def pick(state: SampleState) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(tokens i32[B], their log-probabilities f32[B], margins f32[B]) at column t."""
        others = jnp.where(is_decision, -jnp.inf, state.logits)
        gap = state.logits[:, marker.decision_id] - others.max(-1)
        bias = jnp.where(state.opened, 0.0, marker_bias)
        scaled = jnp.where(is_decision, state.logits + bias[:, None], state.logits)
        if temperature > 0:
            scaled = scaled / temperature
            scaled = nucleus(scaled, top_p) if top_p < 1 else scaled
            now = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.t)
            token = jax.vmap(jax.random.categorical)(now, scaled)
        else:
            # The comparison of `call_at`; argmax of `scaled` differs from it at a tie and where the sum is rounded.
            token = jnp.where(gap > -bias, marker.decision_id, jnp.argmax(others, axis=-1))
        chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(scaled, axis=-1), jnp.where(state.opened, -jnp.inf, gap)

    def body(state: SampleState) -> SampleState:
        token, logp, margin = pick(state)
        live = ~state.ended
        token = jnp.where(live, token, pad_id).astype(jnp.int32)
        window = jnp.concatenate([state.window[:, 1:], token[:, None]], axis=1)
        opened = state.opened
        for ids in marker.answer_open:
            opened |= (window[:, width - len(ids) :] == jnp.array(ids)).all(1)
        at = (jnp.int32(0), state.t)
        put = lambda whole, column: jax.lax.dynamic_update_slice(whole, column[:, None], at)  # noqa: E731
        columns = jnp.broadcast_to(jnp.arange(T) <= state.t, (B, T))
        hidden, cache = decoder.forward(
            params,
            cfg,
            token[:, None],
            (prompt_length + state.t)[:, None],
            jnp.concatenate([seen_prompt, columns], axis=1)[:, None],
            state.cache,
        )
        return SampleState(
            t=state.t + 1,
            cache=cache,
            logits=decoder.logits(params, cfg, hidden[:, 0]),
            window=window,
            opened=opened,
            ended=state.ended | jnp.isin(token, jnp.array(eos_ids)),
            tokens=put(state.tokens, token),
            logp=put(state.logp, jnp.where(live, logp, 0.0)),
            mask=put(state.mask, live),
            margins=put(state.margins, jnp.where(live, margin, -jnp.inf)),
        )

    start = SampleState(
        t=jnp.zeros((), jnp.int32),
        cache=decoder.repeat_cache(cache, group),
        logits=jnp.repeat(first, group, axis=0),
        window=jnp.full((B, width), -1, jnp.int32),
        opened=jnp.zeros(B, bool),
        ended=jnp.zeros(B, bool),
        tokens=jnp.full((B, T), pad_id, jnp.int32),
        logp=jnp.zeros((B, T)),
        mask=jnp.zeros((B, T), bool),
        margins=jnp.full((B, T), -jnp.inf),
    )
    end = jax.lax.while_loop(lambda s: (s.t < T) & ~s.ended.all(), body, start)
    rows = jax.tree.map(
        lambda x: x.reshape(P, group, *x.shape[1:]),
        {"tokens": end.tokens, "logp": end.logp, "mask": end.mask, "ended": end.ended, "margins": end.margins},
    )
    return Samples(**rows)


def call_at(margins, beta: float):
    """First decision state with m_t + beta > 0, i32[...], or -1 where there is none; margins [..., T] of any array type."""
    crossed = margins > -float(beta)  # a weak scalar: in float32, as on the device
    return jnp.where(crossed.any(-1), crossed.argmax(-1), -1)
