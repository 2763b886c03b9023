"""Evaluation: greedy passes over held-out prompts, as records (one row a prompt) and a summary.

    python -m collab_jax.evaluate --config configs/countdown_tiny.py --workdir RUN

evaluates the last checkpoint of a run (or, in an empty workdir, the model of the config) on the
validation split, and writes `validation.parquet` and `validation.json`. Where nothing is chosen any
more, `--split test` evaluates on the test prompts, and writes `test.parquet` and `test.json`. One
pass has the marker disallowed, and its margin trace holds the call decision at every budget
(`sampler.py`); responses that call are decoded once more with it allowed. With `--suite` the model
is evaluated on other benchmarks' test prompts (`reports/suite.py`). `records.py` documents the
columns. Routers that run the model once more (`config.routers.record`) are recorded by training
only. Several hosts evaluate as they train (docs/scale.md).
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import json
import pathlib

from absl import flags
from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import by_task, suite, summary
from collab_jax.rl import evaluation, experiment
from collab_jax.rl.experiment import Run
from collab_jax.runtime import cli, files, hosts
from collab_jax.runtime.errors import UserError

SPLITS = ("validation", "test")


def main(config: ConfigDict, workdir: pathlib.Path, split: str = "validation") -> int:
    """Evaluates the run in `workdir` on prompts of one of SPLITS; returns the exit status."""
    with experiment.prepared_in_turn(config, workdir):
        run = experiment.prepare(config, workdir)
        if config.eval.prompts < 1:
            raise UserError("config.eval.prompts must be at least 1 to evaluate")
        examples = evaluation.held_out(run, split)
    state = evaluation.state_on_all_hosts(run)
    sampler = evaluation.greedy_sampler(run)
    model = experiment.gathering(run.cfg)(state.final_model)
    table = evaluation.evaluate(run, sampler, model, examples, workdir.name)
    if hosts.is_first():
        write(run, int(state.step[0]), split, table)
    hosts.gathered("that it is done", None, hosts.FOREVER)
    return 0


def write(run: Run, step: int, split: str, table: Records) -> None:
    """Writes the records of a split and their figures, and prints these; step: the model's."""
    file = run.workdir / split
    records.write(file.with_suffix(".parquet"), table)
    figures = {"step": step, "split": split, **summary.summary(table)}
    files.write_text(file.with_suffix(".json"), json.dumps(figures, indent=2) + "\n")
    print(f"{in_words(figures)}; wrote {file.with_suffix('.json')}")
    if run.config.task.unsafe_code:
        print(summary.UNSAFE_CODE)
    if tasks := by_task.section(figures):
        print(f"\n{tasks}")


def in_words(figures: dict) -> str:
    """Returns what to print of the figures."""
    natural, lenient = figures["natural"], ""
    accuracy = "mean grade" if figures["right"] else "accuracy"
    if figures["lenient_accuracy"]:
        lenient = f" ({figures['lenient_accuracy']['value']:.1%} tags or not)"
    text = (
        f"step {figures['step']}, {figures['n']} {figures['split']} prompts: "
        f"local {accuracy} {figures['local_accuracy']['value']:.1%}{lenient}, "
        f"natural calls {natural['call_rate']['value']:.1%}, "
        f"overall {natural['overall_accuracy']['value']:.1%}"
    )
    if unknown := figures["cloud_unknown"]["value"]:
        text += f", without the {unknown:.1%} of the prompts with an unknown cloud verdict"
    if figures["unjudged"] and (unjudged := figures["unjudged"]["value"]):
        text += f"; {unjudged:.1%} of the device's answers could not be judged, and count as wrong"
    if shared := figures["share_attempt"]:
        text += (
            "; with the device's attempt the cloud is right on "
            f"{shared['accuracy_shared']['value']:.1%} of {shared['n']} calls, without on "
            f"{shared['accuracy']['value']:.1%}, for {shared['extra_input_tokens']:.0f} input "
            "tokens more a call"
        )
    if redaction := figures["redaction"]:
        text += f"; redaction changed {redaction['changed']['value']:.1%} of the prompts"
        if redaction["n"]:
            text += (
                f": on {redaction['n']} of them the cloud is right on "
                f"{redaction['accuracy']['value']:.1%}, and on "
                f"{redaction['accuracy_plain']['value']:.1%} without it"
            )
        elif redaction["changed"]["value"]:
            text += " (an evaluation without it, before, shows what that costs)"
    return text


if __name__ == "__main__":
    suite_name = flags.DEFINE_string(
        "suite", None, "Evaluate on this suite of benchmarks, or on tasks separated by commas."
    )
    split_name = flags.DEFINE_enum(
        "split", "validation", SPLITS, "Evaluate on this split's prompts."
    )

    def run(config: ConfigDict, workdir: pathlib.Path) -> int:
        if not suite_name.value:
            return main(config, workdir, split_name.value)
        if flags.FLAGS["split"].present:
            raise UserError("--suite evaluates on test prompts: leave out --split")
        return suite.evaluate_suite(config, workdir, suite_name.value)

    cli.run_with_config(run, several_hosts=True)
