"""The section of a report on a mix: results by task, and what is done with the calls. No jax."""

from collections.abc import Mapping
from typing import Any

from collab_jax.runtime import markdown
from collab_jax.runtime.markdown import percent, points


def section(figures: Mapping[str, Any]) -> str:
    """Returns the section on `summary.summary`'s figures; "" where the prompts are of one task."""
    found = figures["by_task"]
    if not found:
        return ""
    unknown = [name for name, of in found["tasks"].items() if of["overall_accuracy"] is None]
    missing = [
        f"No verdict of the cloud is known on {', '.join(unknown)}: what follows leaves it out."
    ]
    return "\n\n".join(
        [
            "## By task",
            results_table(found["tasks"]),
            *(missing if unknown else []),
            "One bias spends the budget over all prompts, and figures without a task's name are "
            "of the whole mix. How it divides the calls, and how a bias for each task would, in "
            "percent:",
            division_table(found["at_budget"]),
            "What a bias for each task would gain, with as many calls in all. Each half of the "
            "prompts has the biases that gain most on the other half; the gain's interval is that "
            "of a paired bootstrap over prompts, for these biases.",
            gain_table(found["at_budget"]),
        ]
    )


def results_table(tasks: Mapping[str, Any]) -> str:
    """Returns the table of each task's own figures, in percent of its prompts."""
    names = ("local_accuracy", "call_rate", "overall_accuracy")
    rows = [
        [name, str(of["n"]), *(percent(of[figure]) if of[figure] else "-" for figure in names)]
        for name, of in tasks.items()
    ]
    head = ["task", "prompts", "on the device", "natural calls", "natural: overall accuracy"]
    return markdown.table(head, rows)


def division_table(at_budget: Mapping[str, Any]) -> str:
    """Returns the table of what each task gets at each budget, by one bias and by its own."""
    head = ["calls in all", "task", "of these calls", "its calls", "its accuracy"]
    rows = []
    for budget, at in at_budget.items():
        for name, one in at["one_bias"]["tasks"].items():
            own = at["own_biases"]["tasks"][name]
            rows.append(
                [
                    f"{float(budget):.0%}",
                    name,
                    percent(one["share_of_calls"]),
                    percent(one["call_rate"]),
                    percent(one["accuracy"]),
                    percent(own["call_rate"]),
                    percent(own["accuracy"]),
                ]
            )
    return markdown.table([*head, "own bias: its calls", "own bias: its accuracy"], rows)


def gain_table(at_budget: Mapping[str, Any]) -> str:
    """Returns the table of the overall accuracy of both ways at each budget, and the difference."""
    rows = [
        [
            f"{float(budget):.0%}",
            percent(at["one_bias"]["accuracy"]),
            percent(at["own_biases"]["accuracy"]),
            points(at["gain"]),
        ]
        for budget, at in at_budget.items()
    ]
    return markdown.table(
        ["calls in all", "one bias", "a bias for each task", "gain, points"], rows
    )
