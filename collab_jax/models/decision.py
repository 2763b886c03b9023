"""The decision to call, at one step: its tokens, its margin, and how the next token is chosen.

The marker's first token (the *decision token*) decides a call. Decision states are the steps before
`<answer>` opens; at one of them the margin is m_t = (logit of the decision token) - (best other
logit), before any bias. A bias beta on that logit at decision states leaves a greedy response as it
is until the first t with m_t + beta > 0, and calls there. So one greedy pass with beta = -inf (the
marker disallowed) holds, in its trace of m_t, the decision for every beta: see `call_at`. A
response that was cut off has a trace too; routers rank it first for the cloud.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class PlainMarker(NamedTuple):
    """Tokens that decide a call spelt out in plain text; `models/text.py` finds them."""

    anywhere: tuple[int, ...]  # decide after any token
    stems: tuple[int, ...]
    after: tuple[int, ...]  # decide after one of the stems

    def deciding(self, last: jax.Array, vocabulary: int) -> jax.Array:
        """bool[R, V]: which tokens decide a call after the tokens last i32[R]; -1 at the start."""
        member = lambda ids: jnp.asarray(np.isin(np.arange(vocabulary), ids))  # noqa: E731
        after_stem = member(self.stems)[last] & (last >= 0)
        return member(self.anywhere) | (after_stem[:, None] & member(self.after))


class Marker(NamedTuple):
    """How a call and an answer begin, in tokens.

    answer_open: each token sequence that opens an answer. decision_id: the one token that decides a
    call, or None with `plain`. With `plain`, m_t is the best deciding token's logit less the best
    other's, -inf where no token would decide, and a bias is added to all that would.
    """

    decision_id: int | None
    answer_open: tuple[tuple[int, ...], ...]
    plain: PlainMarker | None = None


class Decision(NamedTuple):
    """What the logits f32[R, V] of one step say about a call."""

    deciding: jax.Array  # bool[V] or bool[R, V], the tokens that decide a call
    others: jax.Array  # f32[R, V], logits of all other tokens; -inf for these
    call: int | jax.Array  # the best deciding token: i32[R], or one for all rows
    margin: jax.Array  # f32[R], m_t


def decide(marker: Marker, recent: jax.Array, logits: jax.Array) -> Decision:
    """The Decision in logits f32[R, V] after the tokens recent i32[R, W]; -1 before the start."""
    if marker.plain is not None:
        deciding = marker.plain.deciding(recent[:, -1], logits.shape[1])
        others = jnp.where(deciding, -jnp.inf, logits)
        calls = jnp.where(deciding, logits, -jnp.inf)
        call, margin = jnp.argmax(calls, axis=-1), calls.max(-1) - others.max(-1)
        return Decision(deciding, others, call, margin)
    call = marker.decision_id
    assert call is not None, "a Marker has a decision_id, or else plain"
    deciding = jnp.arange(logits.shape[1]) == call
    others = jnp.where(deciding, -jnp.inf, logits)
    return Decision(deciding, others, call, logits[:, call] - others.max(-1))


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """logits [B, V] with -inf outside the smallest set of tokens of probability >= top_p.

    The best token always stays.
    """
    order = jnp.sort(logits, axis=-1, descending=True)
    # Mass of the strictly better ones.
    before = jnp.cumsum(jax.nn.softmax(order), axis=-1) - jax.nn.softmax(order)
    threshold = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, order[:, :1]), logits, -jnp.inf)


def choose(
    decision: Decision,
    logits: jax.Array,
    bias: jax.Array,
    keys: jax.Array,
    t: jax.Array,
    temperature: float,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """(the next token i32[R], its log-probability f32[R]) from logits f32[R, V].

    bias f32[R] is added to the tokens that decide a call. keys [R] and the column t i32[] are the
    randomness; a temperature of 0 is greedy and ignores them.
    """
    scaled = jnp.where(decision.deciding, logits + bias[:, None], logits)
    if temperature > 0:
        scaled = scaled / temperature
        scaled = nucleus(scaled, top_p) if top_p < 1 else scaled
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        token = jax.vmap(jax.random.categorical)(now, scaled)
    else:
        # The comparison of `call_at`; argmax of `scaled` differs from it at a tie and where the sum
        # is rounded.
        calls = decision.margin > -bias
        token = jnp.where(calls, decision.call, jnp.argmax(decision.others, axis=-1))
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(scaled, axis=-1)


def call_at(margins: Any, beta: float) -> jax.Array:
    """The first decision state with m_t + beta > 0, i32[...], or -1 where there is none.

    margins [..., T] of any array type.
    """
    crossed = margins > -float(beta)  # a weak scalar: in float32, as on the device
    return jnp.where(crossed.any(-1), crossed.argmax(-1), -1)
