"""Routers: every way to decide which prompts go to the cloud is one score for each, higher meaning "send it".

A router is fitted on records of prompts that are not the ones it is judged on (most need none and ignore them), and then
scores any records. No jax: what a router needs of a model is a column of the records (`records.py`). A router that is not
here can be recorded as a column `score_NAME`, with what it spent in `tokens_NAME`.

| name | decides from | device tokens on a prompt that is sent |
|---|---|---|
| random | nothing; its expectation in closed form | none |
| features_linear, features_trees | the prompt's text, by logistic regression or boosted trees fitted on other prompts | none |
| logprob | the log-probability of the response | all |
| margin | the trained marker | up to its crossing |
| margin_logprob | both, by logistic regression fitted on other prompts | all |
| perfect | both verdicts: what no router can know | all |
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from collab_jax import costs, measures
from collab_jax.errors import UserError
from collab_jax.records import Records, require, scores
from collab_jax.routers import learned, response

Score = Callable[[Records], np.ndarray]  # -> f64[n]


class Router(NamedTuple):
    """score: of the records to route, or, where `learned`, of (records to fit on, records to route)."""

    title: str
    score: Callable
    needs: tuple[str, ...]  # columns
    reads: costs.Reads
    learned: bool = False


ROUTERS = {
    "random": Router("random", lambda records: np.zeros(len(records["id"])), (), "prompt"),
    "features_linear": Router("prompt features, logistic regression", learned.linear, ("prompt",), "prompt", True),
    "features_trees": Router("prompt features, boosted trees", learned.trees, ("prompt",), "prompt", True),
    "logprob": Router("log-probability gate", response.logprob, ("logp",), "response"),
    "margin": Router("trained marker (margin)", response.margin, ("margin",), "trace"),
    "margin_logprob": Router(
        "margin and log-probability", learned.margin_logprob, ("margin", "logp"), "response", True
    ),
    "perfect": Router("perfect router", measures.perfect_score, (), "response"),
}


def score(name: str, records: Records, fit_on: Records | None = None) -> np.ndarray:
    """f64[n] of a router of ROUTERS, or of the recorded column `score_NAME`. Raises UserError for what it lacks."""
    if name not in ROUTERS:
        if name not in scores(records):
            raise UserError(f"no router {name!r}: use one of {sorted(ROUTERS)}, or record a column score_{name}")
        return scores(records)[name]
    router = ROUTERS[name]
    require(records, router.needs, f"router {name}")
    if not router.learned:
        return router.score(records)
    if fit_on is None:
        raise UserError(f"router {name} is learned: give records of other prompts to fit it on")
    require(fit_on, router.needs, f"fitting router {name}")
    if set(fit_on["id"]) & set(records["id"]):
        raise UserError(f"router {name} would be fitted on prompts that it is judged on: give records of other prompts")
    return router.score(fit_on, records)


def possible(records: Records, fit_on: Records | None = None) -> list[str]:
    """The routers that these records have all the columns for, in ROUTERS' order, then the recorded ones."""
    if taken := sorted(set(scores(records)) & set(ROUTERS)):
        raise UserError(f"the column score_{taken[0]} has the name of a router of ours: call it score_my_{taken[0]}")
    found = [
        name
        for name, router in ROUTERS.items()
        if set(router.needs) <= set(records) and (not router.learned or fit_on and set(router.needs) <= set(fit_on))
    ]
    return found + list(scores(records))
