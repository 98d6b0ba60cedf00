"""Is a `torch_dist` checkpoint whole? Its files are recorded, with size and digest, where they are written."""

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


class Damage(Exception):
    """What is wrong with a checkpoint, in a few words."""


class Unfinished(Damage):
    """Saving it was interrupted."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    sha256: str
    size: int | None
    """bytes; None in manifests that Megatron wrote"""

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file in whole and record it."""
        with open(path, "rb") as stream:
            return cls(hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell())


@dataclass(frozen=True)
class Manifest:
    """The record of a checkpoint's files, all but `metadata.json`, which is written last and marks it as complete.

    Stored in the form of Megatron's own manifest (`--verify-integrity`), with the sizes added.
    """

    files: dict[str, FileRecord]

    def save(self, checkpoint: Path) -> None:
        content = {
            "algorithm": "sha256",
            "files": {name: record.sha256 for name, record in self.files.items()},
            "sizes": {name: record.size for name, record in self.files.items()},
        }
        with atomic_output(checkpoint / INTEGRITY_FNAME) as path:
            path.write_text(json.dumps(content, indent=2))

    @classmethod
    def load(cls, checkpoint: Path) -> "Manifest | None":
        """The manifest of a checkpoint; None if it was saved without one.

        Raises:
            Damage: it cannot be read.
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
    """Leave a record of the files that one rank wrote beside them, for `write_manifest`.

    Says nothing where a file or the record cannot be written: that leaves no record, which `write_manifest` reports.
    """
    with contextlib.suppress(OSError), atomic_output(_rank_record(files[0].parent, rank)) as record:
        record.write_text(json.dumps({path.name: asdict(FileRecord.of(path)) for path in files}))


def write_manifest(checkpoint: Path) -> None:
    """Put the records of all ranks together.

    Raises:
        Damage: a rank left none.
    """
    layout_file = checkpoint / LAYOUT_FILE
    files = {LAYOUT_FILE: FileRecord.of(layout_file)}
    rank_records = sorted(checkpoint.glob(_rank_record(checkpoint, "*").name))
    for path in rank_records:
        files |= {name: FileRecord(**record) for name, record in json.loads(path.read_bytes()).items()}
    missing = _needed_sizes(_read_layout(checkpoint)).keys() - files.keys()
    if missing:
        raise Damage(f"{min(missing)} was not written in whole, or not into a folder that all nodes share")
    Manifest(files).save(checkpoint)
    for path in rank_records:
        path.unlink()


def check_structure(checkpoint: Path) -> None:
    """Check that a checkpoint is complete and its files are there in full length, without reading the bulk of it.

    Raises:
        Damage: the first thing that is wrong.
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
    """Compare files with their digests in the manifest; does nothing for a checkpoint without one.

    Args:
        checkpoint: passed `check_structure`.
        part: which of its files, in the order of their names; `slice(rank, None, ranks)` shares them out.

    Raises:
        Damage: the first file that differs.
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
    return checkpoint / f"integrity.{rank}.json"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise Damage(f"{path.name} is missing") from error


def _read_layout(checkpoint: Path) -> Metadata:
    try:
        with open(checkpoint / LAYOUT_FILE, "rb") as stream:
            return read_layout(stream)
    except FileNotFoundError as error:
        raise Damage(f"{LAYOUT_FILE} is missing") from error
    except pickle.UnpicklingError as error:
        raise Damage(f"{LAYOUT_FILE} is damaged: {error}") from error
    # Whatever an unpickler meets in damaged bytes.
    except Exception as error:
        raise Damage(f"{LAYOUT_FILE} is damaged") from error


def _needed_sizes(layout: Metadata) -> dict[str, int]:
    """How long each file must at least be to hold what the layout places in it."""
    needed: dict[str, int] = {}
    try:
        for place in layout.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    except (AttributeError, TypeError) as error:
        raise Damage(f"{LAYOUT_FILE} is damaged") from error
    return needed
