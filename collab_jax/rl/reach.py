"""The try of a warm-started model: what training would start from.

Training can only learn from calls that occur, and the margin has to rank from the start.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from collab_jax.models.decoder import Params
from collab_jax.rl import own_samples, rollout
from collab_jax.rl.own_samples import Respondent
from collab_jax.runtime import hosts
from collab_jax.tasks import Example

# Steps whose keys the responses are sampled with, none of training's: natural ones, and those that
# may not call.
NATURAL, BARRED = 1 << 20, 1 << 21


MIN_AUC = 0.55  # of the margin, below which a warning is due


class Tried(NamedTuple):
    """What `config.group` responses to each of P prompts were."""

    correct: np.ndarray  # bool[P, G]
    called: np.ndarray  # bool[P, G]
    formatted: np.ndarray  # bool[P, G]
    cut_off: np.ndarray  # bool[P, G]
    margin: np.ndarray  # f64[P, G], max_t m_t (`decision.py`), -inf without a decision state


def respond(
    respondent: Respondent,
    params: Params,
    examples: Sequence[Example],
    *,
    first_step: int,
    bias: float,
) -> Tried:
    """Samples and judges responses; params have the axis D, a bias of -inf disallows the marker.

    Of several hosts each does its part of a batch, and all return the whole.
    """
    rows = []
    for batch, samples in own_samples.sampled_batches(
        respondent, params, examples, first_step=first_step, bias=bias
    ):
        P, G, T = samples.tokens.shape
        verdicts = rollout.judge(
            respondent.task,
            respondent.text,
            [example for example in batch for _ in range(G)],
            np.asarray(samples.tokens).reshape(P * G, T),
            np.asarray(samples.mask).reshape(P * G, T),
            np.asarray(samples.ended).reshape(P * G),
        )
        own = Tried(
            correct=np.asarray(verdicts.correct).reshape(P, G),
            called=np.asarray(verdicts.called).reshape(P, G),
            formatted=np.asarray(verdicts.formatted).reshape(P, G),
            cut_off=~np.asarray(samples.ended),
            margin=np.asarray(samples.margins).max(-1),
        )
        of_prompts = list(zip(*(x.tolist() for x in own), strict=True))
        rows += hosts.joined("what it tried", of_prompts, hosts.FOREVER)
    return Tried(*(np.array(x) for x in zip(*rows, strict=True)))


def measure(
    respondent: Respondent, params: Params, examples: Sequence[Example]
) -> dict[str, float | None]:
    """What training would start from: figures of `config.group` responses to each example.

    `called`, `formatted`, `cut_off` and `local_accuracy` are shares of natural responses. margin:
    the mean over these of max_t m_t, by how many nats the call loses where it is nearest;
    best_margin: the largest; both None where no response has a decision state, as can be with a
    marker in plain text. unsolved_called: of the prompts that no response solves, the share with a
    call; None without such prompts. Of as many responses that may not call: solo_accuracy, and
    margin_auc, the probability that the margin of a wrong one is above that of a right one (0.5: it
    says nothing; one that was cut off counts as wrong with the highest margin); None where all are
    right or all are wrong. params have the axis D.
    """
    natural = respond(respondent, params, examples, first_step=NATURAL, bias=0.0)
    barred = respond(respondent, params, examples, first_step=BARRED, bias=-np.inf)
    margin = natural.margin[np.isfinite(natural.margin)]
    unsolved = ~natural.correct.any(1)
    calls_there = natural.called[unsolved].any(1)
    return {
        "prompts": len(natural.correct),
        "responses": natural.correct.size,
        "local_accuracy": float(natural.correct.mean()),
        "called": float(natural.called.mean()),
        "formatted": float(natural.formatted.mean()),
        "cut_off": float(natural.cut_off.mean()),
        "margin": float(margin.mean()) if margin.size else None,
        "best_margin": float(margin.max()) if margin.size else None,
        "unsolved_called": float(calls_there.mean()) if unsolved.any() else None,
        "solo_accuracy": float(barred.correct.mean()),
        "margin_auc": margin_auc(barred),
    }


def margin_auc(tried: Tried) -> float | None:
    """P(margin of a wrong response > that of a right one), ties counted half."""
    score = np.where(tried.cut_off, np.inf, tried.margin).ravel()
    wrong = ~tried.correct.ravel()
    if wrong.all() or not wrong.any():
        return None
    above = stats.mannwhitneyu(score[wrong], score[~wrong]).statistic
    return float(above / (wrong.sum() * (~wrong).sum()))


def format_reach(figures: dict[str, Any]) -> str:
    """The figures of `measure` as a line."""
    margin = (
        "no decision state"
        if figures["margin"] is None
        else f"the call's margin {figures['margin']:+.1f}"
    )
    auc = figures["margin_auc"]
    ranks = "" if auc is None else f", AUC of the margin {auc:.2f}"
    return (
        f"{figures['responses']} responses to {figures['prompts']} prompts: "
        f"{figures['formatted']:.1%} well formed, {figures['called']:.1%} calls, "
        f"{figures['cut_off']:.1%} cut off, {figures['local_accuracy']:.1%} right on the device; "
        f"{margin}{ranks}"
    )


def warnings(figures: dict[str, Any]) -> list[str]:
    """What in the figures of `measure` would keep training from learning, with the fix."""
    messages = []
    if figures["called"] == 0:
        messages.append(
            "no response calls, so training that samples calls will find none to learn from: show "
            "more (config.sft.call_chance or marker_share), or raise config.sft.steps or "
            "learning_rate"
        )
    if figures["formatted"] + figures["called"] < 0.5:
        messages.append(
            "most responses neither answer in the format nor call: raise config.sft.steps, or "
            "max_new_tokens if they are cut off"
        )
    auc = figures["margin_auc"]
    if auc is not None and auc < MIN_AUC:
        messages.append(
            f"the margin says little about which responses are wrong (AUC {auc:.2f}): let the "
            "warm start teach when to call (config.sft.relabel_steps), or for longer"
        )
    if figures["local_accuracy"] == 0:
        messages.append(
            "no response is right, so training will stop because no prompt is solved: choose "
            "easier prompts"
        )
    return messages
