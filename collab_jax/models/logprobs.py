"""Log-probabilities of given responses, without ever holding logits [B, T, V]."""

import functools

import jax
import jax.numpy as jnp

from collab_jax.models import decoder
from collab_jax.models.decoder import DecoderConfig, Params, Segment


def token_logprobs(
    params: Params,
    cfg: DecoderConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int,
    barred: jax.Array | None = None,
) -> jax.Array:
    """log p(target) f32[B, T] from hidden [B, T, E], `chunk` columns at a time.

    barred: i32[B, T], a token that was disallowed there, or -1; None: none was.

    Where there are several chunks they are rematerialised in the backward pass, so that at most [B,
    chunk, V] logits exist.
    """

    def one(hidden, targets, barred):
        rows = hidden.reshape(
            -1, hidden.shape[-1]
        )  # XLA's CPU compiler takes half as long again for [B, chunk, V]
        scaled = decoder.logits(params, cfg, rows) / temperature
        if barred is not None:
            scaled = jnp.where(
                jnp.arange(scaled.shape[1]) == barred.reshape(-1, 1), -jnp.inf, scaled
            )
        chosen = jnp.take_along_axis(scaled, targets.reshape(-1, 1), axis=-1)[:, 0]
        return (chosen - jax.nn.logsumexp(scaled, axis=-1)).reshape(targets.shape)

    T = targets.shape[1]
    if T > chunk:
        one = jax.checkpoint(one)
    cut = lambda x, i: None if x is None else x[:, i : i + chunk]  # noqa: E731
    parts = [one(cut(hidden, i), cut(targets, i), cut(barred, i)) for i in range(0, T, chunk)]
    return jnp.concatenate(parts, axis=1)


def continued_hidden(
    params: Params,
    cfg: DecoderConfig,
    last: jax.Array,
    prompt: Segment,
    prompt_mask: jax.Array,
    responses: jax.Array,
) -> jax.Array:
    """Hidden states [B, T, E] that predict the tokens of responses i32[B, T]: before each of them,
    after the one before.

    last [P, E], prompt and prompt_mask bool[P, L] are of P prompts that `prefill` has computed,
    each with B / P responses that lie together. Padding after a response changes nothing before it,
    so no mask is needed; there, the result is anything.
    """
    B, T = responses.shape
    repeat = functools.partial(jnp.repeat, repeats=B // prompt_mask.shape[0], axis=0)
    seen, hidden = repeat(prompt_mask), repeat(last)[:, None]
    if T == 1:
        return hidden
    t = T - 1
    sees_prompt = jnp.broadcast_to(seen[:, None], (B, t, seen.shape[1]))
    sees_response = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (B, t, t))
    positions = seen.sum(1, keepdims=True) + jnp.arange(t)
    mask = jnp.concatenate([sees_prompt, sees_response], axis=2)
    body, _ = decoder.forward(params, cfg, responses[:, :-1], positions, mask, (prompt,))
    return jnp.concatenate([hidden, body], axis=1)


def continued_logprobs(
    params: Params,
    cfg: DecoderConfig,
    last: jax.Array,
    prompt: Segment,
    prompt_mask: jax.Array,
    responses: jax.Array,
    temperature: float,
    chunk: int,
    barred: jax.Array | None = None,
) -> jax.Array:
    """log pi(token | what came before) f32[B, T] of responses i32[B, T]: `continued_hidden`, then
    `token_logprobs`.
    """
    hidden = continued_hidden(params, cfg, last, prompt, prompt_mask, responses)
    return token_logprobs(params, cfg, hidden, responses, temperature, chunk, barred)


def response_logprobs(
    params: Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """`continued_logprobs`, f32[B, T], from prompts i32[P, L] padded on the left and their mask
    bool[P, L].
    """
    last, prompt = decoder.prefill(params, cfg, prompts, prompt_mask)
    return continued_logprobs(params, cfg, last, prompt, prompt_mask, responses, temperature, chunk)
