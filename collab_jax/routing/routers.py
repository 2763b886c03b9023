"""Routers: every way to decide which prompts go to the cloud is one score for each prompt.

A higher score means "send it". A router is fitted on records of prompts that are not the ones it is
judged on (most need none and ignore them), and then scores any records. No jax here: what a router
needs of a model is a column of the records (`records.py`). The routers that run the model again
(`recorded.py`) leave their score in `score_NAME` and what they spent in `tokens_NAME`; a router
that is not in ROUTERS can be recorded the same way.

| name            | decides from                         | device tokens of a prompt it sends   |
|-----------------|--------------------------------------|--------------------------------------|
| random          | nothing (expectation in closed form) | none                                 |
| features_linear | the prompt's text, by regression     | none                                 |
| features_trees  | the prompt's text, by boosted trees  | none                                 |
| last_result     | what the last step came to           | all                                  |
| logprob         | the response's log-probability       | all                                  |
| answer_logprob  | that of the answer's tokens alone    | all                                  |
| policy_logprob  | that at the training's temperature   | all                                  |
| token_margin    | the gap of the two likeliest tokens  | all                                  |
| margin          | the trained marker                   | up to its crossing                   |
| first_margin    | the marker before the attempt        | none                                 |
| last_margin     | the marker where the answer opens    | all                                  |
| margin_logprob  | both, by regression                  | all                                  |
| hidden          | the last hidden state, by regression | all                                  |
| agreement       | how many more responses agree        | all, and those responses             |
| verification    | the model's opinion of its response  | all, and the question                |
| classifier      | the prompt, by a fine-tuned decoder  | none; a decoder runs on every prompt |
| reachable       | the device's verdict, the stratum    | all                                  |
| perfect         | both verdicts (none can know them)   | all                                  |

Regressions (logistic), trees and the decoder are fitted on other prompts; `agreement` samples
`config.routers.samples` more responses. The last two are bounds: `reachable` knows where the device
is wrong, and of the cloud what share of a stratum it gets right.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from collab_jax.records import Records, require, scores
from collab_jax.routing import costs, learned, measures, response
from collab_jax.runtime.errors import UserError


class Router(NamedTuple):
    """One way to route."""

    title: str
    # (records to route) -> f64[n], or, where `learned`, (records to fit on, records to route).
    score: Callable[..., np.ndarray]
    needs: tuple[str, ...]  # columns
    reads: costs.Reads
    learned: bool = False


def from_column(name: str, title: str, reads: costs.Reads) -> Router:
    """A router whose score is a column of the records."""
    column = f"score_{name}"
    return Router(title, lambda records: records[column], (column,), reads)


ROUTERS = {
    "random": Router("random", lambda records: np.zeros(len(records["id"])), (), "prompt"),
    "features_linear": Router(
        "prompt features, logistic regression", learned.linear, ("prompt",), "prompt", True
    ),
    "features_trees": Router(
        "prompt features, boosted trees", learned.trees, ("prompt",), "prompt", True
    ),
    "classifier": from_column("classifier", "fine-tuned prompt classifier", "prompt"),
    "last_result": Router(
        "last result leads nowhere", response.last_result, ("prompt", "text"), "response"
    ),
    "logprob": Router("log-probability gate", response.logprob, ("logp",), "response"),
    "answer_logprob": Router(
        "log-probability of the answer alone",
        response.answer_logprob,
        ("answer_logp",),
        "response",
    ),
    "policy_logprob": from_column(
        "policy_logprob", "log-probability at the policy's temperature", "response"
    ),
    "token_margin": from_column("token_margin", "mean gap of the two likeliest tokens", "response"),
    "agreement": from_column("agreement", "agreement of samples", "response"),
    "verification": from_column("verification", "self-verification", "response"),
    "hidden": from_column("hidden", "last hidden state, logistic regression", "response"),
    "margin": Router("trained marker (margin)", response.margin, ("margin",), "trace"),
    "first_margin": Router(
        "marker before the attempt", response.first_margin, ("first_margin",), "prompt"
    ),
    "last_margin": Router(
        "marker where the answer opens", response.last_margin, ("last_margin",), "response"
    ),
    "margin_logprob": Router(
        "margin and log-probability", learned.margin_logprob, ("margin", "logp"), "response", True
    ),
    "reachable": Router("best that can be reached", measures.reachable_score, (), "response"),
    "perfect": Router("perfect router", measures.perfect_score, (), "response"),
}


def router_of(name: str) -> Router:
    """A router of ROUTERS, or the recorded one of the column `score_NAME`."""
    return ROUTERS.get(name) or from_column(name, name, "response")


def score(name: str, records: Records, fit_on: Records | None = None) -> np.ndarray:
    """The score f64[n] of a router of ROUTERS, or of the recorded column `score_NAME`.

    Raises UserError for an unknown name, a column that is missing, and records to fit on that are
    missing or hold prompts of `records`.
    """
    if name not in ROUTERS and name not in scores(records):
        raise UserError(
            f"no router {name!r}: use one of {sorted(ROUTERS)}, or record a column score_{name}"
        )
    router = router_of(name)
    require(records, router.needs, f"router {name}")
    if not router.learned:
        return router.score(records)
    if fit_on is None:
        raise UserError(f"router {name} is learned: give records of other prompts to fit it on")
    require(fit_on, router.needs, f"fitting router {name}")
    if set(fit_on["id"]) & set(records["id"]):
        raise UserError(
            f"router {name} would be fitted on prompts that it is judged on: give records of other "
            "prompts"
        )
    return router.score(fit_on, records)


def possible(records: Records, fit_on: Records | None = None) -> list[str]:
    """The routers that these records have all the columns for.

    They come in ROUTERS' order, then the other recorded ones. A learned one is among them where
    some answered prompts of `fit_on` are right on the device, and some wrong.
    """
    computed = {name for name, router in ROUTERS.items() if f"score_{name}" not in router.needs}
    if taken := sorted(set(scores(records)) & computed):
        raise UserError(
            f"the column score_{taken[0]} has the name of a router that is computed here: call it "
            f"score_my_{taken[0]}"
        )
    known = [name for name, router in ROUTERS.items() if _is_possible(router, records, fit_on)]
    return known + [name for name in scores(records) if name not in ROUTERS]


def _is_possible(router: Router, records: Records, fit_on: Records | None) -> bool:
    if not set(router.needs) <= set(records):
        return False
    if not router.learned:
        return True
    return bool(fit_on) and set(router.needs) <= set(fit_on) and learned.has_classes(fit_on)
