"""What a comparison has shown: some sentences with intervals, the bad too, and a table. No jax.

Both are written from the figures of `comparison.compare`, so that none is typed by hand; `quote.py`
puts them into other documents.
"""

from collections.abc import Mapping
from typing import Any

from collab_jax.routing.routers import ROUTERS
from collab_jax.runtime import markdown
from collab_jax.runtime.markdown import percent, points

BUDGET = 0.3  # at which routers are compared in one figure each
MANY = BUDGET / 4  # a share of responses without an answer that a reader has to know of
BOUNDS = ("reachable", "perfect")  # routers that nobody can have
CONTROLS = ("last_result", "logprob")  # rivals that need no training of the marker


def findings(result: dict[str, Any], task_tuned: str | None, budgets: Mapping[str, float]) -> str:
    """A Markdown list of five sentences, fewer where the records do not allow one.

    There is a sixth where models leave prompts without an answer.

    result: from `comparison.compare`; its reference is a trained marker. task_tuned: the model that
    was never rewarded for a call, None where there is none. budgets: that of each model's training.
    """
    found = [
        _against_best_router(result, task_tuned),
        _against_controls(result),
        _reached(result, task_tuned),
        _natural(result, budgets),
        _against_cells(result),
        _unanswered(result),
    ]
    return "\n".join(f"{i}. {text}" for i, text in enumerate(filter(None, found), 1))


def verdict(lead: Mapping[str, float | None]) -> str:
    """What a paired difference says: ahead of, behind, or not told apart from."""
    low, high = lead["low"], lead["high"]
    if low is not None and low > 0:
        return "ahead of"
    return "behind" if high is not None and high < 0 else "not told apart from"


def _against_best_router(result: dict[str, Any], task_tuned: str | None) -> str:
    """The reference against the router that is best, on these prompts, of the task-tuned model."""
    rivals = _routers(result, task_tuned)
    if not task_tuned or not rivals:
        return ""
    best = max(rivals, key=lambda name: _at(result, task_tuned, name)["accuracy"]["value"])
    rival, own = _at(result, task_tuned, best), _own(result)
    lead = rival["reference_minus_this"]
    alone = " (one seed)" if _has_one_seed(result, result["reference"].partition(": ")[0]) else ""
    return (
        f"At {_budget()} calls `{result['reference']}`{alone} has {_share(own['accuracy'])} of the "
        f"prompts right. It is {verdict(lead)} the best router on `{task_tuned}`, {_title(best)} "
        f"with {_share(rival['accuracy'])} ({points(lead)} points); that one was chosen out of "
        f"{len(rivals)} on these very prompts, which favours it."
    )


def _against_controls(result: dict[str, Any]) -> str:
    """The reference against rivals on its own model."""
    model = result["reference"].partition(": ")[0]
    known = [name for name in CONTROLS if f"{model}: {name}" in result["methods"]]
    if not known:
        return ""
    leads = {name: _at(result, model, name)["reference_minus_this"] for name in known}
    parts = [f"{verdict(lead)} *{_title(name)}* ({points(lead)})" for name, lead in leads.items()]
    return f"On its own model, `{model}`, it is {' and '.join(parts)}, in points."


def _reached(result: dict[str, Any], task_tuned: str | None) -> str:
    model, share = result["reference"].partition(": ")[0], _own(result)["reachable_share"]
    text = (
        f"It takes {_share(share)} of the gain over random that can be reached by knowing where "
        f"the device is wrong, and how often the cloud is right in a stratum; the device alone has "
        f"{_share(result['models'][model]['local_accuracy'])} right"
    )
    if not task_tuned:
        return text + "."
    lead = result["models"][task_tuned]["reference_minus_this"]
    return f"{text}, {verdict(lead)} `{task_tuned}` ({points(lead)} points)."


def _natural(result: dict[str, Any], budgets: Mapping[str, float]) -> str:
    """The share of calls that models make of themselves, by their budget; what that is worth."""
    said: dict[float, list[str]] = {}
    for name, model in result["models"].items():
        if name in budgets and "natural_call_rate" in model:
            rate = f"`{name}` on {_share(model['natural_call_rate'])}"
            said.setdefault(budgets[name], []).append(rate)
    if not said:
        return ""
    parts = [f"at a budget of {100 * b:g} %, {', '.join(rates)}" for b, rates in said.items()]
    text = f"Left to themselves they call, {'; '.join(parts)}."
    name = result["reference"].partition(": ")[0]
    model = result["models"][name]
    if not (lead := model.get("natural_minus_gate")):
        return text
    return (
        f"{text} `{name}` has {_share(model['natural_accuracy'])} right then, {verdict(lead)} what "
        f"its *{_title('logprob')}* brings at that share ({points(lead)} points)."
    )


def _against_cells(result: dict[str, Any]) -> str:
    """The reference against the same router of every other model."""
    own, _, router = result["reference"].partition(": ")
    others = [
        name
        for name in result["models"]
        if name != own and f"{name}: {router}" in result["methods"]
    ]
    if not others:
        return ""
    groups: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
    for name in others:
        lead = _at(result, name, router)["reference_minus_this"]
        alone = "one seed, " if _has_one_seed(result, name) else ""
        groups[verdict(lead)].append(f"`{name}` ({alone}{points(lead)})")
    said = "; ".join(f"{how} {', '.join(names)}" for how, names in groups.items() if names)
    luck = "; with one seed, whose interval is over prompts alone, more of them do"
    return (
        f"At {_budget()} calls by {router} it is {said}. These are {len(others)} comparisons, each "
        f"with an interval of 95 %: where nothing differs, one in twenty still excludes 0"
        f"{luck if any(_has_one_seed(result, name) for name in (own, *others)) else ''}."
    )


def _unanswered(result: dict[str, Any]) -> str:
    """The models that leave many prompts without an answer when the call is barred."""
    many = {
        name: model["no_answer"]
        for name, model in result["models"].items()
        if model["no_answer"]["value"] > MANY
    }
    if not many:
        return ""
    said = ", ".join(f"`{name}` on {_share(share)}" for name, share in many.items())
    return (
        "With the call barred they give no answer, and margin and log-probability gates send such "
        f"a prompt first: {said}."
    )


def headline_table(result: dict[str, Any]) -> str:
    """A row a model, short enough for a front page: alone, by itself, and routed at BUDGET.

    The last column is of the margins at BUDGET. Raises KeyError for records without a natural pass.
    """
    budget = f"{100 * BUDGET:g} % calls"
    head = [
        "",
        "seeds",
        "device alone",
        "by itself: calls",
        "by itself: right",
        f"{budget}: margin",
        f"{budget}: gate",
        f"{result['reference'].partition(': ')[0]} ahead by",
    ]
    rows = []
    for name in models_with_margin(result):
        model = result["models"][name]
        margin, gate = (
            result["methods"][f"{name}: {router}"]["at_budget"][str(BUDGET)]
            for router in ("margin", "logprob")
        )
        is_reference = f"{name}: margin" == result["reference"]
        rows.append(
            [
                name,
                str(result["seeds"][name]),
                percent(model["local_accuracy"]),
                *(percent(model[key]) for key in ("natural_call_rate", "natural_accuracy")),
                percent(margin["accuracy"]),
                percent(gate["accuracy"]),
                "" if is_reference else points(margin["reference_minus_this"]),
            ]
        )
    return markdown.table(head, rows)


def models_with_margin(result: dict[str, Any]) -> list[str]:
    """The models whose records have the trained marker's margin."""
    return [name for name in result["models"] if f"{name}: margin" in result["methods"]]


def _routers(result: dict[str, Any], model: str | None) -> list[str]:
    """The routers of a model that somebody could have."""
    pairs = [method.partition(": ")[::2] for method in result["methods"]]
    return [router for name, router in pairs if name == model and router not in BOUNDS]


def _at(result: dict[str, Any], model: str, router: str) -> dict[str, Any]:
    return result["methods"][f"{model}: {router}"]["at_budget"][str(BUDGET)]


def _own(result: dict[str, Any]) -> dict[str, Any]:
    return result["methods"][result["reference"]]["at_budget"][str(BUDGET)]


def _has_one_seed(result: dict[str, Any], model: str) -> bool:
    return result["seeds"][model] == 1


def _share(rate: Mapping[str, float | None]) -> str:
    """'63.1 % (61.6 to 64.5)'."""
    return percent(rate).replace(" (", " % (", 1)


def _title(router: str) -> str:
    return ROUTERS[router].title if router in ROUTERS else router


def _budget() -> str:
    return f"{100 * BUDGET:g} %"
