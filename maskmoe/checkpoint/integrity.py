"""Records the files of a `torch_dist` checkpoint with sizes and digests, and checks that a checkpoint is complete.

A checkpoint may come from a stranger, so its layout is unpickled without running code from it. Only functions that read
the layout or the arguments import torch.
"""

import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel

from maskmoe.errors import UserError
from maskmoe.files.outputs import write_text
from maskmoe.files.untrusted import UnusableFile, check_name, open_regular, read_json_bytes, resolve_inside

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

LAYOUT_FILE = ".metadata"
# Megatron's names of the file that marks a checkpoint as complete, and of the manifest.
COMPLETION_FILE = "metadata.json"
MANIFEST_FILE = "integrity.json"
_LEGACY_FILE = "common.pt"
_FORMAT = "torch_dist"
# The only classes and functions that the layout of a checkpoint may name.
_LAYOUT_MODULES = {f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem")}
_CONSTRUCTORS = {
    "builtins.set",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
}


@dataclass(eq=False)
class Damage(UserError):  # noqa: N818 (the exception is a finding about a checkpoint)
    """A fault of a checkpoint: its folder, and a clause that follows the folder's path, such as "does not exist"."""

    checkpoint: Path
    fault: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.fault}"


class Unfinished(Damage):
    """The fault of a checkpoint whose saving was interrupted."""


class Unreadable(Damage):
    """The fault of a checkpoint that this user may not read; the checkpoint may be sound."""


def digest_and_size(path: Path) -> tuple[str, int]:
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
    def of(cls, records: Mapping[str, tuple[str, int]]) -> "Manifest":
        """Return the manifest with the digests and sizes of files by their names."""
        return cls(
            files={name: digest for name, (digest, _) in records.items()},
            sizes={name: size for name, (_, size) in records.items()},
        )

    @classmethod
    def of_files(cls, folder: Path, names: Sequence[str]) -> "Manifest":
        """Read files of a folder, several at a time, and return their manifest."""
        with ThreadPoolExecutor() as readers:
            records = readers.map(digest_and_size, (folder / name for name in names))
            return cls.of(dict(zip(names, records, strict=True)))

    def save(self, checkpoint: Path, name: str = MANIFEST_FILE) -> None:
        """Write the manifest into the folder of a checkpoint, atomically."""
        write_text(checkpoint / name, self.model_dump_json(indent=2))

    @classmethod
    def load(cls, checkpoint: Path) -> "Manifest":
        """Read a checkpoint's manifest; return an empty one if there is none; raise `Damage` if it is unreadable."""
        try:
            manifest = cls.model_validate_json(read_json_bytes(checkpoint / MANIFEST_FILE))
            for name in manifest.files:
                check_name(checkpoint / MANIFEST_FILE, name)
            return manifest
        except UnusableFile as error:
            if not os.path.lexists(checkpoint / MANIFEST_FILE):
                return cls(files={})
            raise Damage(checkpoint, f"{MANIFEST_FILE} {error.reason}") from error
        except ValueError as error:
            raise Damage(checkpoint, f"{MANIFEST_FILE} is damaged") from error


def record_rank(files: Sequence[Path], rank: int) -> None:
    """Record one rank's files, all in one folder, in a manifest there; `write_manifest` reports a missing record."""
    with contextlib.suppress(OSError, UserError):
        records = {path.name: digest_and_size(path) for path in files}
        Manifest.of(records).save(files[0].parent, f"integrity.{rank}.json")


def write_manifest(checkpoint: Path) -> None:
    """Join the manifests of all ranks and remove them; raise `Damage` if a needed file has no record."""
    manifest = Manifest.of({LAYOUT_FILE: digest_and_size(checkpoint / LAYOUT_FILE)})
    paths = sorted(checkpoint.glob("integrity.*.json"))
    for path in paths:
        of_rank = Manifest.model_validate_json(read_json_bytes(path))
        manifest.files |= of_rank.files
        manifest.sizes |= of_rank.sizes
    for name in sorted(_needed_sizes(checkpoint).keys() - manifest.files.keys()):
        raise Damage(checkpoint, f"{name} was not written completely, or not into a folder that all nodes share")
    manifest.iteration = iteration_of(checkpoint)
    manifest.save(checkpoint)
    for path in paths:
        path.unlink()


def check_structure(checkpoint: Path) -> None:
    """Raise `Damage` if a checkpoint is incomplete or a file is too short, without reading the tensors.

    If the manifest has the sizes of all files in the folder, the digest of the layout replaces reading the layout,
    which needs torch. A file that neither the manifest nor the folder has is missed only when it is loaded.
    """
    # Check the file that marks the checkpoint as complete.
    try:
        present = set(os.listdir(checkpoint))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damage(checkpoint, "does not exist") from error
    except PermissionError as error:
        raise Unreadable(checkpoint, f"cannot be listed: {error.strerror}; let this user read it") from error
    except OSError as error:
        raise Damage(checkpoint, f"cannot be listed: {error.strerror}") from error
    if COMPLETION_FILE not in present:
        raise Unfinished(checkpoint, f"was not finished: it has no {COMPLETION_FILE}")
    try:
        found = json.loads(read_json_bytes(checkpoint / COMPLETION_FILE))["sharded_backend"]
    except (UnusableFile, ValueError, TypeError, KeyError) as error:
        raise Damage(checkpoint, f"{COMPLETION_FILE} is damaged") from error
    if found != _FORMAT:
        raise Damage(checkpoint, f"is of the format {found!r}, not {_FORMAT}")
    # Check the sizes in the manifest, then the layout or the sizes in the layout.
    manifest = Manifest.load(checkpoint)
    for name in manifest.files:
        size = _size(checkpoint, name)
        if size != manifest.sizes.get(name, size):
            raise Damage(checkpoint, f"{name} has {size} of {manifest.sizes[name]} bytes")
    # Megatron reads this file of older versions wherever it lies.
    if manifest.files and _LEGACY_FILE not in manifest.files and os.path.lexists(checkpoint / _LEGACY_FILE):
        raise Damage(checkpoint, f"holds {_LEGACY_FILE}, which was not saved with it")
    if manifest.iteration not in (None, iteration_of(checkpoint)) and iteration_of(checkpoint) is not None:
        raise Damage(checkpoint, f"was saved as the checkpoint of iteration {manifest.iteration}")
    is_whole = present <= manifest.sizes.keys() | {COMPLETION_FILE, MANIFEST_FILE}
    if is_whole and LAYOUT_FILE in manifest.files and manifest.files.keys() == manifest.sizes.keys():
        _check_digest(checkpoint, LAYOUT_FILE, manifest.files[LAYOUT_FILE])
        return
    for name, needed in _needed_sizes(checkpoint).items():
        size = _size(checkpoint, name)
        if size < needed:
            raise Damage(checkpoint, f"{name} has {size} of at least {needed} bytes")


def check_content(checkpoint: Path, part: slice = slice(None)) -> None:
    """Raise `Damage` for the first file that differs from its digest; without a manifest, the checkpoint passes.

    Args:
        checkpoint: A checkpoint that passes `check_structure`.
        part: Which files to compare, in the order of their names; `slice(rank, None, ranks)` divides them among ranks.
    """
    for name, digest in sorted(Manifest.load(checkpoint).files.items())[part]:
        _check_digest(checkpoint, name, digest)


def _check_digest(checkpoint: Path, name: str, digest: str) -> None:
    """Compare one file with its digest. Raises Damage if the file differs."""
    try:
        found, _ = digest_and_size(resolve_inside(checkpoint, name))
    except UnusableFile as error:
        raise Damage(checkpoint, f"{name} {error.reason}") from error
    except OSError as error:
        raise Damage(checkpoint, f"{name} cannot be read: {error.strerror}") from error
    if found != digest:
        raise Damage(checkpoint, f"{name} does not have the content that was saved")


class _LayoutUnpickler(pickle.Unpickler):
    """Unpickles only the dataclasses and enumerations with which torch describes a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function by its name; raise `UnpicklingError` if it does not belong in a layout."""
        import torch

        module = module.removesuffix("._local")  # Python 3.13 pickles paths under `pathlib._local`, unknown to 3.12
        if f"{module}.{name}" in _CONSTRUCTORS:
            return super().find_class(module, name)
        if "." not in name:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if module in _LAYOUT_MODULES:
                found = super().find_class(module, name)
                if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                    return found
        raise pickle.UnpicklingError(f"refusing {module}.{name}, which does not belong in the layout of a checkpoint")


def read_layout(stream: BinaryIO) -> Any:
    """Read the `Metadata` in a `.metadata` file; raise `UnpicklingError` if the file holds anything else."""
    return _LayoutUnpickler(stream).load()


def read_checkpoint_layout(checkpoint: Path) -> "Metadata":
    """Read the description of the tensors of a checkpoint; raise `Damage` if it is missing or damaged."""
    try:
        with open_regular(checkpoint / LAYOUT_FILE) as stream:
            layout = read_layout(stream)
        for place in layout.storage_data.values():
            if (type(place.relative_path), type(place.offset), type(place.length)) != (str, int, int):
                raise pickle.UnpicklingError(f"{place} is not a place in a file")
        for name in {place.relative_path for place in layout.storage_data.values()}:
            check_name(checkpoint / LAYOUT_FILE, name)
        for entry in layout.state_dict_metadata.values():
            properties = getattr(entry, "properties", None)  # bytes have none
            if properties is not None and type(properties.dtype).__name__ != "dtype":
                raise pickle.UnpicklingError(f"{properties.dtype} is not a dtype")
        return layout
    except UnusableFile as error:
        missing = not os.path.lexists(checkpoint / LAYOUT_FILE)
        raise Damage(checkpoint, f"{LAYOUT_FILE} {'is missing' if missing else error.reason}") from error
    except pickle.UnpicklingError as error:
        raise Damage(checkpoint, f"{LAYOUT_FILE} is damaged: {error}") from error
    # An unpickler raises exceptions of any class on damaged bytes.
    except Exception as error:
        raise Damage(checkpoint, f"{LAYOUT_FILE} is damaged") from error


def read_common_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state that all ranks share, such as Megatron's arguments; raise `Damage` if it is missing or damaged."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):  # torch would warn that this is a single process
            return load_common_state_dict(checkpoint)
    # An unpickler raises exceptions of any class on damaged bytes.
    except (Exception, CheckpointException) as error:
        raise Damage(checkpoint, "holds no arguments of the run, or they are damaged or not just data") from error


def _size(checkpoint: Path, name: str) -> int:
    """Return the size of a file in bytes. Raises Damage if the file is missing or does not lie in the folder."""
    try:
        return resolve_inside(checkpoint, name).stat().st_size
    except UnusableFile as error:
        missing = not os.path.lexists(checkpoint / name)
        raise Damage(checkpoint, f"{name} {'is missing' if missing else error.reason}") from error


def _needed_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the least size, in bytes, that each file needs for the tensors that the layout places in it."""
    places = read_checkpoint_layout(checkpoint).storage_data.values()
    ends = sorted((place.offset + place.length, place.relative_path) for place in places)
    return {name: end for end, name in ends}  # the last tensor of a file comes last
