"""The decision to call, at one step: its tokens, its margin, and how the next token is chosen.

The marker's first token (the *decision token*) decides a call. Decision states are the steps before
`<answer>` opens, or all steps (NEVER); at one of them the margin is m_t = (logit of the decision
token) - (best other logit), before any bias. A bias beta on that logit at decision states leaves a
greedy response as it is until the first t with m_t + beta > 0, and calls there. So one greedy pass
with beta = -inf (the marker disallowed) holds, in its trace of m_t, the decision for every beta:
see `call_at`. A response that was cut off has a trace too; routers rank it first for the cloud.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ANSWER = "<answer>"


class Opening(NamedTuple):
    """Sees an answer open in the text that tokens make, wherever the text is cut; static.

    A state is the number of characters of "<answer>" that the text so far ends with, 0 at its
    start. The last state, OPEN, means that all of it was written, and is never left. transitions:
    i8[OPEN, V], the state after each token, as bytes, which can be compared and hashed. A token of
    V or more, of which a model may have rows, writes nothing of it.
    """

    transitions: bytes

    OPEN = len(ANSWER)

    @property
    def table(self) -> np.ndarray:
        """The transitions, i8[OPEN, V]."""
        return np.frombuffer(self.transitions, np.int8).reshape(self.OPEN, -1)

    @property
    def possible(self) -> bool:
        """Whether some tokens open an answer."""
        states, more = set(), {0}
        while more - states:
            states |= more
            more = set(self.table[sorted(states - {self.OPEN})].ravel().tolist())
        return self.OPEN in states

    def states(self, tokens: Iterable[int]) -> list[int]:
        """The state after each token, on the host."""
        table, state, states = self.table, 0, []
        for token in tokens:
            if state != self.OPEN:
                state = int(table[state, token]) if token < table.shape[1] else 0
            states.append(state)
        return states

    def after(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The states i8[R] after the tokens i32[R], from the states i8[R] before."""
        after = jnp.asarray(self.table).at[state, token].get(mode="fill", fill_value=0)
        return jnp.where(state == self.OPEN, state, after)


def opening(pieces: Sequence[str]) -> Opening:
    """The Opening of a vocabulary, from the text of each of its V tokens."""
    table = np.zeros((len(ANSWER), len(pieces)), np.int8)
    for token, piece in enumerate(pieces):
        # Others end with nothing of it, whatever was before.
        if piece[:1] in ANSWER or ANSWER[0] in piece:
            table[:, token] = [_written(ANSWER[:n] + piece) for n in range(len(ANSWER))]
    return Opening(table.tobytes())


def _written(text: str) -> int:
    """How many characters of "<answer>" the text ends with; all, if it is anywhere in it."""
    if ANSWER in text:
        return len(ANSWER)
    return next(n for n in reversed(range(len(ANSWER))) if text.endswith(ANSWER[:n]))


NEVER = Opening(bytes(Opening.OPEN))  # of no token: all steps are decision states


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
    """How a call begins, in tokens, and until when it may: answer_open, or NEVER.

    decision_id: the one token that decides a call, or None with `plain`. With `plain`, m_t is the
    best deciding token's logit less the best other's, -inf where no token would decide, and a bias
    is added to all that would.
    """

    decision_id: int | None
    answer_open: Opening
    plain: PlainMarker | None = None


class Decision(NamedTuple):
    """What the logits f32[R, V] of one step say about a call."""

    deciding: jax.Array  # bool[V] or bool[R, V], the tokens that decide a call
    others: jax.Array  # f32[R, V], logits of all other tokens; -inf for these
    call: int | jax.Array  # the best deciding token: i32[R], or one for all rows
    margin: jax.Array  # f32[R], m_t


def decide(marker: Marker, last: jax.Array, logits: jax.Array) -> Decision:
    """The Decision in logits f32[R, V] after the tokens last i32[R]; -1 at the start."""
    if marker.plain is not None:
        deciding = marker.plain.deciding(last, logits.shape[1])
        others = jnp.where(deciding, -jnp.inf, logits)
        calls = jnp.where(deciding, logits, -jnp.inf)
        call, margin = jnp.argmax(calls, axis=-1), calls.max(-1) - others.max(-1)
        return Decision(deciding, others, call, margin)
    call = marker.decision_id
    assert call is not None, "a Marker has a decision_id, or else plain"
    deciding = jnp.arange(logits.shape[1]) == call
    others = jnp.where(deciding, -jnp.inf, logits)
    return Decision(deciding, others, call, logits[:, call] - others.max(-1))


def nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """logits [B, V] with -inf outside the smallest set of tokens of probability >= top_p.

    top_p may be f32[B, 1]. The best token always stays.
    """
    order = jnp.sort(logits, axis=-1, descending=True)
    # Mass of the strictly better ones.
    before = jnp.cumsum(jax.nn.softmax(order), axis=-1) - jax.nn.softmax(order)
    threshold = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, order[:, :1]), logits, -jnp.inf)


def invert(logits: jax.Array, u: jax.Array) -> jax.Array:
    """The token i32[R] at which the distribution function of softmax(logits f32[R, V]) passes u.

    u f32[R] is in [0, 1). One random number a row instead of one a token: on a CPU, Gumbel noise
    for a vocabulary of some 50,000 takes many times as long. First the block of 256 tokens is
    found, then the token in it.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -logits.shape[1] % 256))).reshape(len(logits), -1, 256)
    masses = blocks.sum(-1)
    block, rest = _passing(masses, u * masses.sum(-1))
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token, _ = _passing(within, rest)
    return (block * 256 + token).astype(jnp.int32)


def _passing(masses: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(where the running sum of masses f32[R, n] passes the level f32[R], the level's rest there).

    It is never a place without mass. A level that rounding put beyond the sum is passed where the
    mass is largest.
    """
    sums = jnp.cumsum(masses, axis=-1)
    passed = (sums > level[:, None]) & (masses > 0)
    place = jnp.where(passed.any(-1), passed.argmax(-1), masses.argmax(-1))
    at = lambda x: jnp.take_along_axis(x, place[:, None], axis=-1)[:, 0]  # noqa: E731
    return place, level - (at(sums) - at(masses))


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

    bias f32[R] is added to the tokens that decide a call. keys [R] and the column t i32[] or i32[R]
    are the randomness; a temperature of 0 is greedy and ignores them.
    """
    scaled = _biased(decision, logits, bias)
    if temperature > 0:
        scaled = scaled / temperature
        scaled = nucleus(scaled, top_p) if top_p < 1 else scaled
        token = _drawn(scaled, keys, t)
    else:
        token = _best(decision, bias)
    return token, _log_probability(scaled, token)


def choose_each(
    decision: Decision,
    logits: jax.Array,
    bias: jax.Array,
    keys: jax.Array,
    t: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`choose` where each row has its own temperature f32[R] and top_p f32[R].

    What no row asks for is not computed.
    """
    drawn, cut = temperature > 0, (temperature > 0) & (top_p < 1)
    scaled = _biased(decision, logits, bias)
    scaled = scaled / jnp.where(drawn, temperature, 1.0)[:, None]
    scaled = jax.lax.cond(
        cut.any(),
        lambda: jnp.where(cut[:, None], nucleus(scaled, top_p[:, None]), scaled),
        lambda: scaled,
    )
    best = _best(decision, bias)
    token = jax.lax.cond(
        drawn.any(), lambda: jnp.where(drawn, _drawn(scaled, keys, t), best), lambda: best
    )
    return token, _log_probability(scaled, token)


def _biased(decision: Decision, logits: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.where(decision.deciding, logits + bias[:, None], logits)


def _drawn(scaled: jax.Array, keys: jax.Array, t: jax.Array) -> jax.Array:
    """A token i32[R] drawn from softmax(scaled f32[R, V])."""
    now = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(t, keys.shape))
    return invert(scaled, jax.vmap(jax.random.uniform)(now))


def _best(decision: Decision, bias: jax.Array) -> jax.Array:
    """The greedy token i32[R].

    By the comparison of `call_at`; argmax of the biased logits differs from it at a tie and where
    the sum is rounded.
    """
    calls = decision.margin > -bias
    return jnp.where(calls, decision.call, jnp.argmax(decision.others, axis=-1)).astype(jnp.int32)


def _log_probability(scaled: jax.Array, token: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def call_at(margins: Any, beta: float) -> jax.Array:
    """The first decision state with m_t + beta > 0, i32[...], or -1 where there is none.

    margins [..., T] of any array type.
    """
    crossed = margins > -float(beta)  # a weak scalar: in float32, as on the device
    return jnp.where(crossed.any(-1), crossed.argmax(-1), -1)
