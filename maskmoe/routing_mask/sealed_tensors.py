"""Write and read safetensors files with a JSON record and a digest of the whole content.

The file's metadata holds one key, `maskmoe`, with canonical JSON: `kind` (the kind of file), `version`, `record` and
`sha256`. The digest covers the record and the name, dtype, shape and bytes of every tensor. Reading therefore rejects a
file that was damaged or edited.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError

METADATA_KEY = "maskmoe"
VERSION = 1

_NUMPY_DTYPES = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64}


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


def unseal(
    kind: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None, source: str
) -> dict[str, Any]:
    """Return the record in `metadata` after checking kind, version and digest.

    Args:
        kind: The expected kind of file.
        tensors: All tensors of the file.
        metadata: The file's safetensors metadata.
        source: Name of the file for error messages.

    Raises:
        UserError: `metadata` is not valid or is of another kind or version, or the digest does not match `tensors`.
    """
    try:
        envelope = json.loads((metadata or {})[METADATA_KEY])
        found_kind, version, record, digest = (envelope[key] for key in ("kind", "version", "record", "sha256"))
        intact = isinstance(record, dict) and content_digest(tensors, record) == digest
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a {kind} file of MaskMoE") from error
    if not isinstance(found_kind, str) or not found_kind.isprintable() or not isinstance(version, int):
        raise UserError(f"{source} is not a {kind} file of MaskMoE")
    if found_kind != kind:
        raise UserError(f"{source} is a {found_kind} file, expected a {kind} file")
    if version != VERSION:
        raise UserError(f"{source} has format version {version}; this version of MaskMoE reads version {VERSION}")
    if not intact:
        raise UserError(f"{source} was altered or damaged: its content does not match its digest; build it again")
    return record


def save_sealed(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Write `tensors` and `record` to `path` atomically.

    Raises:
        UserError: `path` cannot be written.
    """
    with atomic_output(path) as temporary:
        save_file(dict(tensors), temporary, metadata=seal(kind, tensors, record))


def load_sealed(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read and verify a file written by `save_sealed`; return its tensors and its record.

    Raises:
        UserError: The file is missing, unreadable, of another kind, damaged or altered.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if any(file.get_slice(name).get_dtype() not in _NUMPY_DTYPES for name in names):
                raise UserError(f"{path} is not a {kind} file of MaskMoE: it holds tensors of an unexpected type")
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
    except OSError as error:
        raise UserError(f"cannot read {kind} file {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, OverflowError) as error:
        # NumPy raises ValueError and OverflowError for shapes beyond its own limits.
        raise UserError(f"{path} is not a readable safetensors file ({error}); build the {kind} again") from error
    return tensors, unseal(kind, tensors, metadata, str(path))
