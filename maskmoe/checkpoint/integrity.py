"""Records the files of a `torch_dist` checkpoint with sizes and digests, and checks that a checkpoint is intact."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel

from maskmoe.checkpoint.reading import LAYOUT_FILE, CheckpointError, UnfinishedCheckpointError, read_checkpoint_layout
from maskmoe.errors import UserError
from maskmoe.files.outputs import write_text
from maskmoe.files.untrusted import UnusableFile, check_name, open_regular, read_json_bytes, resolve_inside

# Megatron's names of the file that marks a checkpoint as complete, and of the manifest.
COMPLETION_FILE = "metadata.json"
MANIFEST_FILE = "integrity.json"
_LEGACY_FILE = "common.pt"
_FORMAT = "torch_dist"


def _digest_and_size(path: Path) -> tuple[str, int]:
    """Return the SHA-256 digest, hexadecimal, and the size in bytes of a regular file; raise `UnusableFile` if none."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()


def iteration_of(checkpoint: Path) -> int | None:
    """Return the iteration in the name of a checkpoint's folder; None for a name without one, such as `release`."""
    number = checkpoint.name.removeprefix("iter_")
    return int(number) if number.isascii() and number.isdecimal() else None


class Manifest(BaseModel):
    """The digests and sizes of the files of a checkpoint: Megatron's format (`--verify-integrity`) with sizes added.

    Megatron writes `metadata.json` last, to mark a checkpoint as complete, so a manifest does not record this file.

    Attributes:
        files: The digests, hexadecimal, by the names of the files.
        sizes: The sizes in bytes by the names of the files; empty in a manifest that Megatron wrote.
        iteration: The iteration of the checkpoint; None if unknown.
    """

    algorithm: str = "sha256"
    files: dict[str, str]
    sizes: dict[str, int] = {}
    iteration: int | None = None

    @classmethod
    def of_files(cls, folder: Path, names: Sequence[str]) -> "Manifest":
        """Read files of a folder, several at a time, and return their manifest."""
        with ThreadPoolExecutor() as readers:
            records = dict(zip(names, readers.map(_digest_and_size, (folder / name for name in names)), strict=True))
        digests = {name: digest for name, (digest, _) in records.items()}
        return cls(files=digests, sizes={name: size for name, (_, size) in records.items()})

    def save(self, checkpoint: Path, name: str = MANIFEST_FILE) -> None:
        """Write the manifest into the folder of a checkpoint, atomically."""
        write_text(checkpoint / name, self.model_dump_json(indent=2))

    @classmethod
    def load(cls, checkpoint: Path) -> "Manifest":
        """Read a checkpoint's manifest, an empty one if there is none; raise `CheckpointError` if it is unreadable."""
        try:
            manifest = cls.model_validate_json(read_json_bytes(checkpoint / MANIFEST_FILE))
            for name in manifest.files:
                check_name(checkpoint / MANIFEST_FILE, name)
            return manifest
        except UnusableFile as error:
            if not os.path.lexists(checkpoint / MANIFEST_FILE):
                return cls(files={})
            raise CheckpointError(checkpoint, f"{MANIFEST_FILE} {error.reason}") from error
        except ValueError as error:
            raise CheckpointError(checkpoint, f"{MANIFEST_FILE} is damaged") from error


def record_rank(files: Sequence[Path], rank: int) -> None:
    """Record one rank's files, all in one folder, in a manifest there; `write_manifest` reports a missing record."""
    with contextlib.suppress(OSError, UserError):
        folder = files[0].parent
        Manifest.of_files(folder, [path.name for path in files]).save(folder, f"integrity.{rank}.json")


def write_manifest(checkpoint: Path) -> None:
    """Join the manifests of all ranks and remove them; raise `CheckpointError` if a needed file has no record."""
    manifest = Manifest.of_files(checkpoint, [LAYOUT_FILE])
    paths = sorted(checkpoint.glob("integrity.*.json"))
    for path in paths:
        of_rank = Manifest.model_validate_json(read_json_bytes(path))
        manifest.files |= of_rank.files
        manifest.sizes |= of_rank.sizes
    for name in sorted(_needed_sizes(checkpoint).keys() - manifest.files.keys()):
        fault = f"{name} was not written completely, or not into a folder that all nodes share"
        raise CheckpointError(checkpoint, fault)
    manifest.iteration = iteration_of(checkpoint)
    manifest.save(checkpoint)
    for path in paths:
        path.unlink()


def has_digests(checkpoint: Path) -> bool:
    """Return whether the content of a checkpoint can be verified; True also for a damaged manifest, to report it."""
    try:
        return bool(Manifest.load(checkpoint).files)
    except CheckpointError:
        return True


def check_structure(checkpoint: Path) -> None:
    """Raise `CheckpointError` if a checkpoint is incomplete or a file is too short, without reading the tensors.

    If the manifest has the sizes of all files in the folder, the digest of the layout replaces reading the layout,
    which needs torch. A file that neither the manifest nor the folder has is missed only when it is loaded.
    """
    present = _list_finished(checkpoint)
    manifest = Manifest.load(checkpoint)
    _check_manifest(checkpoint, manifest)
    is_whole = present <= manifest.sizes.keys() | {COMPLETION_FILE, MANIFEST_FILE}
    if is_whole and LAYOUT_FILE in manifest.files and manifest.files.keys() == manifest.sizes.keys():
        _check_digest(checkpoint, LAYOUT_FILE, manifest.files[LAYOUT_FILE])
        return
    for name, needed in _needed_sizes(checkpoint).items():
        size = _size(checkpoint, name)
        if size < needed:
            raise CheckpointError(checkpoint, f"{name} has {size} of at least {needed} bytes")
        if manifest.files and name not in manifest.files:
            raise CheckpointError(checkpoint, f"{MANIFEST_FILE} has no digest of {name}")


def check_content(checkpoint: Path, part: slice = slice(None)) -> None:
    """Raise `CheckpointError` for the first file that differs from its digest; without a manifest, nothing is compared.

    Args:
        checkpoint: A checkpoint that passes `check_structure`.
        part: Which files to compare, in the order of their names; `slice(rank, None, ranks)` divides them among ranks.
    """
    for name, digest in sorted(Manifest.load(checkpoint).files.items())[part]:
        _check_digest(checkpoint, name, digest)


def _list_finished(checkpoint: Path) -> set[str]:
    """Return the names in the folder of a checkpoint whose saving was finished. Raises CheckpointError."""
    try:
        present = set(os.listdir(checkpoint))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(checkpoint, "does not exist") from error
    except OSError as error:
        raise CheckpointError(checkpoint, f"cannot be listed: {error.strerror}") from error
    if COMPLETION_FILE not in present:
        raise UnfinishedCheckpointError(checkpoint, f"was not finished: it has no {COMPLETION_FILE}")
    try:
        found = json.loads(read_json_bytes(checkpoint / COMPLETION_FILE))["sharded_backend"]
    except (UnusableFile, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(checkpoint, f"{COMPLETION_FILE} is damaged") from error
    if found != _FORMAT:
        raise CheckpointError(checkpoint, f"is of the format {found!r}, not {_FORMAT}")
    return present


def _check_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Check the files and the iteration that the manifest records. Raises CheckpointError."""
    for name in manifest.files:
        size = _size(checkpoint, name)
        if size != manifest.sizes.get(name, size):
            raise CheckpointError(checkpoint, f"{name} has {size} of {manifest.sizes[name]} bytes")
    # Megatron reads this file of older versions wherever it lies.
    if manifest.files and _LEGACY_FILE not in manifest.files and os.path.lexists(checkpoint / _LEGACY_FILE):
        raise CheckpointError(checkpoint, f"holds {_LEGACY_FILE}, which was not saved with it")
    if manifest.iteration not in (None, iteration_of(checkpoint)) and iteration_of(checkpoint) is not None:
        raise CheckpointError(checkpoint, f"was saved as the checkpoint of iteration {manifest.iteration}")


def _check_digest(checkpoint: Path, name: str, digest: str) -> None:
    """Compare one file with its digest. Raises CheckpointError if the file differs."""
    try:
        found, _ = _digest_and_size(resolve_inside(checkpoint, name))
    except UnusableFile as error:
        raise CheckpointError(checkpoint, f"{name} {error.reason}") from error
    except OSError as error:
        raise CheckpointError(checkpoint, f"{name} cannot be read: {error.strerror}") from error
    if found != digest:
        raise CheckpointError(checkpoint, f"{name} does not have the content that was saved")


def _size(checkpoint: Path, name: str) -> int:
    """Return the size of a file in bytes. Raises CheckpointError if it is missing or does not lie in the folder."""
    try:
        return resolve_inside(checkpoint, name).stat().st_size
    except UnusableFile as error:
        missing = not os.path.lexists(checkpoint / name)
        raise CheckpointError(checkpoint, f"{name} {'is missing' if missing else error.reason}") from error


def _needed_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the least size, in bytes, that each file needs for the tensors that the layout places in it."""
    places = read_checkpoint_layout(checkpoint).storage_data.values()
    ends = sorted((place.offset + place.length, place.relative_path) for place in places)
    return {name: end for end, name in ends}  # the last tensor of a file comes last
