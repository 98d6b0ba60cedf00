"""The seal of an exported model: the digests of all its files, written last and checked by every command."""

from pathlib import Path

from maskmoe.checkpoint.integrity import MANIFEST_FILE, Manifest, check_content
from maskmoe.checkpoint.reading import CheckpointError


def seal_model(folder: Path) -> None:
    """Record all files of a model: weights, configuration, tokenizer, code, and what only Megatron needs."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    Manifest.of_files(folder, [name for name in names if name != MANIFEST_FILE]).save(folder)


def check_seal(folder: Path) -> None:
    """Compare a model with its seal; a model without a seal passes.

    Models that version 0.2.1 or older exported have a seal of their weights only.

    Raises:
        CheckpointError: The seal cannot be read, or a file is missing or was changed after the export.
    """
    try:
        check_content(folder)
    except CheckpointError as damage:
        hint = f"export the model again, or remove {MANIFEST_FILE} if the change is intended"
        raise CheckpointError(damage.checkpoint, f"{damage.fault}; {hint}") from damage
