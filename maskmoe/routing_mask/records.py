"""Checks the JSON records of routing masks and token counts, which anyone may have written."""

from collections.abc import Mapping
from typing import Any

from maskmoe.data.tokenizer import TokenizerRecord

_DATASET = {"name": str, "num_tokens": int, "idx_sha256": str, "bin_bytes": int}


def check_fields(record: Any, types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that a record is an object with these fields and no others, each of its type; a bool is no int.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(record, dict) or record.keys() != types.keys():
        raise TypeError(f"an object with other fields than {', '.join(types)}")
    for name, expected in types.items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        if type(record[name]) not in allowed:
            raise TypeError(f"{name} is of the type {type(record[name]).__name__}")


def read_datasets(records: Any) -> tuple[dict[str, Any], ...]:
    """The counted datasets, see `TokenFrequency`.

    Raises:
        TypeError, ValueError: a record is none of a dataset with at least one token.
    """
    if not isinstance(records, list):
        raise TypeError("datasets are not a list")
    for record in records:
        check_fields(record, _DATASET)
        if record["num_tokens"] < 1 or record["bin_bytes"] < 0:
            raise ValueError(f"a dataset with {record['num_tokens']} tokens in {record['bin_bytes']} bytes")
    return tuple(records)


def read_tokenizer(record: Any) -> dict[str, Any] | None:
    """The tokenizer of the datasets, None when unknown.

    Raises:
        TypeError: the record is none of a tokenizer.
    """
    return None if record is None else TokenizerRecord.from_json(record).to_json()
