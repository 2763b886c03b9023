"""Speed on this machine, in useful tokens: padding and rows that have ended count for nothing.

    python -m collab_jax.bench decode              sampling, against the same loop with a fixed batch
    python -m collab_jax.bench update              one policy-gradient update
    python -m collab_jax.bench step                one full training step of configs/countdown_tiny.py
    python -m collab_jax.bench peers               all three against transformers and TRL (pip install -e .[peers])
    python -m collab_jax.bench settings            the step with and without the settings of process.py
    python -m collab_jax.bench rehearse --config configs/countdown_qwen2p5_3b.py [--layers N] [--config.KEY=VALUE ...]
                                                   some steps of a real run at its full shape, with random weights
    python -m collab_jax.bench cloud               the cloud's store and client against faults and kills (cloud.py)

prints a table and, with --json FILE, writes every figure. Whatever is compared runs in turn, round
by round.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from collab_jax.runtime import cli, markdown
from collab_jax.runtime.errors import UserError

SERVE = "serve-steps"  # what `settings` starts
REHEARSE = "rehearse"
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "countdown_tiny.py"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench", description="Speed on this machine."
    )
    shown = ("decode", "update", "step", "peers", "settings")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar=f"{{{','.join(shown)},{REHEARSE}}}"
    )
    p = commands.add_parser(REHEARSE)
    p.add_argument(
        "--config",
        required=True,
        help="the experiment's file; --config.KEY=VALUE changes a setting",
    )
    p.add_argument("--layers", type=int, help="blocks, instead of all that the model has")
    p.add_argument("--steps", type=int, default=3)
    for name in (*shown, SERVE):
        p = commands.add_parser(name)
        p.add_argument("--repeats", type=int, default=7, help="timed rounds")
        p.add_argument(
            "--cpu_devices", type=int, default=2, help="host devices where there is no accelerator"
        )
        p.add_argument("--prompts", type=int, default=32)
        p.add_argument("--group", type=int, default=8, help="responses for each prompt")
        p.add_argument("--json", type=pathlib.Path, help="file for every figure")
        if name in ("decode", "update", "peers"):
            p.add_argument(
                "--shape", default="tiny", help="tiny, 25m, qwen2.5-0.5b or qwen2.5-1.5b"
            )
            p.add_argument("--prompt_length", type=int, default=16)
            p.add_argument("--max_new", type=int, default=56)
            p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
            p.add_argument(
                "--micro_rows", type=int, default=16, help="responses of one backward pass"
            )
            p.add_argument("--segments", type=int, default=2)
            p.add_argument("--slot_counts", type=int, default=3)
        if name == "peers":
            p.add_argument(
                "--only",
                nargs="+",
                default=["decode", "update", "step"],
                choices=["decode", "update", "step"],
            )
    args, settings = parser.parse_known_args(argv)
    if settings and args.command != REHEARSE:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    args.settings = settings
    return args


class Bench:
    """The sub-commands. Each returns (rows of the table, figures)."""

    HEADER = (
        "work",
        "median s",
        "quartiles",
        "useful tokens/s",
        "of matmul ceiling",
        "of copy ceiling",
        "first call s",
    )

    def __init__(self, args: argparse.Namespace):
        from collab_jax.bench import measure, work

        self.args, self.measure, self.work = args, measure, work
        dtype = getattr(args, "dtype", "float32")
        self.ceilings = {
            "matmul_flop_s": measure.matmul_ceiling(dtype),
            "copy_bytes_s": measure.copy_ceiling(),
        }
        self.rows, self.figures, self.notes = [], {}, []

    def load(self, lengths: str):
        a = self.args
        if a.shape not in self.work.SHAPES:
            raise UserError(f"--shape={a.shape}: use one of {sorted(self.work.SHAPES)}")
        return self.work.Load(
            a.shape, lengths, a.prompts, a.group, a.prompt_length, a.max_new, a.dtype, a.micro_rows
        )

    def time(self, cases: dict, title: str) -> dict:
        """Times `cases`: a work.Case, or a function of a peer, by name. Adds their rows."""
        print(title, file=sys.stderr)
        runs = {name: getattr(case, "run", case) for name, case in cases.items()}
        timings = self.measure.interleaved(
            runs, self.args.repeats, lambda s: print(s, file=sys.stderr)
        )
        for name, timing in timings.items():
            figures = {
                "title": title,
                "name": name,
                **timing.summary(),
                "tokens_per_s": timing.rate,
            }
            case = cases[name]
            if hasattr(case, "flop"):
                figures["matmul_share"] = (
                    case.flop() / timing.seconds[-1] / self.ceilings["matmul_flop_s"]
                )
            if getattr(case, "bytes", None):
                figures["copy_share"] = (
                    case.bytes() / timing.seconds[-1] / self.ceilings["copy_bytes_s"]
                )
            share = lambda key: f"{figures[key]:.0%}" if key in figures else ""  # noqa: E731, B023
            low, high = figures["quartiles_s"]
            self.rows.append(
                (
                    f"{title}: {name}",
                    f"{timing.median:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    self.measure.number(timing.rate),
                    share("matmul_share"),
                    share("copy_share"),
                    f"{timing.first:.1f}",
                )
            )
            self.figures[f"{title}: {name}"] = figures
        return timings

    def compare(self, timings: dict, ours: str, theirs: str, title: str) -> None:
        r = self.measure.ratio(timings[ours], timings[theirs])
        self.figures[f"{title}: {ours} / {theirs}"] = r
        low, high = r["quartiles"]
        self.notes.append(
            f"{title}: {ours} is {r['median']:.2f} times {theirs} (quartiles {low:.2f} to {high:.2f})"
        )

    # ------------------------------------------------------------------------------------------- sub-commands

    def decode(self) -> None:
        from collab_jax.runtime import parallel

        for lengths in ("fixed", "long_tail"):
            load = self.load(lengths)
            cfg, params = self.work.make_model(load)
            params = parallel.replicate(params)
            cases = {
                "ours": self.work.decode(
                    load, cfg, params, self.args.segments, self.args.slot_counts
                ),
                "fixed batch": self.work.decode(load, cfg, params, 1, 1),
            }
            title = f"decode {load.shape} {lengths}"
            self.compare(self.time(cases, title), "ours", "fixed batch", title)

    def update(self) -> None:
        for lengths in ("fixed", "long_tail"):
            load = self.load(lengths)
            self.time(
                {"ours": self.work.update(load, *self.work.make_model(load), 4)},
                f"update {load.shape} {lengths}",
            )

    def step(self) -> None:
        training = make_training(self.args)
        self.time({"ours": training.case}, "step countdown_tiny")

    def peers(self) -> None:
        from collab_jax.bench import peers
        from collab_jax.runtime import parallel

        found = peers.versions()
        print(f"peers: {found}", file=sys.stderr)
        if missing := {"torch", "transformers", "trl"} - set(found):
            raise UserError(
                f"{', '.join(sorted(missing))} not installed: pip install -e '.[peers]'"
            )
        self.figures["peers"] = found
        a = self.args
        with tempfile.TemporaryDirectory() as scratch:
            for lengths in ("fixed", "long_tail"):
                load, folder = self.load(lengths), pathlib.Path(scratch) / lengths
                if not {"decode", "update"} & set(a.only):
                    break
                cfg, params = self.work.make_model(load)
                self.work.save(load, params, folder)
                prompts = self.work.make_prompts(load)
                if "decode" in a.only:
                    sizes = {"group": load.group, "max_new": load.max_new, "dtype": load.dtype}
                    cases = {
                        "ours": self.work.decode(
                            load, cfg, parallel.replicate(params), a.segments, a.slot_counts
                        ),
                        "transformers": peers.generate(
                            folder, *prompts, eos_ids=self.work.eos_ids(load), **sizes
                        ),
                    }
                    title = f"decode {load.shape} {lengths}"
                    self.compare(self.time(cases, title), "ours", "transformers", title)
                if "update" in a.only:
                    batch, tokens = (
                        self.work.update_batch(load),
                        self.work.response_lengths(load).sum(),
                    )
                    ones = batch.correct * 2.0 - 1
                    theirs = peers.update(
                        folder, *prompts, batch.tokens, batch.mask, ones.astype("float32"), micro_rows=load.micro_rows,
                        learning_rate=1e-6, dtype=load.dtype,
                    )  # fmt: skip
                    cases = {
                        "ours": self.work.update(load, cfg, params, 4),
                        "torch": _counted(theirs, tokens),
                    }
                    title = f"update {load.shape} {lengths}"
                    self.compare(self.time(cases, title), "ours", "torch", title)
        if "step" in a.only:
            self._against_trl(peers)

    def _against_trl(self, peers) -> None:
        ours, same = (
            make_training(self.args),
            make_training(self.args, {"algorithm.filter": "none"}),
        )
        c, run = ours.config, ours.run
        trl = peers.trl_step(
            run.folder, run.task.load("train")[:2048], text=run.text, task=run.task, config=c,
            prompts_per_step=c.prompts_per_step, group=c.group, max_new=c.max_new_tokens,
        )  # fmt: skip
        title = "step countdown_tiny"
        cases = {"ours": ours.case, "ours, no filter": same.case, "TRL": trl}
        timings = self.time(cases, title)
        trl.close()
        for name in ("ours", "ours, no filter"):
            self.compare(timings, name, "TRL", title)

    def settings(self) -> None:
        """Processes of this program, each with other settings, that take a step in turn."""
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
        command = [
            sys.executable,
            "-m",
            "collab_jax.bench",
            SERVE,
            "--prompts",
            str(self.args.prompts),
        ]
        children = {
            name: subprocess.Popen(
                [*command, "--group", str(self.args.group), "--cpu_devices", str(devices)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            )
            for name, (env, devices) in variants.items()
        }  # fmt: skip
        try:
            self.time(
                {name: _remote(child) for name, child in children.items()}, "step countdown_tiny"
            )
        finally:
            for child in children.values():
                child.stdin.close()
                child.wait()


def _counted(run: Callable, work: float) -> Callable[[], float]:
    def counted() -> float:
        run()
        return float(work)

    return counted


def _remote(child: subprocess.Popen) -> Callable[[], float]:
    def run() -> float:
        child.stdin.write("step\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    return run


def make_training(args: argparse.Namespace, overrides: dict | None = None):
    """work.Training of CONFIG in the command line's sizes."""
    from collab_jax.bench import work

    sizes = {"prompts_per_step": args.prompts, "group": args.group, "cpu_devices": args.cpu_devices}
    return work.full_step(str(CONFIG), sizes | (overrides or {}))


def serve_steps(args: argparse.Namespace) -> int:
    """One step for each line that comes in, its tokens a line that goes out."""
    training = make_training(args)
    for _ in sys.stdin:
        print(training.case.run(), flush=True)
    return 0


def main(argv: list[str]) -> int:
    """The command line."""
    if argv[:1] == ["cloud"]:
        from collab_jax.bench import cloud

        return cloud.run_cloud_bench(argv[1:])
    args = parse(argv)
    if args.command == REHEARSE:
        from collab_jax.bench import rehearse

        if args.steps < 1:
            raise UserError(f"--steps={args.steps} must be at least 1")
        config = rehearse.read_config(args.config, args.settings)
        process.set_up(config.cpu_devices)
        print(rehearse.rehearse(config, args.layers, args.steps))
        return 0
    process.set_up(args.cpu_devices)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # a first call is to show what compiling costs
    if args.prompts % jax.local_device_count():
        raise UserError(
            f"--prompts={args.prompts} must be a multiple of the {jax.local_device_count()} devices"
        )
    if args.command == SERVE:
        return serve_steps(args)
    bench = Bench(args)
    getattr(bench, args.command)()
    m, c = bench.measure, bench.ceilings
    machine = process.machine()
    print(
        " ".join(f"{k} {v}," for k, v in machine.items())
        + f" peak memory {m.peak_memory() / 2**30:.2f} GiB"
    )
    print(
        f"ceilings: matmul {m.number(c['matmul_flop_s'])}FLOP/s, copy {m.number(c['copy_bytes_s'])}B/s\n"
    )
    print(markdown.table(Bench.HEADER, bench.rows))
    print("\n".join(["", *bench.notes]))
    if args.json:
        report = {
            "argv": argv,
            "machine": machine,
            "ceilings": c,
            "peak_memory_bytes": m.peak_memory(),
            "figures": bench.figures,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
