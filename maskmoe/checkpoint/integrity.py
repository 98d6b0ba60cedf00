"""Records the files of a `torch_dist` checkpoint with sizes and digests, and checks that a checkpoint is complete."""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from torch.distributed.checkpoint.metadata import Metadata

from maskmoe.checkpoint.unpickling import read_layout
from maskmoe.cli import atomic_output

LAYOUT_FILE = ".metadata"
_FORMAT = "torch_dist"


class Damage(Exception):  # noqa: N818 (the exception is a finding about a checkpoint, not a failure of the program)
    """A fault of a checkpoint.

    The text is a clause that follows the path of the checkpoint, such as "does not exist".
    """


class Unfinished(Damage):
    """The fault of a checkpoint whose saving was interrupted."""


@dataclass(frozen=True)
class FileRecord:
    """The digest and the size of a file when it was written.

    Attributes:
        sha256: the digest, hexadecimal.
        size: the size in bytes; None in a manifest that Megatron wrote.
    """

    sha256: str
    size: int | None

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file and return its record."""
        with open(path, "rb") as stream:
            return cls(hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell())


@dataclass(frozen=True)
class Manifest:
    """The records of the files of a checkpoint.

    Megatron writes `metadata.json` last, to mark a checkpoint as complete, so a manifest does not record this file. The
    format is that of Megatron's own manifest (`--verify-integrity`), with sizes added.

    Attributes:
        files: the records by the names of the files.
    """

    files: dict[str, FileRecord]

    def save(self, checkpoint: Path) -> None:
        """Write the manifest into the folder of a checkpoint, atomically."""
        content = {
            "algorithm": "sha256",
            "files": {name: record.sha256 for name, record in self.files.items()},
            "sizes": {name: record.size for name, record in self.files.items()},
        }
        with atomic_output(checkpoint / INTEGRITY_FNAME) as path:
            path.write_text(json.dumps(content, indent=2))

    @classmethod
    def load(cls, checkpoint: Path) -> "Manifest | None":
        """Read the manifest of a checkpoint; return None if the checkpoint was saved without one.

        Raises:
            Damage: the manifest cannot be read.
        """
        try:
            content = json.loads((checkpoint / INTEGRITY_FNAME).read_bytes())
            sizes = content.get("sizes", {})
            return cls({name: FileRecord(digest, sizes.get(name)) for name, digest in content["files"].items()})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise Damage(f"{INTEGRITY_FNAME} is damaged") from error


def record_rank(files: Sequence[Path], rank: int) -> None:
    """Record the files written by one rank, in a file beside them that `write_manifest` reads.

    A failure to read a file or to write the record is not reported here. `write_manifest` reports the missing record.

    Args:
        files: the files, all in the folder of the checkpoint.
        rank: the rank that wrote the files.
    """
    with contextlib.suppress(OSError), atomic_output(_rank_record(files[0].parent, rank)) as record:
        record.write_text(json.dumps({path.name: asdict(FileRecord.of(path)) for path in files}))


def write_manifest(checkpoint: Path) -> None:
    """Join the records of all ranks into the manifest of a checkpoint, and remove the records.

    Raises:
        Damage: a file that the checkpoint needs has no record.
    """
    layout_file = checkpoint / LAYOUT_FILE
    files = {LAYOUT_FILE: FileRecord.of(layout_file)}
    rank_records = sorted(checkpoint.glob(_rank_record(checkpoint, "*").name))
    for path in rank_records:
        files |= {name: FileRecord(**record) for name, record in json.loads(path.read_bytes()).items()}
    missing = _needed_sizes(_read_layout(checkpoint)).keys() - files.keys()
    if missing:
        raise Damage(f"{min(missing)} was not written completely, or not into a folder that all nodes share")
    Manifest(files).save(checkpoint)
    for path in rank_records:
        path.unlink()


def check_structure(checkpoint: Path) -> None:
    """Check that a checkpoint is complete and that its files have their full size, without reading the tensors.

    Raises:
        Damage: the first fault that is found.
    """
    if not checkpoint.is_dir():
        raise Damage("does not exist")
    try:
        config = maybe_load_config(str(checkpoint))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Damage("metadata.json is damaged") from error
    if config is None:
        raise Unfinished("was not finished: it has no metadata.json")
    if config.sharded_backend != _FORMAT:
        raise Damage(f"is of the format {config.sharded_backend!r}, not {_FORMAT}")
    manifest = Manifest.load(checkpoint)
    for name, record in manifest.files.items() if manifest else ():
        size = _size(checkpoint / name)
        if record.size is not None and size != record.size:
            raise Damage(f"{name} has {size} of {record.size} bytes")
    for name, needed in _needed_sizes(_read_layout(checkpoint)).items():
        size = _size(checkpoint / name)
        if size < needed:
            raise Damage(f"{name} has {size} of at least {needed} bytes")


def check_content(checkpoint: Path, part: slice = slice(None)) -> None:
    """Compare files of a checkpoint with their digests in the manifest.

    A checkpoint without a manifest passes.

    Args:
        checkpoint: a checkpoint that passes `check_structure`.
        part: which files to compare, in the order of their names; `slice(rank, None, ranks)` divides the files among
            ranks.

    Raises:
        Damage: the first file that differs from its digest.
    """
    manifest = Manifest.load(checkpoint)
    for name, record in sorted(manifest.files.items())[part] if manifest else ():
        try:
            found = FileRecord.of(checkpoint / name)
        except OSError as error:
            raise Damage(f"{name} cannot be read: {error.strerror}") from error
        if found.sha256 != record.sha256:
            raise Damage(f"{name} does not have the content that was saved")


def _rank_record(checkpoint: Path, rank: int | str) -> Path:
    """Return the file with the record of one rank."""
    return checkpoint / f"integrity.{rank}.json"


def _size(path: Path) -> int:
    """Return the size of a file in bytes. Raises Damage if the file is missing."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise Damage(f"{path.name} is missing") from error


def _read_layout(checkpoint: Path) -> Metadata:
    """Return the description of the tensors of a checkpoint. Raises Damage."""
    try:
        with open(checkpoint / LAYOUT_FILE, "rb") as stream:
            return read_layout(stream)
    except FileNotFoundError as error:
        raise Damage(f"{LAYOUT_FILE} is missing") from error
    except pickle.UnpicklingError as error:
        raise Damage(f"{LAYOUT_FILE} is damaged: {error}") from error
    # An unpickler raises exceptions of any class on damaged bytes.
    except Exception as error:
        raise Damage(f"{LAYOUT_FILE} is damaged") from error


def _needed_sizes(layout: Metadata) -> dict[str, int]:
    """Return the least size, in bytes, that each file needs for the tensors that the layout places in it."""
    needed: dict[str, int] = {}
    try:
        for entry in layout.storage_data.values():
            needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    except (AttributeError, TypeError) as error:
        raise Damage(f"{LAYOUT_FILE} is damaged") from error
    return needed
