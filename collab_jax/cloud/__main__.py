"""The answers of the cloud, apart from a run.

    python -m collab_jax.cloud prefetch --config FILE --workdir DIR [--split train] [--yes]
    python -m collab_jax.cloud status   --config FILE --workdir DIR
    python -m collab_jax.cloud export   --config FILE --workdir DIR --file answers.jsonl
    python -m collab_jax.cloud import   --config FILE --workdir DIR --file answers.jsonl
    python -m collab_jax.cloud verify   --config FILE --workdir DIR
    python -m collab_jax.cloud compact  --config FILE --workdir DIR

`prefetch` buys the answers of a split ahead of training: it tells how many are missing and what
they may cost, and with --yes buys them. Ctrl-C lets the calls in flight end; the same command
continues. The workdir may be that of a run, before, during and after it; where config.cloud.store
names a file, that is meant.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import pathlib
import signal
import statistics
import time

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.cloud import transfer
from collab_jax.cloud.cached import CachedCloud, Pending
from collab_jax.cloud.ledger import ledger
from collab_jax.cloud.protocol import Messages
from collab_jax.rl import experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError

SAMPLE = 20  # prompts and answers an estimate is made of
FRUITLESS = 3  # rounds in a row without a new answer before it gives up

SPLIT = flags.DEFINE_enum("split", "train", ["train", "test"], "prefetch: whose prompts.")
YES = flags.DEFINE_bool("yes", False, "prefetch: buy what is missing.")
FILE = flags.DEFINE_string("file", None, "export, import: the file of JSON lines.")


def prefetch(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Buys the answers of a split; 0 when it has them all or was only to tell, 130 after Ctrl-C, 1
    otherwise.
    """
    run = experiment.prepare(config, workdir)
    missing = missing_prompts(run, SPLIT.value)
    total = len(experiment.examples(run, SPLIT.value))
    print(
        f"{run.cloud.store.path}: {total - len(missing)} of {total} {SPLIT.value} prompts have an answer of {config.cloud.model}"
    )
    if not missing:
        return 0
    print(estimate(run, [messages for _, messages in missing]))
    if not YES.value:
        print("nothing was bought: add --yes to buy them")
        return 0
    stopped = []
    previous = signal.getsignal(signal.SIGINT)

    def stop(*_):
        stopped.append(True)
        run.cloud.cancel()
        signal.signal(signal.SIGINT, previous)  # the second one ends it at once

    signal.signal(signal.SIGINT, stop)
    try:
        with tqdm(
            total=total, initial=total - len(missing), desc="prefetch", unit="answer", mininterval=1
        ) as bar:
            fruitless = 0
            while missing and not stopped and fruitless < FRUITLESS:
                bought = buy(run.cloud, missing, bar)
                fruitless = 0 if bought else fruitless + 1
                missing = missing_prompts(run, SPLIT.value)
                pause(
                    run.cloud.breaker.seconds_left() if missing and fruitless < FRUITLESS else 0.0,
                    stopped,
                )
    finally:
        signal.signal(signal.SIGINT, previous)
    spent = run.cloud.budget.spent()
    failed = ", ".join(f"{reason} {n} times" for reason, n in run.cloud.reasons.most_common())
    print(
        f"{total - len(missing)} of {total} are there; {spent.calls} calls, {spent.usd:.4f} USD in all"
        + f"; failed: {failed}" * bool(failed)
    )
    if not missing:
        return 0
    if stopped:
        print("stopped; the same command continues")
        return 130
    if run.cloud.reasons["budget"]:
        raise UserError(run.cloud.budget.message())
    print(f"{len(missing)} prompts are without an answer: start it again, once the cause is mended")
    return 1


def missing_prompts(run: Run, split: str) -> list[tuple[str, Messages]]:
    """(id, messages) of the prompts of a split without an answer, each once."""
    prompts, names = rollout.cloud_prompts(run.task, experiment.examples(run, split))
    by_key = {
        run.cloud.key(messages): (name, messages)
        for name, messages in zip(names, prompts, strict=True)
    }
    found = run.cloud.store.get_many(by_key)
    return [pair for key, pair in by_key.items() if key not in found]


def estimate(run: Run, missing: list[Messages]) -> str:
    """What the missing answers may take, from at most SAMPLE of these prompts and SAMPLE answers of
    this model.

    Nothing is bought for it: without an answer of the model, the output is not known.
    """
    cloud, n = run.cloud.cloud, len(missing)
    columns = "input_tokens, output_tokens, usd"
    rows = run.cloud.store.query(
        f"SELECT {columns} FROM answers WHERE model = ? LIMIT {SAMPLE}", [cloud.model]
    )
    highest = statistics.fmean(
        cloud.highest_usd(messages) for messages in missing[:: -(-n // SAMPLE)]
    )
    if not rows:
        characters = statistics.fmean(
            sum(len(m["content"]) for m in messages) for messages in missing[:: -(-n // SAMPLE)]
        )
        return (
            f"{n} are missing: about {n * characters / 4:.0f} input tokens; at most {n * highest:.2f} USD (no answer of "
            "this model is there yet to tell how long they are)"
        )
    inputs, outputs, usd = (n * statistics.fmean(column) for column in zip(*rows, strict=True))
    return (
        f"{n} are missing: about {inputs:.0f} input and {outputs:.0f} output tokens, {usd:.2f} USD (from {len(rows)} answers); "
        f"at most {n * highest:.2f} USD"
    )


def buy(cloud: CachedCloud, missing: list[tuple[str, Messages]], bar: tqdm) -> int:
    """One round over the missing prompts; how many answers it brought."""
    names, prompts = zip(*missing, strict=True)
    pending: Pending = cloud.submit(prompts, names)
    usd = 0.0
    while True:
        done = pending.done()
        tally = cloud.take_tally()
        usd += tally.usd
        bar.set_postfix_str(f"{usd:.4f} USD", refresh=False)
        bar.update(tally.bought)
        if done:
            return pending.answers().bought
        time.sleep(0.1)


def pause(seconds: float, stopped: list) -> None:
    """Waits until the circuit breaker lets calls through again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopped:
        time.sleep(0.1)


def status(config: ConfigDict, workdir: pathlib.Path) -> int:
    """What the store holds, what it has cost, and what the splits lack."""
    run = experiment.prepare(config, workdir)
    store, spent = run.cloud.store, run.cloud.budget.spent()
    print(f"{store.path}: {store.path.stat().st_size / 2**20:.1f} MiB")
    rows = store.query(
        "SELECT model, COUNT(*), SUM(input_tokens), SUM(output_tokens), TOTAL(usd) FROM answers GROUP BY model"
    )
    for model, count, inputs, outputs, usd in rows:
        print(
            f"  {model}: {count} answers, {inputs} input and {outputs} output tokens, {usd:.4f} USD"
        )
    limits = f"limits: max_calls={config.cloud.max_calls}, max_usd={config.cloud.max_usd}"
    print(
        f"spent: {spent.calls} calls, {spent.usd:.4f} USD, prices of {config.cloud.prices_date}; {limits}"
    )
    (flying,) = store.query("SELECT COUNT(*) FROM leases WHERE expires > ?", [time.time()])[0]
    print(f"being bought: {flying}")
    for split in ("train", "test"):
        print(
            f"{split}: {len(missing_prompts(run, split))} of {len(experiment.examples(run, split))} prompts have no answer"
        )
    return 0


def export(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Every answer of the store as JSON lines."""
    count = transfer.export(experiment.prepare(config, workdir).cloud.store, _file())
    print(f"{count} answers in {FILE.value}")
    return 0


def import_(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Answers that `export` wrote into the store."""
    added, kept = transfer.import_(experiment.prepare(config, workdir).cloud.store, _file())
    print(f"{added} answers are new; {kept} were there already, and are as they were")
    return 0


def verify(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Whether every answer is what was stored: 0, or 1 with what is wrong."""
    store = experiment.prepare(config, workdir).cloud.store
    problems = transfer.verify(store)
    print(
        "\n".join(problems) or f"{store.path}: {ledger(store).calls} answers, each as it was stored"
    )
    return int(bool(problems))


def compact(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Gives the store's unused space back to the disk."""
    store = experiment.prepare(config, workdir).cloud.store
    print(f"{store.path}: {transfer.compact(store) / 2**20:.1f} MiB")
    return 0


def _file() -> pathlib.Path:
    if not FILE.value:
        raise UserError("--file names the file of JSON lines: give it")
    return pathlib.Path(FILE.value).expanduser()


COMMANDS = {
    "prefetch": prefetch, "status": status, "export": export, "import": import_, "verify": verify, "compact": compact,
}  # fmt: skip

if __name__ == "__main__":
    cli.run_with_config(COMMANDS)
