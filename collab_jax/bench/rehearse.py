"""A rehearsal: some steps of a real run at its full shape, without its weights.

The architecture is that of `config.model.path` (a folder, a published name or a hub name), the
weights are random, and so is the tokenizer where none is there: trained on the task's own prompts.
Prompts, verification, store and update are the run's. With random weights no response ends and none
is right, so every response runs to the limit; after it has been judged, half of each group counts
as right. Then every prompt has a gradient, which is the largest update there is. The cloud is
simulated behind the real store; nothing is bought. Several hosts take part as in training: each
samples its share, and all update together.
"""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from collab_jax.bench import measure, runs, work
from collab_jax.models import hf
from collab_jax.models.special_tokens import is_auto
from collab_jax.rl import algorithms, experiment, memory_check, shares, training
from collab_jax.rl.memory_plan import GIB
from collab_jax.runtime import cli, hosts, markdown, process
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import make_task

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerFast

MADE_UP_TOKENS = 8192  # of a tokenizer that is made up, at most


def read_config(file: str, overrides: list[str]) -> ConfigDict:
    """Returns the locked config of FILE with `--config.KEY=VALUE` overrides.

    It is read as on every command line. Raises UserError for a file or a setting that is wrong.
    """
    values, argv = flags.FlagValues(), ["rehearse", f"--config={file}", *overrides]
    flag = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        stray = values(argv)[1:]
        _ = flag.value.cpu_devices  # a missing file is an error at the first use only
    except cli.MISTAKES as error:
        raise UserError(" ".join(str(error).split())) from None
    if stray:
        raise UserError(
            f"unexpected argument {stray[0]!r}: settings are written --config.KEY=VALUE"
        )
    return flag.value


def make_up_tokenizer(
    texts: Iterable[str], config: ConfigDict, size: int
) -> "PreTrainedTokenizerFast":
    """Returns a byte-level BPE tokenizer of at most `size` tokens, learnt from `texts`.

    It has the special tokens of `config.text`, and some for it to find. Raises UserError where
    `size` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    by_name = lambda setting, name: name if is_auto(setting) else setting  # noqa: E731
    pad = by_name(config.text.pad, "<|pad|>")
    eos = by_name(config.text.eos, ("<|end|>",))
    decision = by_name(config.text.decision_token, "<|reserved|>")
    special = list(dict.fromkeys([pad, *eos, decision]))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() > size:
        raise UserError(
            f"a tokenizer has at least {inner.get_vocab_size()} tokens, and this model's "
            f"vocabulary is {size}"
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=eos[0])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    return tokenizer


def architecture_of(config: ConfigDict, layers: int | None) -> dict[str, Any]:
    """Returns config.json of the config's model, cut to `layers` blocks (None: all of them)."""
    architecture = dict(hf.architecture(config.model.path))
    if layers is not None:
        most = architecture["num_hidden_layers"]
        if not 1 <= layers <= most:
            raise UserError(f"--layers={layers} must lie in 1 to {most}, what the model has")
        architecture["num_hidden_layers"] = layers
        architecture.pop("layer_types", None)  # one for each of the model's own blocks
    return architecture


def make_folder(
    name: str, config: ConfigDict, architecture: dict[str, Any], folder: pathlib.Path
) -> str:
    """Writes a model folder of this architecture with random weights; returns a description.

    name: of the model, or its folder, whose tokenizer is taken where it is there.
    """
    cfg = hf.config_from_hf(architecture)
    source = pathlib.Path(name).expanduser()
    source = source if source.is_dir() else hf.ASSETS / name
    has_tokenizer = (source / "tokenizer.json").is_file()
    if not has_tokenizer:
        task = make_task(config)
        texts = [
            message["content"] for example in task.load("train") for message in task.prompt(example)
        ]
        size = min(MADE_UP_TOKENS, cfg.vocab_size)
        make_up_tokenizer(texts, config, size).save_pretrained(folder)
    hf.save(
        folder,
        work.random_params(cfg, config.model.dtype),
        architecture,
        config.model.dtype,
        source,
    )
    tokenizer = "its own" if has_tokenizer else "a made-up"
    return f"{cfg.num_layers} blocks, random weights, {tokenizer} tokenizer"


HEADER = (
    "step",
    "rollout s",
    "of ceiling",
    "update s",
    "of ceiling",
    "tokens",
    "tokens/s",
    "asked",
    "drift, most",
)


@contextlib.contextmanager
def scratch_folder(where: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """A new folder that all hosts share, in `where` or among the system's own.

    It is removed at the end, unless this process is killed. Raises UserError where it cannot be
    made, and where several hosts are not told where.
    """
    if hosts.count() > 1 and where is None:
        raise UserError("several hosts need --scratch, a folder that all of them share")
    if not hosts.is_first():
        yield pathlib.Path(hosts.gathered("the folder of its files", None)[0])
        hosts.gathered("that it is done", None, hosts.FOREVER)
        return
    try:
        if where is not None:
            where = where.expanduser().absolute()
            where.mkdir(parents=True, exist_ok=True)
        # NFS keeps a file that is still open, as the run's store is.
        made = tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"--scratch={where}: {error.strerror}") from None
    with made as name:
        hosts.gathered("the folder of its files", name)
        yield pathlib.Path(name)
        hosts.gathered("that it is done", None, hosts.FOREVER)


def rehearse(
    config: ConfigDict, layers: int | None, steps: int, scratch: pathlib.Path | None = None
) -> str:
    """Runs `steps` steps and returns a page with the time and the memory that they took.

    scratch: where the model and the run are written meanwhile; several hosts must share it. Shares
    of ceilings, and memory, are those of this host.
    """
    with scratch_folder(scratch) as folder:
        name, config = config.model.path, config.copy_and_resolve_references()
        architecture = architecture_of(config, layers)
        cfg = hf.config_from_hf(architecture, config.model.dtype, config.train.remat)
        plan = memory_check.check_fits(cfg, config, memory_check.this_machine())
        config.model.path, config.cloud.kind = str(folder / "model"), "simulated"
        is_first = hosts.is_first()
        made = make_folder(name, config, architecture, folder / "model") if is_first else ""
        hosts.gathered("that the model is made", None, hosts.FOREVER)
        if not (folder / "model").exists():
            raise UserError(f"{folder} is not there: put --scratch where all hosts see it")
        with experiment.prepared_in_turn(config, folder / "run"):
            run = experiment.prepare(config, folder / "run")
        ceiling = measure.matmul_ceiling(config.model.dtype)
        rows = run_steps(run, steps, ceiling)
    machine = " ".join(f"{key} {value}," for key, value in process.machine().items())
    where = "the process" if jax.default_backend() == "cpu" else "one device"
    of_hosts = f" of the first of {hosts.count()} hosts" if hosts.count() > 1 else ""
    return (
        f"{name}: {made}\n"
        f"{machine} matmul ceiling {measure.number(ceiling)}FLOP/s ({config.model.dtype})"
        f"{of_hosts}\n\n"
        f"{plan}\n\n{markdown.table(HEADER, rows)}\n\n"
        f"peak memory {measure.peak_memory() / GIB:.2f} GiB ({where}{of_hosts})"
    )


def run_steps(run: experiment.Run, count: int, ceiling: float) -> list[tuple[str, ...]]:
    """Takes `count` steps of the run; returns a row of HEADER for each. ceiling: FLOP/s."""
    steps, state = training.TrainingSteps(run), experiment.state_on_devices(run)
    rows = []
    for i in range(count):
        started = time.perf_counter()
        collected = steps.collect(state.sampling_model, i)
        collected, _ = shares.agreed(i, collected, stop=False)
        sampled = time.perf_counter()
        state, metrics = steps.update(state, runs.half_right(collected.rollout))
        row = steps.row(i, metrics, collected)  # waits for the update
        ended = time.perf_counter()
        rollout_s, update_s = sampled - started, ended - sampled
        with_gradient = (row["kept"] - row["no_signal"]) / run.config.prompts_per_step
        forward = measure.rollout_flop(run.cfg, jax.tree.map(np.asarray, collected.rollout))
        # Where the decision alone is learnt, nothing is computed again.
        passes = 0 if algorithms.decision_alone(run.config) else 3
        share = passes * with_gradient * forward / update_s / ceiling
        rows.append(
            (
                f"{i + 1}{' (compiles)' * (i == 0)}",
                f"{rollout_s:.2f}",
                f"{forward / rollout_s / ceiling:.1%}",
                f"{update_s:.2f}",
                f"{share:.1%}" if share else "-",
                measure.number(row["tokens"]),
                measure.number(row["tokens"] / (rollout_s + update_s)),
                str(row["cloud_asked"]),
                f"{row['drift_max']:.3f}",
            )
        )
    return rows
