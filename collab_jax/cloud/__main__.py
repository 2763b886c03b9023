"""The answers of the cloud, apart from a run.

    python -m collab_jax.cloud prefetch --config FILE --workdir DIR [--split train] [--yes]
    python -m collab_jax.cloud status   --config FILE --workdir DIR
    python -m collab_jax.cloud export   --config FILE --workdir DIR --file answers.jsonl
    python -m collab_jax.cloud import   --config FILE --workdir DIR --file answers.jsonl
    python -m collab_jax.cloud verify   --config FILE --workdir DIR
    python -m collab_jax.cloud compact  --config FILE --workdir DIR

`prefetch` buys the answers of a split ahead of training: it says how many are missing and what they
may cost, and with --yes buys them. Ctrl-C lets the calls in flight end; the same command continues.
The workdir may be that of a run, before, during and after it; where config.cloud.store names a
file, the commands work on that file.
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
from collab_jax.cloud.cached import CachedCloud
from collab_jax.cloud.ledger import ledger
from collab_jax.models.text import Messages
from collab_jax.rl import experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.runtime import cli
from collab_jax.runtime.errors import UserError

SAMPLE = 20  # prompts and answers that an estimate is made of
FRUITLESS = 3  # rounds in a row without a new answer before it gives up

SPLIT = flags.DEFINE_enum(
    "split", "train", ["train", "validation", "test"], "prefetch: whose prompts."
)
YES = flags.DEFINE_bool("yes", False, "prefetch: buy what is missing.")
FILE = flags.DEFINE_string("file", None, "export, import: the file of JSON lines.")


class CancelOnInterrupt:
    """A context in which the first Ctrl-C cancels what the cloud has not begun to buy.

    The second one acts as usual.
    """

    def __init__(self, cloud: CachedCloud):
        self._cloud = cloud
        self.requested = False

    def __enter__(self) -> "CancelOnInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._cancel)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _cancel(self, *_) -> None:
        self.requested = True
        self._cloud.cancel()
        signal.signal(signal.SIGINT, self._previous)


def prefetch(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Buys the answers of a split; returns the exit status.

    0 when the store has them all, or without --yes; 130 after Ctrl-C, 1 otherwise.
    """
    run = experiment.prepare(config, workdir)
    missing = missing_prompts(run, SPLIT.value)
    total = len(experiment.examples(run, SPLIT.value))
    print(
        f"{run.cloud.store.path}: {total - len(missing)} of {total} {SPLIT.value} prompts have an "
        f"answer of {config.cloud.model}"
    )
    if not missing:
        return 0
    print(estimate(run, [run.cloud.redact(messages).messages for _, messages in missing]))
    if not YES.value:
        print("nothing was bought: add --yes to buy them")
        return 0
    with CancelOnInterrupt(run.cloud) as interrupt:
        missing = buy_all(run, missing, total, interrupt)
    spent = run.cloud.budget.spent()
    failed = ", ".join(f"{reason} {n} times" for reason, n in run.cloud.reasons.most_common())
    print(
        f"{total - len(missing)} of {total} are there; {spent.calls} calls, {spent.usd:.4f} USD in "
        "all" + f"; failed: {failed}" * bool(failed)
    )
    if not missing:
        return 0
    if interrupt.requested:
        print("stopped; the same command continues")
        return 130
    if run.cloud.reasons["budget"]:
        raise UserError(run.cloud.budget.message())
    print(f"{len(missing)} prompts have no answer: start it again, once the cause is mended")
    return 1


def buy_all(
    run: Run, missing: list[tuple[str, Messages]], total: int, interrupt: CancelOnInterrupt
) -> list[tuple[str, Messages]]:
    """Buys in rounds until nothing is missing, and returns what is.

    It also ends at Ctrl-C, and after FRUITLESS rounds without an answer.

    missing: as of `missing_prompts`. total: prompts of the split, for the progress bar.
    """
    fruitless, bought = 0, total - len(missing)
    with tqdm(
        total=total, initial=bought, desc="prefetch", unit="answer", mininterval=1
    ) as progress:
        while missing and not interrupt.requested and fruitless < FRUITLESS:
            fruitless = 0 if buy_once(run.cloud, missing, progress) else fruitless + 1
            missing = missing_prompts(run, SPLIT.value)
            if missing and fruitless < FRUITLESS:
                pause(run.cloud.breaker.seconds_left(), interrupt)
    return missing


def missing_prompts(run: Run, split: str) -> list[tuple[str, Messages]]:
    """Returns (id, messages) of the prompts of a split without an answer, each once."""
    prompts, names = rollout.cloud_prompts(run.task, experiment.examples(run, split))
    queries = [run.cloud.redact(messages) for messages in prompts]
    by_key = {
        run.cloud.key(query.messages): (name, messages)
        for name, messages, query in zip(names, prompts, queries, strict=True)
    }
    stored = run.cloud.store.get_many(by_key)
    return [pair for key, pair in by_key.items() if key not in stored]


def estimate(run: Run, missing: list[Messages]) -> str:
    """Returns what the missing answers may take, in words.

    It is made from at most SAMPLE of these prompts and SAMPLE answers of this model. Nothing is
    bought for it: without an answer of the model, the length of an answer is not known.
    """
    cloud, n = run.cloud.cloud, len(missing)
    rows = run.cloud.store.query(
        f"SELECT input_tokens, output_tokens, usd FROM answers WHERE model = ? LIMIT {SAMPLE}",
        [cloud.model],
    )
    sample = missing[:: -(-n // SAMPLE)]
    highest = n * statistics.fmean(cloud.highest_usd(messages) for messages in sample)
    if not rows:
        characters = statistics.fmean(sum(len(m["content"]) for m in prompt) for prompt in sample)
        return (
            f"{n} are missing: about {n * characters / 4:.0f} input tokens; at most {highest:.2f} "
            "USD (no answer of this model is there yet that would show how long they are)"
        )
    inputs, outputs, usd = (n * statistics.fmean(column) for column in zip(*rows, strict=True))
    return (
        f"{n} are missing: about {inputs:.0f} input and {outputs:.0f} output tokens, {usd:.2f} USD "
        f"(from {len(rows)} answers); at most {highest:.2f} USD"
    )


def buy_once(cloud: CachedCloud, missing: list[tuple[str, Messages]], progress: tqdm) -> int:
    """Orders all missing prompts once; returns how many answers that brought."""
    names, prompts = zip(*missing, strict=True)
    pending = cloud.submit(prompts, names)
    usd = 0.0
    while True:
        done = pending.done()
        tally = cloud.take_tally()
        usd += tally.usd
        progress.set_postfix_str(f"{usd:.4f} USD", refresh=False)
        progress.update(tally.bought)
        if done:
            return pending.answers().bought
        time.sleep(0.1)


def pause(seconds: float, interrupt: CancelOnInterrupt) -> None:
    """Sleeps for some seconds, or until Ctrl-C."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not interrupt.requested:
        time.sleep(0.1)


def status(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Prints what the store holds, what it has cost, and what the splits lack."""
    run = experiment.prepare(config, workdir)
    store, spent = run.cloud.store, run.cloud.budget.spent()
    print(f"{store.path}: {store.path.stat().st_size / 2**20:.1f} MiB")
    rows = store.query(
        "SELECT model, IFNULL(provider, ''), COUNT(*), SUM(input_tokens), SUM(output_tokens),"
        " TOTAL(usd) FROM answers GROUP BY 1, 2"
    )
    for model, provider, count, inputs, outputs, usd in rows:
        print(
            f"  {model}{f' by {provider}' * bool(provider)}: {count} answers, {inputs} input and "
            f"{outputs} output tokens, {usd:.4f} USD"
        )
    print(
        f"spent: {spent.calls} calls, {spent.usd:.4f} USD, prices of {config.cloud.prices_date}; "
        f"limits: max_calls={config.cloud.max_calls}, max_usd={config.cloud.max_usd}"
    )
    [(leased,)] = store.query("SELECT COUNT(*) FROM leases WHERE expires > ?", [time.time()])
    print(f"being bought: {leased}")
    for split in run.task.splits:
        missing, total = len(missing_prompts(run, split)), len(experiment.examples(run, split))
        print(f"{split}: {missing} of {total} prompts have no answer")
    return 0


def export(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Writes every answer of the store to --file, as JSON lines."""
    store = experiment.prepare(config, workdir).cloud.store
    print(f"{transfer.export_answers(store, _file())} answers in {FILE.value}")
    return 0


def import_(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Adds the answers of --file, which `export` wrote, to the store."""
    store = experiment.prepare(config, workdir).cloud.store
    added, kept = transfer.import_answers(store, _file())
    print(f"{added} answers are new; {kept} were there already, and are as they were")
    return 0


def verify(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Checks that every answer is what was stored; returns 0, or 1 and prints what is wrong."""
    store = experiment.prepare(config, workdir).cloud.store
    problems = transfer.verify_store(store)
    sound = f"{store.path}: {ledger(store).calls} answers, each as it was stored"
    print("\n".join(problems) if problems else sound)
    return int(bool(problems))


def compact(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Gives the store's unused space back to the disk."""
    store = experiment.prepare(config, workdir).cloud.store
    print(f"{store.path}: {transfer.compact_store(store) / 2**20:.1f} MiB")
    return 0


def _file() -> pathlib.Path:
    if not FILE.value:
        raise UserError("--file names the file of JSON lines: give it")
    return pathlib.Path(FILE.value).expanduser()


COMMANDS = {
    "prefetch": prefetch,
    "status": status,
    "export": export,
    "import": import_,
    "verify": verify,
    "compact": compact,
}

if __name__ == "__main__":
    cli.run_with_config(COMMANDS)
