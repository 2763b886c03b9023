"""The gradient of a step on one device: prompts once, then their responses in packed rows.

Each prompt is computed once, in a pass of its own: the keys and values that it leaves are an input
to the responses, so the gradient comes back through them (`dkv`). Responses lie several to a row of
T columns, each beside the others as if it were alone, and `micro_rows` rows are one backward pass.
So a response costs about what its length costs, in one program for all lengths; responses without
an advantage, and prompts after the first `n_prompts`, cost nothing. R is the number of rows, C that
of the responses in one; the other axis letters are those of `gapg.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import gapg
from collab_jax.gapg import Rollout
from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.attention import Sight
from collab_jax.models.decoder import ROWS, DecoderConfig, Params, Segment
from collab_jax.rl import scoring
from collab_jax.rl.scoring import Scored
from collab_jax.rl.signal import has_gradient
from collab_jax.runtime import split

# Of n prompts: last hidden states [n, 1, 1, E], and their segment; ROWS is axis n of every leaf.
KeysValues = tuple[jax.Array, Segment]
# C, the most responses in a row. With more of them short ones would leave less of a row empty, but
# every column of a row is compared with the keys of C prompts.
RESPONSES = 4


class Share(NamedTuple):
    """One device's share of a step, and how it is computed."""

    cfg: DecoderConfig
    frozen: Params | None  # the model that the trained adapter belongs to
    batch: Rollout  # of all devices, Q prompts
    A: jax.Array  # f32[Q, G], advantages
    scored: Scored | None  # the weights of its decisions, where they are scored
    prompts: jax.Array  # i32[P], which prompts of the batch; the first `n_prompts` count
    n_prompts: jax.Array  # i32[]
    micro_rows: int  # packed rows in one backward pass
    temperature: float
    chunk: int  # columns of logits that are held at once


class Rows(NamedTuple):
    """R rows of C places; a place is a response's or, with length 0, nobody's."""

    response: jax.Array  # i32[R, C], its number of the device's B = P * G
    start: jax.Array  # i32[R, C], the column of its first token
    length: jax.Array  # i32[R, C], in tokens


class Sums(NamedTuple):
    """What is summed over the responses that are computed so far."""

    grads: Params  # f32, by the trained parameters
    dkv: KeysValues  # f32, by what the prompts leave: last hidden states, keys and values
    drift: jax.Array  # f32[], |log p recomputed - log p sampled|, over tokens
    worst: jax.Array  # f32[], its maximum


def policy_gradient(params: Params, share: Share) -> tuple[Params, jax.Array, jax.Array]:
    """The gradient of the loss by params over the share; and the drift: its sum, its maximum.

    Drift is |log p recomputed - log p sampled| of the tokens of the responses that are computed.
    """
    P = share.prompts.shape[0]
    size = min(P, share.micro_rows)  # prompts in one micro-batch
    # What a micro-batch holds after the first `n_prompts` is computed and never used.
    share = share._replace(prompts=jnp.pad(share.prompts, (0, -P % size)))
    prompt_rounds = together((share.n_prompts + size - 1) // size, params, share)
    kv = prefill_prompts(params, share, prompt_rounds, size)

    lengths = learnt_lengths(share, P)
    rows, count = packed(lengths, share.batch.tokens.shape[2])
    m = share.micro_rows
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, -len(lengths) % m), (0, 0))), rows)
    start = Sums(
        dkv=jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kv),
        grads=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        drift=jnp.float32(0),
        worst=jnp.float32(0),
    )
    add = functools.partial(add_micro_batch, params=params, share=share, kv=kv, rows=rows)
    rounds = together((count + m - 1) // m, params, share)
    sums = jax.lax.fori_loop(0, rounds, add, start)
    grads = pull_back(sums, params, share, kv, prompt_rounds, size)
    return grads, sums.drift, sums.worst


def together(rounds: jax.Array, params: Params, share: Share) -> jax.Array:
    """How many rounds this device goes: where devices gather parameters, as many as the others."""
    axis = split.over((params, share.frozen))
    return rounds if axis is None else jax.lax.pmax(rounds, axis)


# ------------------------------------------------------------------------------------------ prompts


def prefill(params: Params, share: Share, i: jax.Array | int, size: int) -> KeysValues:
    """Computes the prompts of micro-batch number i, `size` of them."""
    at = jax.lax.dynamic_slice(share.prompts, (i * size,), (size,))
    whole = lora.join(share.frozen, params)
    batch = share.batch
    last, segment = decoder.prefill(whole, share.cfg, batch.prompts[at], batch.prompt_mask[at])
    return last[:, None, None], segment


def prefill_prompts(params: Params, share: Share, rounds: jax.Array, size: int) -> KeysValues:
    """What all prompts of the share leave, by place in the list; zeros after `rounds` rounds."""

    def store(i, whole: KeysValues) -> KeysValues:
        put = lambda w, part: jax.lax.dynamic_update_slice_in_dim(w, part, i * size, ROWS)  # noqa: E731
        return jax.tree.map(put, whole, prefill(params, share, i, size))

    n = share.prompts.shape[0]
    shapes = jax.eval_shape(lambda p: prefill(p, share, 0, size), params)
    of_all = lambda x: (*x.shape[:ROWS], n, *x.shape[ROWS + 1 :])  # noqa: E731
    empty = jax.tree.map(lambda x: jnp.zeros(of_all(x), x.dtype), shapes)
    return jax.lax.fori_loop(0, rounds, store, empty)


def pull_back(
    sums: Sums, params: Params, share: Share, kv: KeysValues, rounds: jax.Array, size: int
) -> Params:
    """The gradient by params: of the responses, and through `dkv` of the prompts before them."""

    def add(i, grads: Params) -> Params:
        _, pull = jax.vjp(lambda p: prefill(p, share, i, size), params)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=ROWS)
        cut = lambda x, y: take(x, i * size).astype(y.dtype)  # noqa: E731
        return jax.tree.map(jnp.add, grads, pull(jax.tree.map(cut, sums.dkv, kv))[0])

    return jax.lax.fori_loop(0, rounds, add, sums.grads)


# ------------------------------------------------------------------------------------------ packing


def learnt_lengths(share: Share, P: int) -> jax.Array:
    """The tokens i32[P * G] of each response of the first P prompts; 0 where it has no gradient."""
    at = share.prompts[:P]
    counts = (jnp.arange(P) < share.n_prompts)[:, None] & has_gradient(share.A, share.scored)[at]
    return (share.batch.mask[at].sum(2) * counts).reshape(-1)


def packed(lengths: jax.Array, T: int) -> tuple[Rows, jax.Array]:
    """(rows of T columns, how many are used) that hold responses of `lengths` i32[B] tokens.

    The longest goes first, each into the first row that has room for it. Responses of length 0 are
    left out. There are B rows, enough in any case; the used ones come first.
    """
    B = len(lengths)

    def put(filled: tuple[jax.Array, jax.Array], b: jax.Array):
        used, held = filled  # columns and places, i32[B] each
        row = jnp.argmax((used + lengths[b] <= T) & (held < RESPONSES))
        place = row, held[row], used[row]
        filled = used.at[row].add(lengths[b]), held.at[row].add(lengths[b] > 0)
        return filled, place

    order = jnp.argsort(-lengths, stable=True)
    nothing = jnp.zeros(B, jnp.int32)
    (_, held), (row, place, start) = jax.lax.scan(put, (nothing, nothing), order)
    row = jnp.where(lengths[order] > 0, row, B)  # out of bounds: dropped
    fill = lambda x: jnp.zeros((B, RESPONSES), jnp.int32).at[row, place].set(x, mode="drop")  # noqa: E731
    return Rows(fill(order), fill(start), fill(lengths[order])), (held > 0).sum()


class Columns(NamedTuple):
    """What the columns of m rows hold: each predicts one token of a response, from the one before.

    The first token of a response is predicted by the prompt, so its column has no input.
    """

    place: jax.Array  # i32[m, T], of the response in its row
    token: jax.Array  # i32[m, T], the number of the token that is predicted
    real: jax.Array  # bool[m, T]


def columns(rows: Rows, T: int) -> Columns:
    """The columns of m rows."""
    column = jnp.arange(T)
    start, stop = rows.start[..., None], (rows.start + rows.length)[..., None]
    inside = (start <= column) & (column < stop)  # [m, C, T]
    place = jnp.argmax(inside, axis=1)
    token = jnp.where(inside, column - start, 0).sum(axis=1)
    return Columns(place, token, inside.any(axis=1))


# ------------------------------------------------------------------------------------ the gradient


def add_micro_batch(
    i: jax.Array, sums: Sums, *, params: Params, share: Share, kv: KeysValues, rows: Rows
) -> Sums:
    """The sums with those of micro-batch number i of the rows."""
    m, G = share.micro_rows, share.batch.tokens.shape[1]
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * m, m), rows)
    place = own.response // G  # of its prompt in kv
    own_kv = jax.tree.map(lambda x: x[..., place.reshape(-1), :, :, :], kv)
    (grads, dkv), (drift, worst) = jax.grad(responses_loss, argnums=(0, 1), has_aux=True)(
        params, own_kv, share, own
    )
    spread = lambda whole, part: whole.at[..., place.reshape(-1), :, :, :].add(part)  # noqa: E731
    dkv = jax.tree.map(spread, sums.dkv, dkv)
    grads = jax.tree.map(jnp.add, sums.grads, grads)
    return Sums(grads, dkv, sums.drift + drift, jnp.maximum(sums.worst, worst))


def responses_loss(
    params: Params, kv: KeysValues, share: Share, rows: Rows
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss of the responses in m rows; and the drift: its sum and its maximum.

    It is `gapg.loss`, and `scoring.loss` where decisions are scored. kv is of the prompts of their
    m * C places.
    """
    batch, cfg = share.batch, share.cfg
    _, G, T = batch.tokens.shape
    prompt, member = share.prompts[rows.response // G], rows.response % G  # [m, C]
    at = columns(rows, T)
    of_place = functools.partial(jnp.take_along_axis, indices=at.place, axis=1)
    of_column = lambda x: x[of_place(prompt), of_place(member), at.token]  # noqa: E731
    targets = of_column(batch.tokens)
    inputs = batch.tokens[of_place(prompt), of_place(member), jnp.maximum(at.token - 1, 0)]
    whole = decoder.with_ends(lora.join(share.frozen, params), cfg)
    hidden = packed_hidden(whole, cfg, kv, batch.prompt_mask[prompt], inputs, at)

    start = jnp.minimum(rows.start[..., None] + jnp.arange(T), T - 1).reshape(len(targets), -1)
    apart = lambda x: jnp.take_along_axis(x, start, axis=1).reshape(-1, T)  # noqa: E731
    mask = (jnp.arange(T) < rows.length[..., None]).reshape(-1, T)  # [m * C, T]
    of_response = lambda x: (x[prompt, member] * (rows.length > 0)).reshape(-1)  # noqa: E731
    loss = jnp.float32(0)
    if share.scored is None:
        logp = logprobs.token_logprobs(whole, cfg, hidden, targets, share.temperature, share.chunk)
    else:
        assert batch.barred is not None
        logp, _, margins = logprobs.barred_scores(
            whole, cfg, hidden, targets, of_column(batch.barred), share.temperature, share.chunk
        )
        call, answer = (of_response(x) for x in share.scored)
        barred = mask & (batch.barred[prompt, member].reshape(-1, T) >= 0)
        loss += scoring.loss(apart(margins), barred, call, answer) / G
    logp = apart(logp)
    loss += gapg.loss(logp, mask, of_response(share.A), G)
    drift = jnp.abs(logp - batch.logp[prompt, member].reshape(-1, T)) * mask
    return loss, (drift.sum(), drift.max())


def packed_hidden(
    params: Params,
    cfg: DecoderConfig,
    kv: KeysValues,
    prompt_mask: jax.Array,
    inputs: jax.Array,
    at: Columns,
) -> jax.Array:
    """The hidden states [m, T, E] that predict the tokens of the columns of m rows.

    kv and prompt_mask bool[m, C, L] are of the prompts of their places, inputs i32[m, T] the tokens
    before the predicted ones. A column sees its own prompt and its own response before it.
    """
    last, segment = kv
    m, C, L = prompt_mask.shape
    # Of the columns of the prompts, and of the row's own: the key in one of these is its input's,
    # which the first of a response has not.
    of_prompts = jnp.where(prompt_mask, jnp.arange(C)[:, None], -1).reshape(m, C * L)
    of_inputs = jnp.where(at.real & (at.token >= 1), at.place, -1)
    sight = Sight(at.place, jnp.concatenate([of_prompts, of_inputs], axis=1))
    lengths = jnp.take_along_axis(prompt_mask.sum(2), at.place, axis=1)
    positions = lengths + jnp.maximum(at.token - 1, 0)
    body, _ = decoder.forward(params, cfg, inputs, positions, sight, (segment,))
    first = jnp.take_along_axis(last.reshape(m, C, -1), at.place[..., None], axis=1)
    return jnp.where(at.token[..., None] == 0, first, body)
