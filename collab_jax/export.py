"""Export: the last checkpoint of a run as a Hugging Face folder, for `transformers`, vLLM and the like.

python -m collab_jax.export --config configs/countdown_tiny.py --workdir RUN --out FOLDER
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from collab_jax import cli
from collab_jax import run as runs
from collab_jax.errors import UserError
from collab_jax.models import hf

_OUT = flags.DEFINE_string("out", None, "Folder to write; made if absent.")


def main(config: ConfigDict, workdir: pathlib.Path) -> int:
    """The command line."""
    run = runs.prepare(config, workdir)
    step = run.checkpoints.latest()
    if step is None:
        raise UserError(f"{workdir} holds no checkpoint: train first, with this --workdir and these settings")
    out = pathlib.Path(_OUT.value).expanduser()
    try:
        hf.save(out, runs.load_state(run).policy, hf.read_config(run.folder), config.model.param_dtype, run.folder)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    print(f"wrote step {step} to {out}")
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    cli.main(main)
