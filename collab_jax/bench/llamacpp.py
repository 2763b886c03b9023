"""The exported model in llama.cpp: is it the same model, and does its bias hold there?

    python -m collab_jax.bench gguf --config FILE --workdir RUN --out FOLDER
        [--types f16 q8_0 q4_0] [--prompts 1000] [--rate 0.3] [--config.KEY=VALUE ...]

exports the last checkpoint as a GGUF file of each type, FOLDER/TYPE/model.gguf, and decodes
validation prompts with each of them by llama.cpp itself, through `llama-cpp-python` (`pip install
-e ".[llamacpp]"`, which compiles it), with its cache in f16, as its server has it. Beside each file
are its records (`records.parquet`), by which `python -m collab_jax.calibrate --records` finds a
bias: rounded weights have margins of their own. The table tells how rounding moves them and the
share of calls, and what a bias of the file's own mends: one half of the prompts chooses it, and the
other half is decoded once more by llama.cpp's own sampler with that `logit_bias`.
"""

import argparse
import functools
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

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
from collab_jax.rl import evaluation, experiment
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


class LlamaCpp:
    """Greedy decoding by llama.cpp, called as a `Sampler` is; a prompt at a time, on all cores.

    The bias is llama.cpp's own `logit_bias`: on the decision token alone, at every step. Raises
    UserError without the package, or for a file that it does not load.
    """

    def __init__(self, file: pathlib.Path, text: Text, columns: int, max_new: int):
        """columns: of the longest prompt and its response; max_new: tokens of a response."""
        self._lib = _llama_cpp()
        if text.decision_id is None:
            raise UserError("a marker in plain text has no logit_bias: set text.decision_token")
        try:
            self._llama = self._lib.Llama(
                str(file), n_ctx=columns, n_threads=os.cpu_count(), verbose=False
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp does not load {file}: {error}") from None
        self._text, self._call, self._max_new = text, text.decision_id, max_new
        self._read: list[int] = []  # the last prompt

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
        responses = [
            self._response(ids[real].tolist(), float(bias[0]))
            for ids, real in zip(
                prompts.reshape(-1, prompts.shape[-1]),
                prompt_mask.reshape(-1, prompts.shape[-1]),
                strict=True,
            )
        ]
        tokens = np.full((len(responses), self._max_new), self._text.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        logp = np.zeros(tokens.shape, np.float32)
        margins = np.full(tokens.shape, -np.inf, np.float32)
        for i, (written, logps, trace) in enumerate(responses):
            n = len(written)
            tokens[i, :n], logp[i, :n], margins[i, :n], mask[i, :n] = written, logps, trace, True
        ended = np.array([written[-1] in self._text.eos_ids for written, _, _ in responses])
        shape = (*prompts.shape[:2], 1)
        as_asked = lambda x: jnp.asarray(x.reshape(*shape, *x.shape[1:]))  # noqa: E731
        return Samples(
            tokens=as_asked(tokens),
            logp=as_asked(logp),
            mask=as_asked(mask),
            ended=as_asked(ended),
            margins=as_asked(margins),
        )

    def _response(
        self, prompt: list[int], bias: float
    ) -> tuple[list[int], list[float], np.ndarray]:
        """(n tokens, their log-probabilities, margins f32[n]) of one response, its end in them."""
        llama, call, opening = self._llama, self._call, self._text.decision.answer_open
        # What the prompt begins with may have been read already, as a server keeps it.
        llama.n_tokens = llama.longest_token_prefix(self._read, prompt[:-1])
        read = prompt[llama.n_tokens :]
        sampler, tokens, logps, margins = self._sampler(bias), [], [], []
        while len(tokens) < self._max_new and not (tokens and tokens[-1] in self._text.eos_ids):
            llama.eval(read)
            token = self._lib.llama_sampler_sample(sampler, llama.ctx, -1)
            last = self._lib.llama_get_logits_ith(llama.ctx, -1)
            logits = np.ctypeslib.as_array(last, (llama.n_vocab(),)).astype(np.float64)
            margins.append(logits[call] - np.delete(logits, call).max())
            logits[call] += bias
            logps.append(float(logits[token] - np.logaddexp.reduce(logits)))
            tokens.append(token)
            read = [token]
        self._read = prompt
        before = np.array([0, *opening.states(tokens)[:-1]])
        return tokens, logps, np.where(before == Opening.OPEN, -np.inf, margins)

    @functools.lru_cache(maxsize=4)  # noqa: B019  a few, which live as long as the model
    def _sampler(self, bias: float) -> Any:
        """llama.cpp's own sampler: the bias on the decision token, then the best token."""
        lib, n = self._lib, self._llama.n_vocab()
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        entries = (lib.llama_logit_bias * 1)(lib.llama_logit_bias(self._call, bias))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_logit_bias(n, 1, entries))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain


def _llama_cpp() -> Any:
    """The package, an extra. Raises UserError, with what to install, where it is not there."""
    try:
        return importlib.import_module("llama_cpp")
    except ImportError:
        raise UserError(
            'llama-cpp-python is not there: pip install -e ".[llamacpp]" (it is compiled, which '
            "takes minutes)"
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
    _llama_cpp()  # before minutes are spent
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    run = experiment.prepare(config, workdir)
    examples = evaluation.held_out(run, "validation")[:prompts]
    if not examples:
        raise UserError("config.eval.prompts and --prompts must be at least 1")
    state = experiment.state_on_devices(run)
    sampler = evaluation.greedy_sampler(run)
    ours = evaluation.evaluate(run, sampler, state.final_model, examples, "ours", natural=False)
    records.write(out / "ours.parquet", ours)
    ours_bias = _bias(ours, rate)
    rows = [["ours, f32", "", *_moved(ours, ours, ours_bias)]]
    for kind in types:
        file = out / kind / "model.gguf"
        export.export_gguf(run, file, kind)
        columns = config.prompt_length + config.max_new_tokens
        program = LlamaCpp(file, run.text, columns, config.max_new_tokens)
        _check_tokens(run, program, examples)
        table = evaluation.evaluate(run, program, None, examples, kind, natural=False)
        records.write(file.with_name("records.parquet"), table)
        first, held_out = split(table, 0.5)
        assert held_out
        bias = _bias(first, rate)
        sent = _sent(run, program, examples, held_out, bias)
        size = f"{file.stat().st_size / 1e6:.1f}"
        moved, mended = _moved(ours, table, ours_bias), _outcome(held_out, sent)
        rows.append([kind, size, *moved, f"{bias:+.2f}", *mended])
    return markdown.table(HEADER, [[*row, *[""] * (len(HEADER) - len(row))] for row in rows])


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
    """The calibrated bias for a share of calls."""
    return bias_for_rate(table["margin"], answered(table, False), rate).bias


def _sent(
    run: Run, program: LlamaCpp, examples: Sequence[Example], table: Records, bias: float
) -> np.ndarray:
    """bool[n]: the prompts of records that a device with this bias sends to the cloud.

    Those on which llama.cpp calls, and those that have no answer without a call.
    """
    by_id = {example.id: run.task.prompt(example) for example in examples}
    prompts, mask = run.text.prompt_batch(
        [by_id[key] for key in table["id"]], run.config.prompt_length
    )
    samples = program(None, prompts[None], mask[None], bias=np.full(1, bias, np.float32))
    called = ((samples.tokens == run.text.decision_id) & samples.mask).any(-1).ravel()
    return np.asarray(called | ~answered(table, False))


def _moved(ours: Records, table: Records, bias: float) -> list[str]:
    """What a program's records are, beside ours, and what becomes of them with our bias."""
    same = ours["text"] == table["text"]
    moved = np.abs(ours["margin"] - table["margin"])[same & np.isfinite(ours["margin"])]
    return [
        f"{100 * same.mean():.1f}",
        f"{np.quantile(moved, 0.95):.2g}" if moved.size else "",
        markdown.percent(measures.rate(table["local_correct"])),
        *_outcome(table, calls(bias, table["margin"], answered(table, False))),
    ]


def _outcome(table: Records, sent: np.ndarray) -> list[str]:
    """The share of prompts sent, bool[n], and how many of all end up right."""
    right = np.where(sent, table["cloud_correct"], table["local_correct"])[table["cloud_known"]]
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
    add("--prompts", type=int, default=1000, help="of validation, to decode")
    add("--rate", type=float, default=0.3, help="share of prompts to send to the cloud")
    args, settings = parser.parse_known_args(argv)
    config = rehearse.read_config(args.config, settings)
    process.set_up(config.cpu_devices)
    table = compare(config, args.workdir, args.out, args.types, args.prompts, args.rate)
    machine = process.machine()
    print(" ".join(f"{key} {value}," for key, value in machine.items()), "\n")
    print(table)
    return 0
