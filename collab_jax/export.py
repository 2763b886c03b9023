"""Export: the last checkpoint of a run as a Hugging Face folder, for transformers, vLLM and others,
or as one GGUF file, for llama.cpp, Ollama and LM Studio.

    python -m collab_jax.export --config FILE --workdir RUN --out FOLDER [--adapter]
    python -m collab_jax.export --config FILE --workdir RUN --gguf FILE [--gguf_type=q8_0]

A run with `config.lora` is merged into its model, or, with --adapter, written as an adapter that
PEFT and vLLM load. In an empty workdir the adapter that `config.lora.start` names is exported, as
one that is bundled. A model card (README.md of the folder, NAME.md beside NAME.gguf) says how to
call the model and, where the run has its report, what was measured.
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import pathlib

from absl import flags
from ml_collections import ConfigDict

from collab_jax.models import gguf_export, hf, lora
from collab_jax.models.decoder_config import Params
from collab_jax.reports import cards
from collab_jax.rl import experiment
from collab_jax.rl.experiment import Run
from collab_jax.routing import collab_config
from collab_jax.runtime import cli, files
from collab_jax.runtime.errors import UserError


def export_checkpoint(run: Run, out: pathlib.Path, *, adapter: bool) -> int:
    """Writes the run's last checkpoint to `out` and returns its step.

    adapter: the adapter alone, else the whole model. Where a run that starts from an adapter has no
    checkpoint, its start is written, as step 0. Raises UserError where there is nothing to export,
    or no adapter, or `out` cannot be written.
    """
    config = run.config
    step = last_step(run)
    if out.resolve() == run.workdir.resolve():
        raise UserError(f"--out={out} is the run's own folder, whose files it needs: give another")
    if adapter and not config.lora.rank:
        raise UserError(
            "--adapter: this run trained the whole model (config.lora.rank=0): "
            "export it without --adapter"
        )
    try:
        if adapter:
            state = experiment.load_state(run)
            name, _ = hf.split_revision(config.model.path)
            assert state.frozen is not None
            lora.save(
                out,
                state.final_params,
                run.cfg,
                state.frozen,
                config.lora,
                name=name,
                revision=hf.commit(run.folder),
            )
            hf.copy_tokenizer(run.folder, out)
        else:
            params = _whole_model(run)
            hf.save(out, params, hf.read_config(run.folder), config.model.param_dtype, run.folder)
        hf.save_generation_config(out, run.text.eos_ids, run.text.pad_id)
        if not step:
            _copy_calibration(lora.folder_of(config.lora.start), out)
        elif (out / collab_config.NAME).is_file():
            print(
                f"{out / collab_config.NAME} was there before: if the model is another now, "
                "calibrate again"
            )
        files.write_text(out / "README.md", cards.model_card(run, step, adapter=adapter))
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return step


def export_gguf(run: Run, file: pathlib.Path, kind: str) -> int:
    """Writes the run's last checkpoint, merged, to the GGUF file and returns its step.

    kind: of `gguf_export.TYPES`. Raises UserError as `export_checkpoint` does, and where llama.cpp
    could not run the model.
    """
    step = last_step(run)
    params = _whole_model(run)
    name = pathlib.Path(hf.split_revision(run.config.model.path)[0]).name.removesuffix(".gguf")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        gguf_export.write(
            file, params, run.cfg, hf.read_config(run.folder), run.text, kind=kind, name=name
        )
        calibration = file.parent
        if not step and not (calibration / collab_config.NAME).is_file():
            calibration = lora.folder_of(run.config.lora.start)
        card = cards.gguf_card(run, step, file.name, kind, calibration)
        files.write_text(file.with_suffix(".md"), card)
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({error.strerror or error}): choose another --gguf"
        ) from None
    return step


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Returns the run in `workdir`. Raises UserError where there is nothing to export.

    A workdir in which nothing was trained is left as it is: claimed, it would refuse the settings
    that were forgotten.
    """
    if not config.lora.start and not (workdir / experiment.CHECKPOINTS).is_dir():
        raise _untrained(workdir)
    run = experiment.prepare(config, workdir)
    last_step(run)
    return run


def last_step(run: Run) -> int:
    """Returns the step of the last checkpoint, 0 where the adapter to start from is exported."""
    step = run.checkpoints.latest() or 0
    if not step and not run.config.lora.start:
        raise _untrained(run.workdir)
    return step


def _untrained(workdir: pathlib.Path) -> UserError:
    return UserError(
        f"{workdir} holds no checkpoint: train first, with this --workdir and settings"
    )


def _whole_model(run: Run) -> Params:
    """Returns the parameters of the last checkpoint, with an adapter merged into its model."""
    params = experiment.load_state(run).final_params
    if not run.config.lora.rank:
        return params
    base = hf.load(run.folder, run.cfg, run.config.model.param_dtype)
    return lora.merge(base, params, run.cfg)


def _copy_calibration(adapter: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the biases of an adapter that is exported as it is, where it has them."""
    calibration = adapter / collab_config.NAME
    if calibration.is_file():
        files.write_text(out / collab_config.NAME, calibration.read_text())


def main(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path, adapter: bool) -> int:
    """Exports the run in `workdir` to the folder `out`: a model, or its adapter alone."""
    step = export_checkpoint(prepare(config, workdir), out, adapter=adapter)
    print(f"wrote step {step} to {out}")
    return 0


def main_gguf(config: ConfigDict, workdir: pathlib.Path, file: pathlib.Path, kind: str) -> int:
    """Exports the run in `workdir` to the GGUF file, its matrices in the type `kind`."""
    if file.suffix != ".gguf":
        raise UserError(f"--gguf={file} does not end in .gguf, by which programs know such a file")
    step = export_gguf(prepare(config, workdir), file, kind)
    print(f"wrote step {step} to {file}, and how to run it to {file.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    out = flags.DEFINE_string("out", None, "Folder to write; made if absent.")
    adapter = flags.DEFINE_bool(
        "adapter", False, "Write the adapter alone, as PEFT has it, instead of the merged model."
    )
    gguf = flags.DEFINE_string("gguf", None, "GGUF file to write, instead of a folder.")
    gguf_type = flags.DEFINE_enum(
        "gguf_type", "f16", [*gguf_export.TYPES], "Type of the matrices in the GGUF file."
    )

    def start(config: ConfigDict, workdir: pathlib.Path) -> int:
        if out.value is not None and gguf.value is None:
            return main(config, workdir, pathlib.Path(out.value).expanduser(), adapter.value)
        if gguf.value is None or out.value is not None:
            raise UserError("give either --out FOLDER or --gguf FILE")
        if adapter.value:
            raise UserError("--adapter: a GGUF file has the merged model: use --out FOLDER")
        return main_gguf(config, workdir, pathlib.Path(gguf.value).expanduser(), gguf_type.value)

    cli.run_with_config(start)
