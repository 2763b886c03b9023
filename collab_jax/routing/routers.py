"""Routers: every way to decide which prompts go to the cloud is one score for each, higher meaning
"send it".

A router is fitted on records of prompts that are not the ones it is judged on (most need none and
ignore them), and then scores any records. No jax here: what a router needs of a model is a column
of the records (`records.py`). The routers that run the model again (`recorded.py`) leave their
score in `score_NAME`, what they spent in `tokens_NAME`; a router that is not here can be recorded
the same way.

| name | decides from | device tokens on a prompt that is sent |
|---|---|---|
| random | nothing; its expectation in closed form | none |
| features_linear, features_trees | the prompt's text, by logistic regression or boosted trees fitted on other prompts | none |
| logprob | the log-probability of the response | all |
| margin | the trained marker | up to its crossing |
| margin_logprob | both, by logistic regression fitted on other prompts | all |
| hidden | the model's last hidden state, by logistic regression fitted on other prompts | all |
| agreement | how many of `routers.samples` more responses agree | all, and those responses |
| verification | the model's opinion of its own response | all, and the question |
| classifier | the prompt, by a decoder fine-tuned on other prompts | none; a decoder runs on every prompt |
| perfect | both verdicts: what no router can know | all |
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from collab_jax.records import Records, require, scores
from collab_jax.routing import costs, learned, measures, response
from collab_jax.runtime.errors import UserError

Score = Callable[[Records], np.ndarray]  # -> f64[n]


class Router(NamedTuple):
    """score: of the records to route, or, where `learned`, of (records to fit on, records to
    route).
    """

    title: str
    score: Callable
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
    "logprob": Router("log-probability gate", response.logprob, ("logp",), "response"),
    "agreement": from_column("agreement", "agreement of samples", "response"),
    "verification": from_column("verification", "self-verification", "response"),
    "hidden": from_column("hidden", "last hidden state, logistic regression", "response"),
    "margin": Router("trained marker (margin)", response.margin, ("margin",), "trace"),
    "margin_logprob": Router(
        "margin and log-probability", learned.margin_logprob, ("margin", "logp"), "response", True
    ),
    "perfect": Router("perfect router", measures.perfect_score, (), "response"),
}


def router_of(name: str) -> Router:
    """A router of ROUTERS, or the recorded one of the column `score_NAME`."""
    return ROUTERS.get(name) or from_column(name, name, "response")


def score(name: str, records: Records, fit_on: Records | None = None) -> np.ndarray:
    """f64[n] of a router of ROUTERS, or of the recorded column `score_NAME`. Raises UserError for
    what it lacks.
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
            f"router {name} would be fitted on prompts that it is judged on: give records of other prompts"
        )
    return router.score(fit_on, records)


def possible(records: Records, fit_on: Records | None = None) -> list[str]:
    """The routers that these records have all the columns for, in ROUTERS' order, then the other
    recorded ones.

    Learned ones are among them where some prompts of `fit_on` are right on the device, and some
    wrong.
    """
    own = {name for name, router in ROUTERS.items() if f"score_{name}" not in router.needs}
    if taken := sorted(set(scores(records)) & own):
        raise UserError(
            f"the column score_{taken[0]} has the name of a router of ours: call it score_my_{taken[0]}"
        )
    found = [
        name
        for name, router in ROUTERS.items()
        if set(router.needs) <= set(records)
        and (
            not router.learned
            or fit_on
            and set(router.needs) <= set(fit_on)
            and learned.has_classes(fit_on)
        )
    ]
    return found + [name for name in scores(records) if name not in ROUTERS]
