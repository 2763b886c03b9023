"""Log-probabilities of given responses, without ever holding logits [B, T, V]."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.models import decoder
from collab_jax.models.attention import Sight
from collab_jax.models.decoder import DecoderConfig, Params, Segment


def token_logprobs(
    params: Params,
    cfg: DecoderConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """log p(target) f32[B, T] of targets i32[B, T], from hidden [B, T, E].

    It is computed `chunk` columns at a time, see `_by_chunk`.
    """

    def one(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        scaled = _scaled_logits(params, cfg, hidden, temperature)
        chosen = _at(scaled, targets) - jax.nn.logsumexp(scaled, axis=-1)
        return chosen.reshape(targets.shape)

    return _by_chunk(one, chunk, hidden, targets)


class BarredScores(NamedTuple):
    """Of targets and barred tokens, f32[B, T] each."""

    logp: jax.Array  # log p(target) in the distribution without the barred token
    odds: jax.Array  # log-odds of the barred token against all others, -inf where none is
    # logits that it is ahead of the best other one at temperature 1, likewise; the gradient moves
    # the barred token's logit alone
    margin: jax.Array


def barred_scores(
    params: Params,
    cfg: DecoderConfig,
    hidden: jax.Array,
    targets: jax.Array,
    barred: jax.Array,
    temperature: float,
    chunk: int,
) -> BarredScores:
    """What the model says of targets i32[B, T] where a token is disallowed, and of that token.

    barred i32[B, T]: the token that was disallowed at each place, or -1. hidden [B, T, E]; `chunk`
    columns at a time, see `_by_chunk`.
    """

    def one(hidden: jax.Array, targets: jax.Array, barred: jax.Array) -> BarredScores:
        scaled = _scaled_logits(params, cfg, hidden, temperature)
        token = barred.reshape(-1)
        others = jnp.where(jnp.arange(scaled.shape[1]) == token[:, None], -jnp.inf, scaled)
        total, own = jax.nn.logsumexp(others, axis=-1), _at(scaled, jnp.maximum(token, 0))
        ahead = (own - jax.lax.stop_gradient(others.max(axis=-1))) * temperature
        return BarredScores(
            logp=(_at(others, targets) - total).reshape(targets.shape),
            odds=jnp.where(token >= 0, own - total, -jnp.inf).reshape(targets.shape),
            margin=jnp.where(token >= 0, ahead, -jnp.inf).reshape(targets.shape),
        )

    return _by_chunk(one, chunk, hidden, targets, barred)


def _scaled_logits(
    params: Params, cfg: DecoderConfig, hidden: jax.Array, temperature: float
) -> jax.Array:
    """Logits f32[n, V] of hidden [..., E], by the temperature.

    In rows, since XLA's CPU compiler takes half as long again for [B, chunk, V].
    """
    return decoder.logits(params, cfg, hidden.reshape(-1, hidden.shape[-1])) / temperature


def _at(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logits f32[n] of n tokens, one of each row of f32[n, V]."""
    return jnp.take_along_axis(logits, tokens.reshape(-1, 1), axis=-1)[:, 0]


def _by_chunk(one: Callable[..., Any], chunk: int, *arrays: jax.Array) -> Any:
    """one(*arrays), arrays [B, T] or [B, T, ...], computed `chunk` columns at a time.

    Several chunks are computed again in the backward pass, so that at most [B, chunk, V] logits
    exist, and whole ones in a loop, so that the program does not grow with T.
    """
    T = arrays[0].shape[1]

    def looped(x: jax.Array) -> jax.Array:  # [B, n * chunk, ...] -> [n, B, chunk, ...]
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    def cut(start: int, stop: int) -> list[jax.Array]:
        return [x[:, start:stop] for x in arrays]

    done = T // chunk * chunk if T >= 2 * chunk else 0  # columns that the loop computes
    parts = []
    if done:
        # Nothing outside a loop's body can take the place of what is computed in it again.
        again = jax.checkpoint(one, prevent_cse=False)
        found = jax.lax.map(lambda part: again(*part), [looped(x) for x in cut(0, done)])
        parts.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, done), found))
    if T > chunk:
        one = jax.checkpoint(one)
    parts += [one(*cut(i, i + chunk)) for i in range(done, T, chunk)]
    return jax.tree.map(lambda *columns: jnp.concatenate(columns, axis=1), *parts)


def continued_hidden(
    params: Params,
    cfg: DecoderConfig,
    last: jax.Array,
    prompt: Segment,
    prompt_mask: jax.Array,
    responses: jax.Array,
) -> jax.Array:
    """The hidden states [B, T, E] that predict the tokens of responses i32[B, T].

    last [P, E], prompt and prompt_mask bool[P, L] are of P prompts that `prefill` has computed,
    each with B / P responses that lie together. Padding after a response changes nothing before it,
    so no mask is needed; the result there has no meaning.
    """
    B, T = responses.shape
    repeat = functools.partial(jnp.repeat, repeats=B // prompt_mask.shape[0], axis=0)
    seen, hidden = repeat(prompt_mask), repeat(last)[:, None]
    if T == 1:
        return hidden
    t = T - 1
    positions = seen.sum(1, keepdims=True) + jnp.arange(t)
    document = jnp.zeros((B, t), jnp.int32)
    sight = Sight(document, jnp.concatenate([jnp.where(seen, 0, -1), document], axis=1))
    body, _ = decoder.forward(params, cfg, responses[:, :-1], positions, sight, (prompt,))
    return jnp.concatenate([hidden, body], axis=1)


def response_logprobs(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """log pi(token | what came before) f32[B, T] of responses i32[B, T] to prompts i32[P, L].

    The prompts are padded on the left, where prompt_mask bool[P, L] is False; each has B / P
    responses that lie together.
    """
    params = decoder.with_ends(params, cfg)
    last, prompt = decoder.prefill(params, cfg, prompts, prompt_mask)
    hidden = continued_hidden(params, cfg, last, prompt, prompt_mask, responses)
    return token_logprobs(params, cfg, hidden, responses, temperature, chunk)
