"""Serves a device model that decides when to ask the cloud, behind an OpenAI-compatible API.

    python -m collab_jax.serve --model FOLDER --config FILE [--host 127.0.0.1] [--port 8000]
        [--redact [--redact_names FILE]]

FOLDER is what `python -m collab_jax.export` wrote, with the collab_config.json of
`python -m collab_jax.calibrate` in it. The config says what a prompt may be and which cloud is
asked. Without both the embedded Countdown model answers, and a simulated cloud. The workdir keeps
the cloud's answers and the state of the budget. docs/serving.md is the manual.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import gc
import os
import pathlib
import socket
import threading

from absl import flags
from ml_collections import ConfigDict

from collab_jax.cloud import make_cloud
from collab_jax.models import blocks, hf
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.text import Text
from collab_jax.rl import experiment
from collab_jax.routing import collab_config
from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError
from collab_jax.serve.answer import Service
from collab_jax.serve.budget import Controller
from collab_jax.serve.engine import Engine, Limits
from collab_jax.serve.slots import SlotSettings
from collab_jax.serve.upstream import Upstream
from collab_jax.tasks import make_task

BUNDLED = "countdown-tiny"
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "countdown_tiny.py"  # the bundled model's
STATE = "budget.json"  # in the workdir
KEY_ENV = "COLLAB_OPERATOR_KEY"
DRAIN_SECONDS = 30  # beyond the cloud's deadline, for requests under way when the server is stopped


def make_service(config: ConfigDict, workdir: pathlib.Path) -> Service:
    """Returns the parts that answer with the model of `config.model.path`; its programs compile.

    Raises UserError with what to change.
    """
    _check(config)
    config = config.copy_and_resolve_references()
    config.lora.update(rank=0, start="")  # an export holds the whole model
    base = experiment.base_model(config, workdir)
    _advise(base.cfg)
    calibration = _calibration(base.folder, base.text)
    name, s = pathlib.Path(config.model.path).name, config.serve
    controller = Controller(workdir / STATE, name, calibration, _target(config, calibration))
    cloud = make_cloud(config, make_task(config), experiment.store_path(config, workdir))
    settings = SlotSettings(
        slots=s.slots,
        columns=config.prompt_length + config.max_new_tokens,
        chunk=min(config.serve.prefill_chunk, config.prompt_length + config.max_new_tokens),
        eos_ids=base.text.eos_ids,
        marker=base.text.decision,
        cache_dtype=config.decode.cache_dtype,
    )
    limits = Limits(s.queue, s.queue_tokens, s.prefill_chunk)
    params = hf.load(base.folder, base.cfg, config.model.dtype)
    return Service(
        engine=Engine(params, base.cfg, settings, limits),
        upstream=Upstream(cloud, s.deadline),
        controller=controller,
        text=base.text,
        model=name,
        system=config.task.system,
        prompt_length=config.prompt_length,
        limit=config.max_new_tokens,
        call_unanswered=calibration is None or calibration["call_unanswered"],
        keep_prompts=config.serve.keep_prompts,
    )


def _check(config: ConfigDict) -> None:
    """Raises UserError for settings of config.serve that cannot be."""
    s = config.serve
    if min(s.slots, s.prefill_chunk, s.queue, s.queue_tokens) < 1 or not s.deadline > 0:
        raise UserError(
            "config.serve: slots, prefill_chunk, queue and queue_tokens must be at least 1, and "
            "deadline above 0"
        )
    if config.text.decide_after_answer:
        raise UserError(
            "config.text.decide_after_answer is for experiments: what a server streams once the "
            "answer has opened is final. Set it to False, and calibrate on an evaluation that has "
            "it so"
        )


def _advise(cfg: DecoderConfig) -> None:
    """Says what would make a server faster."""
    if cfg.dtype == "bfloat16" and blocks.platform(cfg) == "cpu":
        # A few rows are too few for products in bf16: it widens the weights for each of them.
        print(
            "collab_jax: on a CPU, --config.model.dtype=float32 answers faster, and a single "
            "request several times as fast, for twice the memory"
        )


def _calibration(folder: pathlib.Path, text: Text) -> dict | None:
    """Returns the contents of the folder's collab_config.json, if it has one."""
    if not (folder / collab_config.NAME).is_file():
        print(
            f"collab_jax: {folder} has no {collab_config.NAME}: the budget starts from a bias of 0"
        )
        return None
    calibration = collab_config.read(folder)
    token = calibration["decision_token"]
    if token is not None and token != text.special.decision_token:
        raise UserError(
            f"{folder / collab_config.NAME} is for the decision token {token!r}, and the config "
            f"has {text.special.decision_token!r}: set config.text.decision_token"
        )
    return calibration


def _target(config: ConfigDict, calibration: dict | None) -> float:
    """Returns the share of queries to begin with: the calibrated one, or the config's budget."""
    return calibration["tracking"]["budget"] if calibration else config.budget


def spare_collections(engine: Engine) -> None:
    """Once all programs are compiled, leaves what is there by now out of garbage collections.

    It stays until the end, and one that looks at all of it holds every answer up.
    """
    engine.ready.wait()
    gc.freeze()


def serve(service: Service, listening: socket.socket, seconds: float) -> None:
    """Serves until a signal; requests under way then have `seconds` to end."""
    import uvicorn

    from collab_jax.serve.api import Api

    threading.Thread(target=spare_collections, args=(service.engine,), daemon=True).start()
    app = Api(service, os.environ.get(KEY_ENV, "")).app()
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nobody asks who a client is
        timeout_graceful_shutdown=int(seconds),
    )
    uvicorn.Server(settings).run(sockets=[listening])


def main(config: ConfigDict, workdir: pathlib.Path, host: str, port: int) -> int:
    """Serves `config.model.path` at an address; returns the exit status."""
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serving needs starlette and uvicorn: pip install -e '.[serve]'") from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror}): choose another --port or --host"
        ) from None
    workdir.mkdir(parents=True, exist_ok=True)
    with listening, files.held(workdir):  # its state is that of one server
        service = make_service(config, workdir)
        address = f"http://{host}:{listening.getsockname()[1]}"
        print(f"collab_jax: {service.model} and {service.upstream.model} at {address}")
        print(f"collab_jax: for the playground open {address} in a browser", flush=True)
        serve(service, listening, config.serve.deadline + DRAIN_SECONDS)
    return 0


if __name__ == "__main__":
    model = flags.DEFINE_string("model", None, "Folder of an export, or a bundled model's name.")
    host = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
    port = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: any that is free.")
    redact = flags.DEFINE_bool(
        "redact", False, "Personal data leave as placeholders: config.cloud.redact."
    )
    redact_names = flags.DEFINE_string(
        "redact_names", None, "With --redact, names too: config.cloud.redact_names."
    )

    def run(config: ConfigDict, workdir: pathlib.Path) -> int:
        if model.value is not None:
            if model.value != BUNDLED and not flags.FLAGS["config"].present:
                raise UserError("--model FOLDER needs --config, the file that it was trained with")
            config.model.path = model.value
        if redact.value:
            config.cloud.redact = True
        if redact_names.value is not None:
            config.cloud.redact_names = redact_names.value
        return main(config, workdir, host.value, port.value)

    cli.run_with_config(run, default_config=str(CONFIG), default_workdir="runs/serve")
