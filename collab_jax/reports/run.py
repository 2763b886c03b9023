"""The report of a run: report.json for scripts, report.md and report.html for people, two figures.

No jax.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.cloud import Ledger, Spent
from collab_jax.records import Records
from collab_jax.reports import by_task, figures, page, summary
from collab_jax.routing.measures import Rate
from collab_jax.routing.routers import ROUTERS
from collab_jax.runtime import files, markdown
from collab_jax.runtime.markdown import percent, points

if TYPE_CHECKING:  # its module imports jax
    from collab_jax.gapg import FilterState

Figures = Mapping[str, Any]  # one side of a report, `summary.summary`


class CloudCosts(NamedTuple):
    """What the cloud cost: the answers in a store, and the requests that were ever sent for it."""

    everything: Ledger  # all answers
    training: Ledger  # those to prompts of the training split
    spent: Spent  # requests that failed included


def write_report(
    workdir: pathlib.Path,
    config: ConfigDict,
    *,
    filter_state: "FilterState",
    steps: list[dict[str, Any]],
    before: Records,
    after: Records,
    cloud_costs: CloudCosts,
    machine: Mapping[str, str],
) -> str:
    """Writes the report's files into `workdir` and returns what to show on the screen.

    filter_state: of the last step, without the axis D. steps: the rows of metrics.jsonl.
    """
    report = {
        "before": summary.summary(before),
        "after": summary.summary(after),
        "gain": summary.gains(before, after),
        "budget": config.budget,
        "steps": len(steps),
        "seconds": sum(row["seconds"] for row in steps),
        "filter_dropped": 1 - int(filter_state.kept) / int(filter_state.prompts),
        "filter": {
            name: int(getattr(filter_state, name))
            for name in ("prompts", "d1", "d2", "kept", "kept_d2")
        },
        "cloud_calls": cloud_costs.everything.calls,
        "cloud": {
            **cloud_costs.everything._asdict(),
            "training": cloud_costs.training._asdict(),
            "spent": cloud_costs.spent._asdict(),
        },
        "config": json.loads(config.to_json_best_effort()),
        "machine": machine,
    }
    figures.training(workdir / "training.png", steps, config.budget)
    figures.frontier(workdir / "frontier.png", records.known(before), records.known(after), report)
    table = markdown_table(report)
    page.save(workdir, "report", render(report, table, after))
    # The last file, complete or not at all: a run that has it is finished.
    files.write_text(workdir / "report.json", json.dumps(report, indent=2) + "\n")
    return (
        f"\n{table}\n\n{closing(report)}\n"
        f"report: {workdir / 'report.html'}, report.md, report.json, frontier.png, training.png"
    )


def markdown_table(report: Mapping[str, Any]) -> str:
    """Returns the table of before against after, in percent of all prompts, with 95 % intervals."""
    sides = report["before"], report["after"]

    def row(title: str, rate: Callable[[Figures], Rate]) -> list[str]:
        return [title, *(percent(rate(side)) for side in sides)]

    lenient = []
    if all(side["lenient_accuracy"] for side in sides):
        lenient = [row("the same, tags or not", lambda side: side["lenient_accuracy"])]
    graded = []
    if all(side.get("right") for side in sides):
        graded = [
            row("of the device's answers, counted as right", lambda side: side["right"]["local"]),
            row("of the cloud's answers, counted as right", lambda side: side["right"]["cloud"]),
        ]
    rows = [
        row("accuracy on the device (marker disallowed)", lambda side: side["local_accuracy"]),
        *lenient,
        *graded,
        row("of these responses, without an answer", lambda side: side["no_answer"]),
        row("natural: share of calls", lambda side: side["natural"]["call_rate"]),
        row("natural: overall accuracy", lambda side: side["natural"]["overall_accuracy"]),
    ]
    for budget in summary.BUDGETS:
        for name in summary.SUMMARY_ROUTERS:
            title = f"{100 * budget:.0f} % calls: {ROUTERS[name].title}"
            rows.append(row(title, lambda side, b=str(budget), n=name: side["at_budget"][b][n]))
    rows.append(row("cloud alone (100 % calls)", lambda side: side["cloud_accuracy"]))
    if all(side.get("unjudged") for side in sides) and any(
        side["unjudged"]["value"] for side in sides
    ):
        title = "the device's answer could not be judged (it counts as wrong)"
        rows.append(row(title, lambda side: side["unjudged"]))
    if any(side["cloud_unknown"]["value"] for side in sides):
        title = "cloud's verdict unknown (not in figures of the cloud)"
        rows.append(row(title, lambda side: side["cloud_unknown"]))
    return markdown.table(["% of prompts (95 % interval)", "before", "after"], rows)


def closing(report: Mapping[str, Any]) -> str:
    """Returns what training changed and what it cost, in a few lines."""
    training, cloud = report["cloud"]["training"], report["cloud"]
    gain, at_budget = report["gain"], report["after"]["at_budget"]["0.3"]
    share = at_budget["reachable_gain_share"]["value"]
    no_answer = report["after"]["no_answer"]["value"]
    reached = "there is no gain" if share is None else f"{share:.0%} of the gain"
    lines = [
        f"At 30 % calls by margin: {points(gain['margin_at_0.3'])} points over the start; "
        f"{points(at_budget['margin_over_random'])} over random; "
        f"{reached} that can be reached.",
        f"On the device alone: {points(gain['local_accuracy'])} points.",
        f"{report['steps']} steps in {report['seconds']:.0f} s; "
        f"the filter dropped {report['filter_dropped']:.1%} of the prompts; "
        f"{report['cloud_calls']} cloud answers in the store, evaluation included "
        f"({cloud['usd']:.2f} USD).",
        f"Training took {training['calls']} of them: "
        f"{training['input_tokens'] + training['output_tokens']} tokens, "
        f"{training['usd']:.2f} USD{_dated(report)}; "
        f"{cloud['spent']['calls']} requests were sent in all.",
    ]
    if report["config"]["task"]["unsafe_code"]:
        lines.append(summary.UNSAFE_CODE)
    if no_answer > summary.BUDGETS[0]:
        lines.append(
            f"With the marker disallowed {no_answer:.0%} of the responses have no answer. Margin "
            "and log-probability gate send these first, so up to that share of calls the two "
            "differ only in their order among these."
        )
    return "\n".join(lines)


def _dated(report: Mapping[str, Any]) -> str:
    """Returns when the prices were looked up, where they are a provider's."""
    cloud = report["config"]["cloud"]
    return f" at the prices of {cloud['prices_date']}" if cloud["kind"] == "openai" else ""


def render(report: Mapping[str, Any], table: str, after: Records) -> str:
    """Returns the text of report.md."""
    config = report["config"]
    algorithm = ", ".join(f"{key} `{value}`" for key, value in config["algorithm"].items())
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    title = (
        f"# {config['task']['name']}, {config['model']['path']}, budget {report['budget']:g}, "
        f"seed {config['seed']}"
    )
    about = (
        f"{algorithm}; {report['after']['n']} {records.split_of(after)} prompts; "
        f"every rate is a share of all prompts, with its 95 % interval. {machine}."
    )
    paragraphs = [
        title,
        about,
        table,
        closing(report),
        shown_budgets(report),
        strata(report),
        by_task.section(report["after"]),
        "![accuracy against call rate](frontier.png)",
        "![training](training.png)",
        "## Examples after training (natural decoding)",
        examples_list(after),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def shown_budgets(report: Mapping[str, Any]) -> str:
    """Returns the table of what is done at each budget that prompts show; "" where none does."""
    found = report["after"]["shown_budgets"]
    if not found:
        return ""
    head = ["budget shown", "natural calls", "natural accuracy", "margin at it", "on the device"]
    names = ("call_rate", "overall_accuracy", "margin", "local_accuracy")
    rows = [
        [f"{float(budget):.0%}", *(percent(figures[name]) for name in names)]
        for budget, figures in found.items()
    ]
    return markdown.table(head, rows)


def strata(report: Mapping[str, Any]) -> str:
    """Returns the table of the device's accuracy in each stratum; "" where there is just one."""
    before, after = (report[side]["local_accuracy_by_stratum"] for side in ("before", "after"))
    if len(after) < 2:
        return ""
    rows = [[name, percent(before[name]), percent(after[name])] for name in after]
    return markdown.table(["accuracy on the device, of", "before", "after"], rows)


def examples_list(table: Records) -> str:
    """Returns a few rows of the natural pass as a Markdown list."""
    return "\n".join(
        f"- **{kind}**: {markdown.code(table['prompt'][row])} -> "
        f"{markdown.code(table['natural_text'][row])}"
        for kind, row in summary.examples_to_show(table)
    )
