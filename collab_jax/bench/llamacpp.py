"""The exported model in llama.cpp: is it the same model, and does its bias hold there?

    python -m collab_jax.bench gguf --config FILE --workdir RUN --out FOLDER
        [--types f16 q8_0 q4_0] [--prompts 1000] [--rate 0.3] [--config.KEY=VALUE ...]

exports the last checkpoint as a GGUF file of each type, FOLDER/TYPE/model.gguf, and decodes
validation prompts with each of them by llama.cpp itself, through `llama-cpp-python` (`pip install
-e ".[llamacpp]"`, which compiles it), with its cache in f16, as its server has it. Beside each file
are its records (`records.parquet`), by which `python -m collab_jax.calibrate --records` finds a
bias: rounded weights have margins of their own. The cloud of the config is asked about each prompt
once.

One half of the prompts chooses biases, all figures are of the other half. There the records say
what becomes of calls with the bias of our own margins, and llama.cpp's own sampler decodes once
more with the `logit_bias` that the file's margins want.
"""

import argparse
import importlib
import math
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from collab_jax import export, records
from collab_jax.bench import rehearse
from collab_jax.calibrate import answered, split
from collab_jax.models import gguf_export
from collab_jax.models.decision import Opening
from collab_jax.models.sampler import Samples
from collab_jax.models.text import Text
from collab_jax.records import Records
from collab_jax.rl import evaluation, experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.routing import measures
from collab_jax.routing.calibration import bias_for_rate, calls
from collab_jax.runtime import markdown, process
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example

HEADER = [
    "program",
    "MB",
    "responses as ours, %",
    "margins of these moved by, 95th percentile",
    "alone right, %",
    "our bias: calls, %",
    "right, %",
    "own bias",
    "calls, %",
    "right, %",
]
OF_CLOUD = "cloud_correct", "cloud_known", "cloud_tokens", "cloud_usd", "cloud_grade"


class LlamaCpp:
    """Greedy decoding by llama.cpp, called as a `Sampler` is; a prompt at a time, on all cores.

    The bias is llama.cpp's own `logit_bias`: on the decision token alone, at every step. `close` it
    after use. Raises UserError without the package, and for a file that it does not load.
    """

    def __init__(self, file: pathlib.Path, text: Text, columns: int, max_new: int):
        """columns: of the longest prompt and its response; max_new: tokens of a response."""
        assert text.decision_id is not None, "a marker in plain text has no logit_bias"
        self._lib = llama_cpp()
        try:
            self._llama = self._lib.Llama(
                str(file), n_ctx=columns, n_threads=os.cpu_count(), verbose=False
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp does not load {file}: {error}") from None
        self._text, self._call, self._max_new = text, text.decision_id, max_new
        self._read: list[int] = []  # the last prompt

    def close(self) -> None:
        """Frees the model."""
        self._llama.close()

    def reads(self, ids: Sequence[int]) -> bool:
        """Whether its tokenizer makes these tokens of a prompt's text."""
        backend = self._text.tokenizer.backend_tokenizer
        text = backend.decode(list(ids), skip_special_tokens=False)
        return self._llama.tokenize(text.encode(), add_bos=False, special=True) == list(ids)

    def __call__(
        self,
        params: Any,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        *keys: np.ndarray,
        bias: np.ndarray,
        finished: Any = None,
    ) -> Samples:
        """Samples [D, P, 1, T] of the prompts [D, P, L]; params, keys, finished: not used."""
        L, T = prompts.shape[-1], self._max_new
        pairs = zip(prompts.reshape(-1, L), prompt_mask.reshape(-1, L), strict=True)
        asked = [tuple(ids[real].tolist()) for ids, real in pairs]
        beta, sampler = float(bias[0]), self._sampler(float(bias[0]))
        try:  # what fills a batch is the same prompt again
            found = {ids: self._response(list(ids), beta, sampler) for ids in dict.fromkeys(asked)}
        finally:
            self._lib.llama_sampler_free(sampler)
        tokens = np.full((len(asked), T), self._text.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        logp = np.zeros(tokens.shape, np.float32)
        margins = np.full(tokens.shape, -np.inf, np.float32)
        for i, ids in enumerate(asked):
            written, logps, trace = found[ids]
            n = len(written)
            tokens[i, :n], logp[i, :n], margins[i, :n], mask[i, :n] = written, logps, trace, True
        ended = np.array([found[ids][0][-1] in self._text.eos_ids for ids in asked])
        shape = (*prompts.shape[:2], 1)
        as_asked = lambda x: jnp.asarray(x.reshape(*shape, *x.shape[1:]))  # noqa: E731
        return Samples(
            tokens=as_asked(tokens),
            logp=as_asked(logp),
            mask=as_asked(mask),
            ended=as_asked(ended),
            margins=as_asked(margins),
        )

    def _sampler(self, bias: float) -> Any:
        """llama.cpp's own sampler, to be freed: the bias on the decision token, then the best."""
        lib, n = self._lib, self._llama.n_vocab()
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        entries = (lib.llama_logit_bias * 1)(lib.llama_logit_bias(self._call, bias))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_logit_bias(n, 1, entries))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain

    def _response(
        self, prompt: list[int], bias: float, sampler: Any
    ) -> tuple[list[int], list[float], np.ndarray]:
        """(n tokens, their log-probabilities, margins f32[n]) of one response, its end in them."""
        llama, call, opening = self._llama, self._call, self._text.decision.answer_open
        # What the prompt begins with may have been read already, as a server keeps it.
        llama.n_tokens = llama.longest_token_prefix(self._read, prompt[:-1])
        read = prompt[llama.n_tokens :]
        tokens, logps, margins = [], [], []
        while len(tokens) < self._max_new and not (tokens and tokens[-1] in self._text.eos_ids):
            llama.eval(read)
            token = self._lib.llama_sampler_sample(sampler, llama.ctx, -1)
            last = self._lib.llama_get_logits_ith(llama.ctx, -1)
            logits = np.ctypeslib.as_array(last, (llama.n_vocab(),)).astype(np.float64)
            of_call, logits[call] = logits[call], -np.inf
            margins.append(of_call - logits.max())
            logits[call] = of_call + bias
            best = logits.max()
            logps.append(logits[token] - best - np.log(np.exp(logits - best).sum()))
            tokens.append(token)
            read = [token]
        self._read = prompt
        before = np.array([0, *opening.states(tokens)[:-1]])
        return tokens, logps, np.where(before == Opening.OPEN, -np.inf, margins)


def llama_cpp() -> Any:
    """The package, an extra. Raises UserError, with what to install, where it does not load."""
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f'llama-cpp-python does not load ({error}): pip install -e ".[llamacpp]" (it is '
            "compiled, which takes minutes)"
        ) from None


def compare(
    config: ConfigDict,
    workdir: pathlib.Path,
    out: pathlib.Path,
    types: Sequence[str],
    prompts: int,
    rate: float,
) -> str:
    """Exports and decodes, writes the files, and returns the table, a row for each program."""
    run = _prepare(config, workdir, prompts, rate)
    examples = evaluation.held_out(run, "validation")[:prompts]
    for kind in types:
        _make_folder(out / kind)
    state, sampler = experiment.state_on_devices(run), evaluation.greedy_sampler(run)
    model = experiment.gathering(run.cfg)(state.final_model)
    ours = evaluation.evaluate(run, sampler, model, examples, "ours", natural=False)
    records.write(out / "ours.parquet", ours)
    bias, half = _bias(ours, rate), _checked(ours)
    label = f"ours, {config.model.dtype}"
    rows = [[label, "", *_moved(half, half, bias), f"{bias:+.2f}", *_routed(half, bias)]]
    for kind in types:
        file = out / kind / "model.gguf"
        export.export_gguf(run, file, kind)
        size = f"{file.stat().st_size / 1e6:.1f}"
        rows.append([kind, size, *_of_file(run, file, examples, ours, bias, rate)])
    return markdown.table(HEADER, rows)


def _prepare(config: ConfigDict, workdir: pathlib.Path, prompts: int, rate: float) -> Run:
    """The run. Raises UserError, before anything takes long, for what cannot be compared."""
    llama_cpp()
    if not 0 < rate < 1:
        raise UserError(f"--rate={rate:g} must lie between 0 and 1, both excluded")
    run = export.prepare(config, workdir)
    if run.text.decision_id is None:
        raise UserError("a marker in plain text has no logit_bias: set config.text.decision_token")
    least = 2 * math.ceil(1 / rate)
    if min(prompts, config.eval.prompts) < least:
        raise UserError(
            f"a half of the prompts is to choose a bias for --rate={rate:g}: --prompts and "
            f"config.eval.prompts must be at least {least}"
        )
    return run


def _make_folder(folder: pathlib.Path) -> None:
    """Makes a folder in which files can be written. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another --out"
        ) from None


def _of_file(
    run: Run,
    file: pathlib.Path,
    examples: Sequence[Example],
    ours: Records,
    our_bias: float,
    rate: float,
) -> list[str]:
    """Decodes by llama.cpp, writes the records, and returns the figures of a row."""
    limit = run.config.max_new_tokens
    program = LlamaCpp(file, run.text, run.config.prompt_length + limit, limit)
    try:
        _check_tokens(run, program, examples)
        table = evaluation.evaluate(
            run, program, None, examples, file.parent.name, natural=False, ask_cloud=False
        )
        table |= {name: ours[name] for name in OF_CLOUD if name in ours}
        records.write(file.with_name("records.parquet"), table)
        bias, half = _bias(table, rate), _checked(table)
        figures = _moved(_checked(ours), half, our_bias)
        return [*figures, f"{bias:+.2f}", *_served(run, program, examples, half, bias)]
    finally:
        program.close()


def _check_tokens(run: Run, program: LlamaCpp, examples: Sequence[Example]) -> None:
    """Raises UserError where llama.cpp cuts the text of a prompt otherwise."""
    prompts = [run.task.prompt(example) for example in examples]
    odd = [p for p in prompts if not program.reads(run.text.prompt_ids(p))]
    if odd:
        raise UserError(
            f"llama.cpp makes other tokens of {len(odd)} of {len(prompts)} prompts, as of "
            f"{odd[0][-1]['content'][:60]!r}"
        )


def _bias(table: Records, rate: float) -> float:
    """The bias for a share of calls, chosen by one half of the prompts."""
    first, _ = split(table, 0.5)
    return bias_for_rate(first["margin"], answered(first, False), rate).bias


def _checked(table: Records) -> Records:
    """The other half of the prompts."""
    _, second = split(table, 0.5)
    assert second
    return second


def _moved(ours: Records, table: Records, bias: float) -> list[str]:
    """What a program's records are, beside ours, and what becomes of them with our bias."""
    same = ours["text"] == table["text"]
    moved = np.abs(ours["margin"] - table["margin"])[same & np.isfinite(ours["margin"])]
    return [
        f"{100 * same.mean():.1f}",
        f"{np.quantile(moved, 0.95):.2g}" if moved.size else "",
        markdown.percent(measures.rate(table["local_correct"])),
        *_routed(table, bias),
    ]


def _routed(table: Records, bias: float) -> list[str]:
    """Calls and what is right in the end with a bias, by the margins of records."""
    return _outcome(
        table, calls(bias, table["margin"], answered(table, False)), table["local_correct"]
    )


def _served(
    run: Run, program: LlamaCpp, examples: Sequence[Example], table: Records, bias: float
) -> list[str]:
    """The same as llama.cpp does it with that `logit_bias`.

    A prompt goes to the cloud where the response calls, and where it is no answer.
    """
    by_id = {example.id: example for example in examples}
    asked = [by_id[key] for key in table["id"]]
    prompts, mask = run.text.prompt_batch(
        [run.task.prompt(example) for example in asked], run.config.prompt_length
    )
    samples = jax.tree.map(
        lambda x: np.asarray(x)[0, :, 0],
        program(None, prompts[None], mask[None], bias=np.full(1, bias, np.float32)),
    )
    verdicts = rollout.judge(run.task, run.text, asked, samples.tokens, samples.mask, samples.ended)
    decisions = (samples.tokens == run.text.decision_id) & (samples.margins > -np.inf)
    sent = decisions.any(-1) | ~(samples.ended & verdicts.formatted)
    return _outcome(table, sent, verdicts.correct)


def _outcome(table: Records, sent: np.ndarray, local: np.ndarray) -> list[str]:
    """The share of prompts sent, bool[n], and how many of all end up right; local bool[n]."""
    right = np.where(sent, table["cloud_correct"], local)[table["cloud_known"]]
    return [
        markdown.percent(measures.rate(sent)),
        markdown.percent(measures.rate(right)) if right.size else "not known",
    ]


def run_gguf_bench(argv: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench gguf", description="The exported model in llama.cpp."
    )
    add = parser.add_argument
    add(
        "--config",
        required=True,
        help="the experiment's file; --config.KEY=VALUE changes a setting",
    )
    add("--workdir", type=pathlib.Path, required=True, help="the run to export")
    add("--out", type=pathlib.Path, required=True, help="folder for GGUF files and records")
    add("--types", nargs="+", default=["f16", "q8_0", "q4_0"], choices=list(gguf_export.TYPES))
    add("--prompts", type=int, default=1000, help="of config.eval.prompts, to decode")
    add("--rate", type=float, default=0.3, help="share of prompts to send to the cloud")
    args, settings = parser.parse_known_args(argv)
    config = rehearse.read_config(args.config, settings)
    process.set_up(config.cpu_devices)
    table = compare(config, args.workdir, args.out, args.types, args.prompts, args.rate)
    machine = process.machine() | {"llama-cpp-python": llama_cpp().__version__}
    print(" ".join(f"{key} {value}," for key, value in machine.items()), "\n")
    print(table)
    return 0
