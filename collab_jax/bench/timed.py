"""The sub-commands of a bench that time work in turn: decode, update, step, peers, settings."""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from collab_jax.bench import measure, peers, runs, work
from collab_jax.bench.measure import Timing
from collab_jax.bench.runs import Training
from collab_jax.bench.work import Case, Load
from collab_jax.runtime import parallel, process
from collab_jax.runtime.errors import UserError

HEADER = (
    "work",
    "median s",
    "quartiles",
    "useful tokens/s",
    "of matmul ceiling",
    "of copy ceiling",
    "first call s",
)


class Bench:
    """The sub-commands: each times its cases and adds to `rows`, `figures` and `notes`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        dtype = getattr(args, "dtype", "float32")
        self.ceilings = {
            "matmul_flop_s": measure.matmul_ceiling(dtype),
            "copy_bytes_s": measure.copy_ceiling(),
        }
        self.rows: list[tuple[str, ...]] = []  # of a table with HEADER
        self.figures: dict[str, Any] = {}  # for --json
        self.notes: list[str] = []  # ratios, in words

    def load(self, lengths: str) -> Load:
        """Returns the size of the work on the command line. Raises UserError for its shape."""
        args = self.args
        if args.shape not in work.SHAPES:
            raise UserError(f"--shape={args.shape}: use one of {sorted(work.SHAPES)}")
        return work.Load(
            shape=args.shape,
            lengths=lengths,
            prompts=args.prompts,
            group=args.group,
            prompt_length=args.prompt_length,
            max_new=args.max_new,
            dtype=args.dtype,
            micro_rows=args.micro_rows,
        )

    def time(
        self, cases: Mapping[str, Case | Callable[[], float]], title: str
    ) -> dict[str, Timing]:
        """Times `cases`, which have names: each is one of ours, or a peer's function.

        Adds their rows and figures; returns the timings by name.
        """
        print(title, file=sys.stderr)
        calls = {name: case.run if isinstance(case, Case) else case for name, case in cases.items()}
        timings = measure.interleaved(calls, self.args.repeats, lambda s: print(s, file=sys.stderr))
        for name, timing in timings.items():
            figures = {
                "title": title,
                "name": name,
                **timing.summary(),
                "tokens_per_s": timing.rate,
                **self._shares(cases[name], timing.seconds[-1]),
            }
            self.figures[f"{title}: {name}"] = figures
            low, high = figures["quartiles_s"]
            self.rows.append(
                (
                    f"{title}: {name}",
                    f"{timing.median:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    measure.number(timing.rate),
                    _percent(figures.get("matmul_share")),
                    _percent(figures.get("copy_share")),
                    f"{timing.first:.1f}",
                )
            )
        return timings

    def _shares(self, case: Case | Callable[[], float], seconds: float) -> dict[str, float]:
        """Returns the shares of the machine's ceilings that the latest run of a case reached."""
        shares = {}
        if isinstance(case, Case):
            shares["matmul_share"] = case.flop() / seconds / self.ceilings["matmul_flop_s"]
            if case.bytes is not None:
                shares["copy_share"] = case.bytes() / seconds / self.ceilings["copy_bytes_s"]
        return shares

    def compare(self, timings: dict[str, Timing], ours: str, theirs: str, title: str) -> None:
        """Adds how many times as fast `ours` is as `theirs`, in words and as a figure."""
        ratio = measure.ratio(timings[ours], timings[theirs])
        self.figures[f"{title}: {ours} / {theirs}"] = ratio
        low, high = ratio["quartiles"]
        self.notes.append(
            f"{title}: {ours} is {ratio['median']:.2f} times {theirs} "
            f"(quartiles {low:.2f} to {high:.2f})"
        )

    # ------------------------------------------------------------------------------- sub-commands

    def decode(self) -> None:
        """Times sampling beside the loop with a fixed batch."""
        for lengths in self.args.lengths:
            load = self.load(lengths)
            cfg, params = work.make_model(load)
            params = parallel.replicate(params)
            cases = {
                "ours": work.decode(load, cfg, params, self.args.segments, self.args.slot_counts),
                "fixed batch": work.decode(load, cfg, params, 1, 1),
            }
            title = f"decode {load.shape} {lengths}"
            self.compare(self.time(cases, title), "ours", "fixed batch", title)

    def update(self) -> None:
        """Times one policy-gradient update."""
        for lengths in self.args.lengths:
            load = self.load(lengths)
            cfg, params = work.make_model(load)
            case = work.update(load, cfg, params)
            self.time({"ours": case}, f"update {load.shape} {lengths}")

    def step(self) -> None:
        """Times one full training step."""
        training = make_training(self.args)
        self.time({"ours": training.case}, f"step {self.args.shape}")

    def peers(self) -> None:
        """Times the same work through transformers, PyTorch and TRL."""
        installed = peers.versions()
        print(f"peers: {installed}", file=sys.stderr)
        if missing := {"torch", "transformers", "trl"} - set(installed):
            raise UserError(
                f"{', '.join(sorted(missing))} not installed: pip install -e '.[peers]'"
            )
        self.figures["peers"] = installed
        with tempfile.TemporaryDirectory() as scratch:
            for lengths in self.args.lengths:
                if {"decode", "update"} & set(self.args.only):
                    self._beside_torch(self.load(lengths), pathlib.Path(scratch) / lengths)
            if "step" in self.args.only:
                self._beside_trl(pathlib.Path(scratch) / "step")

    def _beside_torch(self, load: Load, folder: pathlib.Path) -> None:
        """Times sampling beside transformers', and the update beside one in PyTorch."""
        args = self.args
        cfg, params = work.make_model(load)
        work.save(load, params, folder)
        prompts, prompt_mask = work.make_prompts(load)
        if "decode" in args.only:
            ours = work.decode(
                load, cfg, parallel.replicate(params), args.segments, args.slot_counts
            )
            theirs = peers.generate(
                folder,
                prompts,
                prompt_mask,
                group=load.group,
                max_new=load.max_new,
                dtype=load.dtype,
                eos_ids=work.eos_ids(load),
            )
            title = f"decode {load.shape} {load.lengths}"
            timings = self.time({"ours": ours, "transformers": theirs}, title)
            self.compare(timings, "ours", "transformers", title)
        if "update" in args.only:
            batch, tokens = work.update_batch(load), work.response_lengths(load).sum()
            theirs = peers.update(
                folder,
                prompts,
                prompt_mask,
                np.asarray(batch.tokens),
                np.asarray(batch.mask),
                np.asarray(batch.correct * 2.0 - 1, np.float32),
                micro_rows=load.micro_rows,
                learning_rate=1e-6,
                dtype=load.dtype,
            )
            ours = work.update(load, cfg, params)
            title = f"update {load.shape} {load.lengths}"
            timings = self.time({"ours": ours, "torch": _counted(theirs, tokens)}, title)
            self.compare(timings, "ours", "torch", title)

    def _beside_trl(self, folder: pathlib.Path) -> None:
        """Times full training steps beside TRL's, whose model is written to `folder`."""
        ours = make_training(self.args)
        config, run = ours.config, ours.run
        runs.save_of(run, folder)
        trl = peers.trl_step(
            folder,
            run.task.load("train")[:2048],
            text=run.text,
            task=run.task,
            config=config,
            prompts_per_step=config.prompts_per_step,
            group=config.group,
            max_new=config.max_new_tokens,
            micro_rows=math.gcd(config.prompts_per_step * config.group, self.args.trl_rows),
        )
        title = f"step {self.args.shape}"
        cases: dict[str, Case | Callable[[], float]] = {"ours": ours.case, "TRL": trl}
        if config.algorithm.filter != "none":
            unfiltered = make_training(self.args, {"algorithm.filter": "none"})
            cases["ours, no filter"] = unfiltered.case
        timings = self.time(cases, title)
        trl.close()
        for name in sorted(timings.keys() - {"TRL"}):
            self.compare(timings, name, "TRL", title)

    def settings(self) -> None:
        """Times processes of this program, each with other settings, that take a step in turn."""
        plain = {name: value for name, value in os.environ.items() if name not in process.ALLOCATOR}
        off = plain | {
            "MALLOC_MMAP_MAX_": "65536"
        }  # glibc's own default, so that nothing starts anew
        variants = {
            "2 host devices, allocator": (plain | process.ALLOCATOR, 2),
            "2 host devices": (off, 2),
            "1 host device, allocator": (plain | process.ALLOCATOR, 1),
            "1 host device": (off, 1),
        }
        command = [sys.executable, "-m", "collab_jax.bench", "serve-steps"]
        command += ["--prompts", str(self.args.prompts), "--group", str(self.args.group)]
        children = {
            name: Served([*command, "--cpu_devices", str(devices)], env)
            for name, (env, devices) in variants.items()
        }
        try:
            self.time(children, "step tiny")
        finally:
            for child in children.values():
                child.close()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _counted(run: Callable[[], object], work: float) -> Callable[[], float]:
    """Returns `run`, but that it returns `work`."""

    def counted() -> float:
        run()
        return float(work)

    return counted


class Served:
    """A process of `serve_steps`: each call takes one step there and returns its tokens."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self._process.stdin and self._process.stdout  # they are pipes
        self._requests, self._tokens = self._process.stdin, self._process.stdout

    def __call__(self) -> float:
        self._requests.write("step\n")
        self._requests.flush()
        return float(self._tokens.readline())

    def close(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait()


def make_training(args: argparse.Namespace, overrides: dict[str, Any] | None = None) -> Training:
    """Returns the run of a shape in the command line's sizes, whose case is one full step.

    Raises UserError where no config is for the shape.
    """
    if args.shape not in runs.STEPS:
        raise UserError(f"--shape={args.shape}: a step is timed of {' or '.join(runs.STEPS)}")
    sizes = {"prompts_per_step": args.prompts, "group": args.group, "cpu_devices": args.cpu_devices}
    return runs.full_step(args.shape, sizes | (overrides or {}))


def serve_steps(args: argparse.Namespace) -> int:
    """Takes one step for each line of the standard input, and prints its tokens as a line."""
    training = make_training(args)
    for _ in sys.stdin:
        print(training.case.run(), flush=True)
    return 0
