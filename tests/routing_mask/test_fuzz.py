"""Reads files from untrusted sources: readers of routing masks and token counts return a value or raise `UserError`.

If a damaged file can be read, the value is the original. If a forged file with a correct digest can be read, the value
can be used and saved. tracemalloc tracks NumPy's memory, so a small file that claims a large size is detected.
"""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file
from support.datasets import frequency_of

from maskmoe.checkpoint.read_routing_mask import BUFFERS, buffers_of_routing_mask, routing_mask_from_buffers
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load, heaviest_shares, overloading_ids
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.routing_mask.sealed_tensors import seal

MASK, COUNTS = RoutingMask.KIND, TokenFrequency.KIND
TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "t.model", sha256="a" * 64, vocab_size=20, eod_id=None)

# A file of a few kilobytes needs one bit for each pair of N × N experts; NumPy unpacks each bit to a byte.
MOST_BYTES = 16 << 20

READERS: dict[str, Callable[[Path], Any]] = {MASK: RoutingMask.load, COUNTS: TokenFrequency.load}

# The fixtures do not depend on the example, so hypothesis may reuse them.


@pytest.fixture
def originals() -> dict[str, Any]:
    frequency = frequency_of(np.arange(20) + 1, TOKENIZER)
    return {MASK: build_routing_mask(MaskRecipe(10, 2, "balanced", 0.4, 3), frequency=frequency), COUNTS: frequency}


@pytest.fixture
def contents(originals, tmp_path) -> dict[str, bytes]:
    """The bytes of the originals' files."""
    for kind, original in originals.items():
        original.save(tmp_path / kind)
    return {kind: (tmp_path / kind).read_bytes() for kind in originals}


def read(kind: str, path: Path) -> Any:
    """Return what the reader returns, or None if it rejects the file with one line that names the file."""
    message = None
    tracemalloc.start()
    try:
        value = READERS[kind](path)
    except UserError as error:
        value, message = None, str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_BYTES
    if message is not None:
        assert path.name in message
        assert "\n" not in message
        message.encode()
    return value


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files in which a run of bytes or the length of the header was replaced."""
    position = st.integers(0, len(content)) | st.integers(0, 16) | st.integers(0, len(content)).map(lambda n: -n)
    replaced = st.builds(
        lambda first, length, new: content[:first] + new + content[first:][length:],
        position,
        st.integers(0, 40) | st.just(len(content)),
        st.binary(max_size=40) | st.sampled_from([b"0", b"9" * 30, b"-1", b"null", b"[", b"{", b'"', b"NaN", b"1e999"]),
    )
    relabelled = st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<Q", length) + content[8:])
    doubled = st.builds(lambda first, last: content[:last] + content[first:], position, position)
    return replaced | relabelled | doubled


@given(data=st.data(), kind=st.sampled_from(list(READERS)))
def test_damaged_files(data, kind, originals, contents, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data.draw(mutations(contents[kind])))
    value = read(kind, path)
    assert value is None or value.digest == originals[kind].digest


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**63, -(2**63), 10**400, 0.4, -0.1, 1e300, "", "balanced", "\n", "\ud800", "a" * 64])
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "sha256", "x"]), inner),
    max_leaves=5,
)
ARRAYS = npst.arrays(
    st.sampled_from([np.uint8, np.int16, np.int32, np.int64]),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=21),
)


def records_like(record: Any) -> st.SearchStrategy[Any]:
    """Return records in which values at any depth are replaced, are missing or have another type."""
    if isinstance(record, dict):
        same = st.fixed_dictionaries({key: records_like(value) for key, value in record.items()})
        lacking = st.sampled_from([*record, None]).flatmap(
            lambda missing: same.map(lambda values: {k: v for k, v in values.items() if k != missing})
        )
        more = st.builds(lambda values, extra: values | {"x": extra}, same, VALUES)
        return st.one_of(same, lacking, more, VALUES)
    if isinstance(record, list | tuple):
        return st.lists(st.one_of([records_like(value) for value in record] or [VALUES]), max_size=3) | VALUES
    return st.just(record) | st.just(record) | st.just(record) | VALUES


def use(value: Any) -> None:
    """Use masks and counts as the package does."""
    if isinstance(value, RoutingMask):
        occurrences = np.ones(value.vocab_size)
        assert value.min_visible >= 1
        assert value.visible_sets(value.num_layers - 1).any(axis=1).all()
        load = expected_expert_load(value, occurrences, topk=1)
        assert load.sum() == pytest.approx(occurrences.sum() * len(value.row_of_id))
        overloading_ids(value, *heaviest_shares(value, occurrences, topk=1))
        for dataset in value.provenance.datasets:
            assert isinstance(dataset["idx_sha256"], str)
            assert dataset["bin_bytes"] >= 0
        tokenizer = value.provenance.tokenizer
    else:
        assert np.isfinite(value.occurrences).all()
        assert value.occurrences.min() >= 0
        tokenizer = value.tokenizer
    if tokenizer is not None:
        assert type(tokenizer.vocab_size) is int
        assert all(isinstance(text, str) for text in (tokenizer.type, tokenizer.model, tokenizer.sha256))


@given(data=st.data(), kind=st.sampled_from(list(READERS)))
def test_forged_files(data, kind, originals, tmp_path):
    """The digest of these files is correct."""
    tensors, record = originals[kind].parts()
    record = data.draw(records_like(json.loads(json.dumps(record))))
    for name in tensors:
        if data.draw(st.integers(0, 3)) == 0:
            tensors[name] = data.draw(ARRAYS)
    if data.draw(st.integers(0, 9)) == 0:
        tensors.pop(next(iter(tensors)))
    path = tmp_path / "forged.safetensors"
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=seal(kind, tensors, record))
    value = read(kind, path)
    if value is not None:
        use(value)
        value.save(tmp_path / "again.safetensors")
        assert read(kind, tmp_path / "again.safetensors").digest == value.digest


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("changed", [None, torch.bfloat16, torch.float64, torch.bool], ids=str)
def test_checkpoints_whose_tensors_are_missing_or_have_other_types(name, changed, originals):
    buffers = buffers_of_routing_mask(originals[MASK])
    tensor = buffers.pop(name)
    if changed is not None:
        buffers[name] = tensor.to(changed)
    with pytest.raises(UserError, match="checkpoint") as refusal:
        routing_mask_from_buffers(buffers)
    assert "\n" not in str(refusal.value)
