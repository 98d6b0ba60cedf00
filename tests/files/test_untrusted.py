"""Files of strangers are read with bounds, from regular files inside their folder; only `UserError` may come out."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maskmoe.checkpoint.integrity import Manifest, check_content, check_structure
from maskmoe.comparison.suite import Suite
from maskmoe.conversion.model_files import SafetensorsSource
from maskmoe.conversion.settings import read_model_config
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_record import read_tokenizer_record
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.untrusted import (
    UnusableFile,
    read_bounded,
    resolve_inside,
)
from maskmoe.launch.model_file import ModelFile
from maskmoe.routing_mask.expert_table import ExpertTable
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

SHA256 = "0" * 64
HUGE = "a number of many digits"
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
CONFIG = {"model_type": "maskmoe", "num_hidden_layers": 2, "routing_mask": {"num_tables": 1}, "vocab_size": 8}
MANIFEST = {"algorithm": "sha256", "files": {"a": SHA256}, "sizes": {"a": 3}}
RECORD = {"type": "NullTokenizer", "model": "m", "sha256": SHA256, "vocab_size": 8, "eod_id": None}


READERS: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "config.json": (CONFIG, lambda folder: read_model_config(folder / "config.json")),
    "integrity.json": (MANIFEST, lambda folder: check_content(folder)),
    "metadata.json": ({"sharded_backend": "torch_dist", "sharded_backend_version": 1}, check_structure),
    "model.safetensors.index.json": (INDEX, SafetensorsSource),
    "data.tokenizer.json": (RECORD, lambda folder: read_tokenizer_record(folder / "data")),
    "args.json": ({"num_layers": 2, "lr": 1e-3}, lambda folder: read_json(folder / "args.json")),
}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HUGE)
NAMES = st.text() | st.sampled_from(
    ["files", "sizes", "weight_map", "vocab_size", "../../dev/zero", "/etc/passwd", "a" * 5000]
)
VALUES = st.recursive(
    SCALARS | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def error_of(read: Callable[[], object]) -> str:
    """Return the text of the `UserError` that reading raises, empty without an error; let other exceptions pass."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def dump(value: object) -> bytes:
    """Write JSON, in which a number of 5,000 digits stands for every text `HUGE`."""
    return json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).encode()


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """Draw the content of a JSON file: a valid one with one changed part, truncated, or random values or bytes."""
    kind = draw(st.sampled_from(["changed", "truncated", "values", "bytes", "nested"]))
    if kind == "changed":
        value = dict(valid)
        value[draw(st.sampled_from([*valid, "new"]))] = draw(VALUES)
        return dump(value)
    if kind == "truncated":
        content = dump(valid)
        return content[: draw(st.integers(0, len(content)))]
    if kind == "values":
        return dump(draw(VALUES))
    if kind == "nested":
        depth = draw(st.sampled_from([10, 300, 100_000]))
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"files":', "}"), ("[[", "]")]))
        return (opening * depth + "0" + closing * draw(st.sampled_from([0, depth]))).encode()
    return draw(st.binary(max_size=60))


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_damaged_json_is_one_line_of_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    valid, read = READERS[name]
    (tmp_path / name).write_bytes(data.draw(documents(valid)))
    assert len(error_of(lambda: read(tmp_path)).splitlines()) <= 1


MODEL = "num-layers: 4\nlr: 1.0e-3\nlayouts: {4: {tensor-model-parallel-size: 2}}\n"
YAML_PIECES = st.sampled_from(
    [
        *("[", "]", "{", "}", "a", "a: ", ": ", "- ", "? ", "\n", "  ", "&x ", "*x", "<<: ", "|", '"', "\t", "#"),
        *("!!python/name:os.system ", "layouts: ", "${HOME}", "$", "---", "...", "%YAML 9\n", "name: x\n"),
        *("\x00", "\ud800", "1" * 5000, "\u2028"),
    ]
)


@given(pieces=st.lists(YAML_PIECES, max_size=12), base=st.sampled_from(["", MODEL]))
@example(pieces=["? [a, b]\n: c\n"], base="")
@example(pieces=["? {a: b}\n: c\n"], base=MODEL)
@example(pieces=["layouts: {[1]: {a: b}}\n"], base="")
@example(pieces=["layouts: [a]\n"], base="")
@example(pieces=["[" * 100_000], base="")
@example(pieces=["a: &a [*a]\n"], base="")
@example(pieces=["- " * 20_000 + "a"], base="")
@example(pieces=["variants: &a {b: *a}\n"], base="")
def test_damaged_yaml_is_one_line_of_error(tmp_path: Path, pieces: list[str], base: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes((base + "".join(pieces)).encode(errors="surrogatepass"))
    for read in (lambda: ModelFile.read(path, {}), lambda: Suite.read(path, {})):
        assert len(error_of(read).splitlines()) <= 1


READERS_OF_ONE_FILE: dict[str, Callable[[Path], object]] = {
    "JSON": read_json,
    "model configuration": read_model_config,
    "model file": lambda path: ModelFile.read(path, {}),
    "suite": lambda path: Suite.read(path, {}),
    "mask": RoutingMask.load,
    "token counts": TokenFrequency.load,
    "expert table": lambda path: ExpertTable.read(str(path), 2),
    "SentencePiece": lambda path: load_tokenizer("SentencePieceTokenizer", path),
    "tokenizer.json": lambda path: load_tokenizer("HuggingFaceTokenizer", path),
    "bytes": lambda path: read_bounded(path, 100),
}


@pytest.mark.parametrize("kind", READERS_OF_ONE_FILE)
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "loop", tmp_path / ("x" * 5000), tmp_path / "none"):
        with pytest.raises(UserError) as refusal:
            READERS_OF_ONE_FILE[kind](path)
        assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["../../dev/zero", "/etc/passwd", "..", "", "a/../b", "a\0b", "x" * 5000, "pipe", "outside", "sub"]
)
def test_names_that_lead_outside_a_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (tmp_path / "secret").write_text("secret")
    (folder / "outside").symlink_to("../secret")
    with pytest.raises(UnusableFile):
        resolve_inside(folder, name)
    # The same names in the files that name other files.
    manifest = {"algorithm": "sha256", "files": {name: SHA256}, "sizes": {}}
    (folder / "integrity.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        check_content(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(UserError):
        SafetensorsSource(folder)


def test_files_inside_a_folder(tmp_path: Path) -> None:
    # The layout of a cache of the Hugging Face Hub.
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("content")
    (snapshot / "file").symlink_to("../../blobs/123")
    (snapshot / "again").symlink_to("file")
    (snapshot / "megatron").mkdir()
    (snapshot / "megatron" / "file").symlink_to("../../../blobs/123")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        for name in ("file", "again", "./file"):
            assert resolve_inside(folder, name).read_text() == "content"
        for place, name in ((folder, "megatron/file"), (folder / "megatron", "file")):
            assert resolve_inside(place, name).read_text() == "content"
    assert Manifest.load(snapshot).files == {}
