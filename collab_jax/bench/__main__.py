"""Speed on this machine, in useful tokens: padding and rows that have ended do not count.

    python -m collab_jax.bench decode      sampling, beside the same loop with a fixed batch
    python -m collab_jax.bench update      one policy-gradient update
    python -m collab_jax.bench step        one full training step of configs/countdown_tiny.py, or
                                           of SmolLM2-135M (--shape smollm2-135m)
    python -m collab_jax.bench peers       all three beside transformers and TRL
                                           (pip install -e .[peers])
    python -m collab_jax.bench settings    the step with and without the settings of process.py
    python -m collab_jax.bench rehearse --config configs/countdown_qwen2p5_3b.py
                                        [--layers N] [--config.KEY=VALUE ...]
                                           some steps of a real run at its full shape, with random
                                           weights; on several hosts, each of them runs it, with
                                           --scratch and --hosts (docs/scale.md)
    python -m collab_jax.bench compile --config configs/countdown_qwen2p5_3b.py
                                       [--topology v5e:2x4] [--layers N] [--config.KEY=VALUE ...]
                                           a run's programs at their full shape: seconds to compile,
                                           size and memory, for TPU chips that need not be there or
                                           for the devices that are
    python -m collab_jax.bench cloud       the cloud's store and client against faults and kills
                                           (cloud.py)
    python -m collab_jax.bench serve       the server under load, beside transformers' and
                                           llama.cpp's, and against odd clients (serve.py)
    python -m collab_jax.bench gguf        the exported model in llama.cpp: what rounding does to
                                           responses, margins and calls (llamacpp.py)
    python -m collab_jax.bench code        verdicts on code a second, in the sandbox (code.py)

prints a table. Those that time something write every figure with --json FILE; programs that are
compared for speed run in turn, round by round.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import argparse
import json
import os
import pathlib
import signal
import sys

from collab_jax.runtime import cli, markdown
from collab_jax.runtime.errors import UserError

SERVE = "serve-steps"  # what `settings` starts, in timed.py
REHEARSE, COMPILE = "rehearse", "compile"  # those with a config


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments; `settings` has those that are for a config."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench", description="Speed on this machine."
    )
    timed = ("decode", "update", "step", "peers", "settings")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar=f"{{{','.join(timed)},{REHEARSE},{COMPILE},cloud,serve,gguf,code}}",
    )
    for name in (REHEARSE, COMPILE):
        p = commands.add_parser(name)
        p.add_argument(
            "--config",
            required=True,
            help="the experiment's file; --config.KEY=VALUE changes a setting",
        )
        p.add_argument("--layers", type=int, help="blocks, instead of all that the model has")
        if name == REHEARSE:
            p.add_argument("--steps", type=int, default=3)
            p.add_argument("--hosts", type=int, default=1, help="processes, one on each host")
            p.add_argument("--host", type=int, help="which of them this is, from 0")
            p.add_argument("--coordinator", help="ADDRESS:PORT of host 0")
            p.add_argument(
                "--scratch", type=pathlib.Path, help="folder for its files; hosts must share it"
            )
        else:
            p.add_argument("--topology", help="TPU chips to compile for, as v5e:2x4 or v5e:1x1")
    for name in (*timed, SERVE):
        p = commands.add_parser(name)
        p.add_argument("--repeats", type=int, default=7, help="timed rounds")
        p.add_argument(
            "--cpu_devices", type=int, default=2, help="host devices where there is no accelerator"
        )
        p.add_argument("--prompts", type=int, default=32)
        p.add_argument("--group", type=int, default=8, help="responses for each prompt")
        p.add_argument("--json", type=pathlib.Path, help="file for every figure")
        shapes = "tiny or smollm2-135m; of decode and update also 25m, qwen2.5-0.5b, qwen2.5-1.5b"
        if name != "settings":
            p.add_argument("--shape", default="tiny", help=shapes)
        if name in ("decode", "update", "peers"):
            p.add_argument("--prompt_length", type=int, default=16)
            p.add_argument("--max_new", type=int, default=56)
            p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
            p.add_argument("--micro_rows", type=int, default=16, help="rows of one backward pass")
            p.add_argument(
                "--lengths",
                nargs="+",
                default=["fixed", "long_tail"],
                choices=["fixed", "long_tail"],
                help="of responses: all at the limit, or nine in ten at a quarter of it",
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
            # Of the tiny shape 128 are its fastest by a little.
            p.add_argument(
                "--trl_rows", type=int, default=128, help="responses of TRL's backward passes"
            )
    args, settings = parser.parse_known_args(argv)
    if settings and args.command not in (REHEARSE, COMPILE):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    args.settings = settings
    return args


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if argv[:1] == ["cloud"]:
        from collab_jax.bench import cloud

        return cloud.run_cloud_bench(argv[1:])
    if argv[:1] == ["serve"]:
        from collab_jax.bench import serve

        # Its servers must not outlive it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        return serve.run_serve_bench(argv[1:])
    if argv[:1] == ["gguf"]:
        from collab_jax.bench import llamacpp

        return llamacpp.run_gguf_bench(argv[1:])
    if argv[:1] == ["code"]:
        from collab_jax.bench import code

        return code.run_code_bench(argv[1:])
    args = parse(argv)
    if args.command == REHEARSE:
        from collab_jax.bench import rehearse

        if args.steps < 1:
            raise UserError(f"--steps={args.steps} must be at least 1")
        config = rehearse.read_config(args.config, args.settings)
        process.set_up(config.cpu_devices)
        with cli.joined(args.hosts, args.host, args.coordinator):
            print(rehearse.rehearse(config, args.layers, args.steps, args.scratch))
        return 0
    if args.command == COMPILE:
        from collab_jax.bench import compile, rehearse

        config = rehearse.read_config(args.config, args.settings)
        print(compile.compile_programs(config, args.topology, args.layers))
        return 0
    process.set_up(args.cpu_devices)
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # A first call is to show what compiling costs.
        jax.config.update("jax_enable_compilation_cache", False)
    if args.prompts % jax.local_device_count():
        raise UserError(
            f"--prompts={args.prompts} must be a multiple of the {jax.local_device_count()} devices"
        )
    from collab_jax.bench import measure, timed  # only now: they use jax

    if args.command == SERVE:
        return timed.serve_steps(args)
    bench = timed.Bench(args)
    getattr(bench, args.command)()
    ceilings, machine = bench.ceilings, process.machine()
    print(
        " ".join(f"{k} {v}," for k, v in machine.items())
        + f" peak memory {measure.peak_memory() / 2**30:.2f} GiB"
    )
    print(
        f"ceilings: matmul {measure.number(ceilings['matmul_flop_s'])}FLOP/s, "
        f"copy {measure.number(ceilings['copy_bytes_s'])}B/s\n"
    )
    print(markdown.table(timed.HEADER, bench.rows))
    print("\n".join(["", *bench.notes]))
    if args.json:
        report = {
            "argv": argv,
            "machine": machine,
            "ceilings": ceilings,
            "peak_memory_bytes": measure.peak_memory(),
            "figures": bench.figures,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
