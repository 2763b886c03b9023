"""Functions of the user: `path/to/file.py:function`, a local file that is loaded once."""

import importlib.util
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

from collab_jax.runtime.errors import UserError


def load(spec: str, setting: str) -> Callable[..., Any]:
    """Returns the function that "file.py:function" names; `setting` is the key that holds it.

    Raises UserError, with file and line, where it cannot be had.
    """
    path, name = path_of(spec), spec.rpartition(":")[2]
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"{setting}={spec!r} must be path/to/file.py:function, and the file must be there"
        )
    module_spec = importlib.util.spec_from_file_location(f"function_{path.stem}", path)
    assert module_spec and module_spec.loader  # there is one for every .py file
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # anything that a file may do wrong
        raise UserError(
            f"{setting}: {path} does not load, {where(path, error)}: mend it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{setting}: {path} has no function {name!r}")
    return function


def path_of(spec: str) -> pathlib.Path:
    """Returns the file of "file.py:function"."""
    return pathlib.Path(spec.rpartition(":")[0]).expanduser()


def where(path: pathlib.Path, error: Exception) -> str:
    """'line 3: KeyError: 'x'', of the last line of this file that the exception came through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename) == path]
    cause = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"line {lines[-1]}: {cause}" if lines else cause
