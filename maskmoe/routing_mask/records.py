"""Check the JSON records of routing masks and token counts, which may come from untrusted files."""

from collections.abc import Mapping
from typing import Any

from maskmoe.data.tokenizer import TokenizerRecord

_DATASET = {"name": str, "num_tokens": int, "idx_sha256": str, "bin_bytes": int}


def check_fields(record: Any, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that a record is an object with exactly these fields, each of its type; a bool does not pass as an int.

    Args:
        record: The value to check.
        types: Allowed type, or tuple of types, of each field.

    Raises:
        TypeError: The record is not an object, has other fields, or has a field of another type.
    """
    if not isinstance(record, dict) or record.keys() != types.keys():
        raise TypeError(f"not an object with exactly the fields {', '.join(types)}")
    for name, expected in types.items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if type(record[name]) not in allowed:
            raise TypeError(f"{name} has the type {type(record[name]).__name__}")


def read_datasets(records: Any) -> tuple[dict[str, Any], ...]:
    """Return the checked records of counted datasets, see `TokenFrequency.datasets`.

    Raises:
        TypeError: `records` is not a list of objects with the fields of a dataset.
        ValueError: A dataset has no tokens or a negative size.
    """
    if not isinstance(records, list):
        raise TypeError("datasets are not a list")
    for record in records:
        check_fields(record, _DATASET)
        if record["num_tokens"] < 1 or record["bin_bytes"] < 0:
            raise ValueError(f"a dataset with {record['num_tokens']} tokens in {record['bin_bytes']} bytes")
    return tuple(records)


def read_tokenizer(record: Any) -> dict[str, Any] | None:
    """Return the checked record of a tokenizer, or None if the record is None.

    Raises:
        TypeError: The record does not describe a tokenizer.
    """
    return None if record is None else TokenizerRecord.from_json(record).to_json()
