"""The decision scored by the verdict on every attempt: ours, in place of calls that are sampled.

A call that is sampled shows what the cloud is good for, and not whether the attempt before it was
right; an answer shows the one and not the other. So a decision is judged by comparing responses,
which is noisy, and a call that has become rare is not learnt again. Under
`config.algorithm.decision="scored"` no response of training calls: the marker is barred. Each
attempt then has its verdict, and its margin M: the call's logits over those of the best other
token, where they were highest. M is what decides once the model is deployed: greedy decoding calls
where M > 0, and at a budget the responses of the highest M do. With right and wrong 0 or 1, and a
call's price lambda in [0, 1], a response adds the logistic loss

    -(1 - lambda) wrong log sigmoid(M) - lambda right log sigmoid(-M)

What is lost by a bad decision are the weights: an answer that a call would have given, less its
price, or the price. It is least where M > 0 exactly if P(wrong) > lambda, and M ranks responses by
P(wrong) at any other price. That is the best decision where the cloud is right. One that is wrong
teaches no call, but a right answer does not count more for it: with a weak cloud the best decision,
to call where P(cloud right) - P(right) > lambda, is another.

A response is taught at one state, where its margin is highest. Were all states taught, by the
probability that one of them calls, then those before the model knows anything would learn how often
responses go wrong.

What the attempts themselves learn is the policy gradient of their rewards, which the marker has no
part in; the loss moves the call's logit, and not that of the token which it is compared with. Or
they learn nothing (`config.algorithm.advantage="none"`): then the call's row of the head alone
learns, to read hidden states that stay as they are. That is a logistic regression on them, online,
at the state where it says most, which the sampler hands over (`row_gradient`). Until the answer
opens no logit but the call's changes, so that the attempts are those of before. Where embeddings
are tied the row is also how the call is read, and what follows a call may no longer be the rest of
the marker: whoever decodes has to stop there.

The price is that of the budget: in each batch the one at which the loss, as a whole, moves the
margins by how far the share of calls is from the budget (`price`). So the budget is held without a
state that could swing, and what is learnt is which responses call. It is held on what training
samples. Greedy decoding is wrong less often than samples are, and where a budget is larger than the
share of wrong answers, its end falls among answers that are right and margins that lie close
together: there greedy decoding calls less than the samples did.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.gapg import Rollout
from collab_jax.models import decoder, lora
from collab_jax.models.decoder import DecoderConfig, Params

NOWHERE = -1e4  # the margin of a call where none can be: finite, so that gradients are


class Scored(NamedTuple):
    """How much each response's decision counts, f32[Q, G] each; one of the two is 0."""

    call: jax.Array  # (1 - lambda) wrong: that it should have called
    answer: jax.Array  # lambda right: that it should not have


def scored(
    margin: jax.Array,
    correct: jax.Array,
    cloud_correct: jax.Array,
    keep: jax.Array,
    budget: jax.Array,
    level: jax.Array | None,
) -> tuple[Scored, jax.Array]:
    """The Scored of a batch, and the price f32[Q] of each prompt's budget.

    margin f32[Q, G]: the highest of each response, when sampled; correct bool[Q, G], cloud_correct
    bool[Q], keep bool[Q]. budget f32[], or f32[budgets] with the level i32[Q] of each prompt. A
    wrong response teaches the call only where the cloud is right; prompts that are not kept teach
    nothing.
    """
    right = (correct & keep[:, None]).astype(jnp.float32)
    wrong = (~correct & (cloud_correct & keep)[:, None]).astype(jnp.float32)
    if level is None:
        level = jnp.zeros(len(margin), jnp.int32)
    of_prompt = price(margin, wrong, right, jnp.atleast_1d(budget), level)[level]
    charged = of_prompt[:, None]
    return Scored(call=(1 - charged) * wrong, answer=charged * right), of_prompt


def price(
    margin: jax.Array, wrong: jax.Array, right: jax.Array, budget: jax.Array, level: jax.Array
) -> jax.Array:
    """The price lambda f32[budgets], in [0, 1], that brings calls to each budget f32[budgets].

    margin, wrong, right: f32[Q, G]; level i32[Q]: the budget of each prompt. With q = sigmoid(M)
    the loss moves the margins of all responses of a budget together by

        sum of (1 - lambda) wrong (1 - q) - lambda right q

    and lambda is such that this is the number of responses times (budget - share of calls), where
    a response is a call if its margin is above 0, as greedy decoding has it.
    """
    total = lambda x: jnp.zeros_like(budget).at[level].add(x.sum(axis=1))  # noqa: E731
    q = jax.nn.sigmoid(margin)
    up, down = total(wrong * (1 - q)), total(right * q)
    wanted = total(budget[level][:, None] - (margin > 0))
    return jnp.clip((up - wanted) / jnp.maximum(up + down, 1e-6), 0, 1)


def loss(margins: jax.Array, barred: jax.Array, call: jax.Array, answer: jax.Array) -> jax.Array:
    """The sum of the logistic losses of m responses, f32[], in nats.

    margins f32[m, T]: the call's at each token; barred bool[m, T]: the decision states. call,
    answer f32[m]: the weights of a `Scored`.
    """
    return logistic(jnp.where(barred, margins, NOWHERE).max(axis=1), call, answer)


def logistic(margin: jax.Array, call: jax.Array, answer: jax.Array) -> jax.Array:
    """The same from the highest margin of each response; f32 of any one shape."""
    return jnp.sum(call * jax.nn.softplus(-margin) + answer * jax.nn.softplus(margin))


def row_gradient(
    params: Params, frozen: Params | None, cfg: DecoderConfig, rollout: Rollout, scored: Scored
) -> Params:
    """The gradient, f32, of `loss` / G by the call's row of the head, the other parameters' is 0.

    rollout: of P prompts, with the hidden states at which their responses' margins are highest;
    scored: f32[P, G] each. These states were sampled by the same parameters, so nothing but the
    call's logit is computed again.
    """
    assert rollout.margin is not None and rollout.hidden is not None and rollout.barred is not None
    margin, hidden, token = rollout.margin, rollout.hidden, rollout.barred.max()

    def objective(params: Params) -> jax.Array:
        whole = decoder.with_ends(lora.join(frozen, params), cfg)
        logit = decoder.token_logits(whole, cfg, hidden, token)
        # Its value is known; the gradient moves the call's logit alone.
        known = margin + (logit - jax.lax.stop_gradient(logit))
        return logistic(known, scored.call, scored.answer) / margin.shape[1]

    return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(objective)(params))
