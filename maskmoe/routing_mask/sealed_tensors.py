"""Write and read safetensors files with a JSON record and a digest of the whole content.

The file's metadata holds one key, `maskmoe`, with canonical JSON: `kind` (the kind of file), `version`, `record` and
`sha256`. The digest covers the record and the name, dtype, shape and bytes of every tensor. Reading therefore rejects a
file that was damaged or edited.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, TypedDict

import numpy as np
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import UnusableFile, check_regular, type_adapter

METADATA_KEY = "maskmoe"
VERSION = 1


class _Envelope(TypedDict):
    """The JSON value of the metadata."""

    kind: Annotated[str, Field(pattern="^[a-z ]+$")]
    version: int
    record: dict[str, Any]
    sha256: str


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_digest(tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of the canonical JSON of `record` and of all names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(_canonical_json(record).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor))
    return digest.hexdigest()


def seal(kind: str, tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the safetensors metadata for `tensors`: kind, version, record and digest."""
    # Use a single key: safetensors writes several keys in random order, but equal content must give equal files.
    envelope = {"kind": kind, "version": VERSION, "record": record, "sha256": content_digest(tensors, record)}
    return {METADATA_KEY: _canonical_json(envelope)}


class SealedTensors:
    """Base of dataclasses that are stored in a sealed file whose kind is named `KIND`.

    Fields of the type `np.ndarray` are tensors; all other fields together are the record. Pydantic converts the record
    to JSON values, and checks a record that is read. A subclass raises `UserError` if its fields do not fit together.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)
    KIND: ClassVar[str]

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the tensors, and the record."""
        values = type_adapter(type(self)).dump_python(self)
        tensors = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        return tensors, {name: value for name, value in values.items() if name not in tensors}

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of tensors and record."""
        return content_digest(*self.parts())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the content to a safetensors file atomically; raise `UserError` if the file cannot be written."""
        tensors, metadata = self.to_tensors()
        with atomic_output(path) as temporary:
            temporary.write_bytes(save(tensors, metadata))  # unlike `save_file`, this raises OSError on a full disk

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and verify a file written by `save`.

        Raises:
            UserError: The file is missing, unreadable, of another kind, damaged or altered.
        """
        with reading_tensors(path, f"{cls.KIND} file"), safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata(), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        return cls.from_tensors(tensors, metadata, str(path))

    def to_tensors(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return copies of the tensors, and metadata with record and digest, to embed both in another file."""
        tensors, record = self.parts()
        return {name: tensor.copy() for name, tensor in tensors.items()}, seal(self.KIND, tensors, record)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None, source: str = "embedded content"
    ) -> Self:
        """Return the verified value that `to_tensors` took apart; `source` names the file or checkpoint in errors.

        Raises:
            UserError: The content is of another kind or version, damaged or altered.
        """
        try:
            envelope = type_adapter(_Envelope).validate_json((metadata or {})[METADATA_KEY], strict=True)
            kind, record, digest = envelope["kind"], envelope["record"], envelope["sha256"]
            is_intact = content_digest(tensors, record) == digest
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source} is not a {cls.KIND} file of MaskMoE") from error
        if kind != cls.KIND:
            raise UserError(f"{source} is a {kind} file, expected a {cls.KIND} file")
        if envelope["version"] != VERSION:
            raise UserError(f"{source} has format version {envelope['version']}, but this MaskMoE reads {VERSION}")
        if not is_intact:
            raise UserError(f"{source} was altered or damaged: its content does not match its digest; build it again")
        try:
            value = type_adapter(cls).validate_python({**record, **tensors})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{source} lacks parts of a {cls.KIND}; build it again") from error
        # A record with missing, additional or converted values gives another digest.
        if value.digest != digest:
            raise UserError(f"{source} has other fields than a {cls.KIND}; build it again")
        return value


@contextmanager
def reading_tensors(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Check that a file of tensors is a regular file, and turn failures to read it into a `UserError`.

    Args:
        path: The file.
        kind: What the file holds, for the errors.
    """
    try:
        check_regular(path)
        yield
    except UnusableFile as error:
        raise UserError(f"{kind} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror or error}") from error
    except (AttributeError, EOFError, OverflowError, SafetensorError, TypeError, ValueError) as error:
        # NumPy does not know all dtypes of safetensors, and has limits for shapes.
        raise UserError(f"{kind} {path} is not a readable file of tensors: {error}; build it again") from error
