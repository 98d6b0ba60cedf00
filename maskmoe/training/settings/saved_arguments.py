"""Writes the arguments of a run to `args.yaml`, a model file that starts the same run."""

import os
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskmoe.files.flags import flags_to_yaml, split_flags
from maskmoe.files.run_folder import ARGUMENTS

_FOLDERS = frozenset(
    (
        *("save", "load", "tensorboard-dir", "wandb-save-dir", "data-cache-path"),
        *("non-persistent-global-ckpt-dir", "non-persistent-local-ckpt-dir"),
    )
)
"""The flags of the folders that a run writes; `--load` is usually the folder of `--save`."""


def save_arguments(args: Namespace, words: Sequence[str], folder: Path) -> None:
    """Write `args.yaml` into the run folder; see `arguments_text` for the arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{ARGUMENTS}.{uuid.uuid4().hex[:8]}.tmp"
    unfinished.write_text(arguments_text(args, words, folder), encoding="utf-8")
    unfinished.replace(folder / ARGUMENTS)


def arguments_text(args: Namespace, words: Sequence[str], folder: Path) -> str:
    """Return the text of `args.yaml`: the flags in the words of the command line, then all arguments as comments.

    Paths in the run folder are written with `${RUN_DIR}`, so that another run with this file has its own folders.
    Relative paths of folders that the run writes are made absolute first.
    """
    flags = dict(split_flags(words))
    flags |= {name: tuple(os.path.abspath(value) for value in flags[name]) for name in _FOLDERS & flags.keys()}
    flags = {name: tuple(_in_run_folder(_escape(value), folder) for value in values) for name, values in flags.items()}
    command = f"launch/pretrain.sh --run-dir DIR {ARGUMENTS}"
    values: Mapping[str, object] = vars(args)
    return "\n".join(
        (
            f"# The flags of a run, as a model file: `{command}` starts another run with the same flags.",
            f"# Relative paths are relative to {os.getcwd()}",
            flags_to_yaml(flags).rstrip("\n"),
            "",
            "# All arguments, with Megatron's defaults and the values that Megatron derives:",
            *(f"# {name}: {' '.join(str(values[name]).split())}" for name in sorted(values)),
            "",
        )
    )


def _escape(value: str) -> str:
    return value.replace("$", "$$")


def _in_run_folder(value: str, folder: Path) -> str:
    """Return a value in which the path of the run folder, if the value begins with it, is a variable."""
    for path in (folder.absolute(), os.path.abspath(folder)):  # with and without `..`
        start = _escape(str(path))
        if value == start or value.startswith(start + os.sep):
            return "${RUN_DIR}" + value.removeprefix(start)
    return value
