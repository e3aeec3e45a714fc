"""Checkpoints that are either finished or not there, one older one kept beside the newest."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from errors import InputError

NAME, PREVIOUS, EARLIER = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.earlier-run.pt"
FORMAT = 1
KEYS = {
    "format",
    "step",
    "architecture",
    "settings",
    "model",
    "optimizer",
    "scaler",
    "adversary",
    "rng",
    "history",
    "held_out",
}


def write_atomically(path: Path, content: bytes) -> None:
    """Whoever reads ``path`` sees the old or the new content, never a part, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(folder: Path, state: dict[str, Any], *, new_run: bool) -> Path:
    """Writes the newest checkpoint and keeps the one it replaces.

    Within a run that one becomes the previous checkpoint; the first save of a ``new_run`` keeps it under
    another name, so that forgetting --resume does not cost the earlier run its result.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    newest = folder / NAME
    if newest.exists():
        # A copy, not a rename: at no moment is there no newest checkpoint.
        write_atomically(folder / (EARLIER if new_run else PREVIOUS), newest.read_bytes())
    write_atomically(newest, buffer.getvalue())
    if new_run:
        (folder / PREVIOUS).unlink(missing_ok=True)
    return newest


def load(path: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint of the given architecture, to go on from it."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise InputError(f"--resume: there is no checkpoint {path}; leave out --resume to start a new run")
    state = read(path, option="--resume ")
    if state["architecture"] != architecture:
        raise InputError(
            f"{path} holds another network ({_spell(state['architecture'])}) than this run ({_spell(architecture)})"
        )
    return state


def read(path: Path, option: str = "") -> dict[str, Any]:
    """Reads a checkpoint, the newest one of a folder; `option` goes before the path of another one in messages."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; train.py writes one")
    hint = ""
    previous = path.with_name(PREVIOUS)
    if path.name == NAME and previous.is_file():
        hint = f"; the one before it is kept: {option}{previous}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises a different type for every way a file can be damaged.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged or not a checkpoint ({reason}){hint}") from error
    # Earlier versions had no discriminator.
    if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) | {"adversary"} != KEYS:
        raise InputError(f"{path} was not written by train.py{hint}")
    return {"adversary": None, **state}


def checkpoint_file(path: Path) -> Path:
    return path / NAME if path.is_dir() else path


def _spell(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
