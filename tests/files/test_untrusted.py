"""Files of strangers are read with bounds, from regular files inside their folder; only `UserError` may come out."""

import io
import json
import os
import re
import time
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from maskmoe.checkpoint.integrity import Manifest, check_content, check_structure
from maskmoe.comparison.suite import Suite
from maskmoe.conversion.model_files import SafetensorsSource
from maskmoe.conversion.settings import read_model_config
from maskmoe.data.indexed_dataset import read_tokenizer_record
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.untrusted import (
    MAX_YAML_BYTES,
    UnusableFile,
    check_model_folder,
    check_tokenizer,
    read_bounded,
    read_words,
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


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["a0: &a0 [x, x]", *levels]))
    start = time.monotonic()
    with pytest.raises(UserError, match="values once its anchors"):
        read_words(tmp_path / "bomb.yaml", "model file")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ['num-layers: "a\\0b"\n', '"a\\0b": 1\n', 'num-layers: "a\\ud800"\n'])
def test_yaml_with_a_null_character_or_half_of_a_pair_is_refused(tmp_path: Path, text: str) -> None:
    """No word of a command line may have one."""
    (tmp_path / "null.yaml").write_text(text)
    with pytest.raises(UserError, match="has a null character"):
        ModelFile.read(tmp_path / "null.yaml", {})


def test_yaml_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(UserError, match="has more than the"):
        ModelFile.read(tmp_path / "large.yaml", {})


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
    "checkpoint's tokenizer": check_tokenizer,
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


def replacement(pattern: object, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(text: str) -> str:
    """Return SentencePiece's map of characters with an empty trie and one text, in Base64."""
    return b64encode(bytes(4) + text.encode() + b"\0").decode()


def template(ids: list[int]) -> dict[str, object]:
    pieces = [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "a"}}]
    return {"type": "TemplateProcessing", "single": pieces, "special_tokens": {"a": {"id": "a", "ids": ids}}}


# The longest text of SentencePiece's own maps is that of U+FDFA, with 18 characters.
ALBERT = {
    "type": "Sequence",
    "normalizers": [
        replacement({"String": "``"}, '"'),
        {"type": "Precompiled", "precompiled_charsmap": charsmap(unicodedata.normalize("NFKC", "\ufdfa"))},
        replacement({"Regex": " {2,}"}, " "),
    ],
}


@pytest.mark.parametrize(
    ("parts", "is_refused"),
    [
        ({"normalizer": replacement({"String": " "}, "▁")}, False),
        ({"normalizer": replacement({"Regex": " +"}, " "), "decoder": replacement({"String": "▁"}, " ")}, False),
        ({"normalizer": replacement({"String": ""}, "a" * 200)}, True),
        ({"normalizer": replacement({"Regex": "x*"}, "a" * 200)}, True),
        ({"decoder": {"type": "Sequence", "decoders": [replacement({"String": "a"}, "aa")] * 40}}, True),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 200}}, True),
        ({"normalizer": {"type": "Prepend", "content": "a", "prepend": "a" * 200}}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 16}}, True),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 12}}, True),
        ({name: {"type": "ByteLevel"} for name in ("pre_tokenizer", "post_processor", "decoder")}, False),
        ({"normalizer": [{"String": " "}, "a" * 200]}, True),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 200)}}, True),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}] * 10_000}}, True),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}] * 200}}, True),
        ({"post_processor": template([0] * 100)}, True),
        ({"normalizer": ALBERT, "post_processor": template([0])}, False),
    ],
)
def test_tokenizer_that_makes_texts_longer(tmp_path: Path, parts: dict[str, Any], is_refused: bool) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a" * 1000: 0}}, **parts}))
    assert bool(re.search("times longer|has a list", error_of(lambda: check_model_folder(tmp_path)))) == is_refused


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc", "nmt_nfkc_cf"])
def test_sentencepiece_model_that_makes_texts_longer(tmp_path: Path, rule: str) -> None:
    content = io.BytesIO()
    options = {"vocab_size": 12, "normalization_rule_name": rule, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(["a b c"]), model_writer=content, **options)
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    check_model_folder(tmp_path)
    for part in ("normalizer_spec", "denormalizer_spec"):
        model = ModelProto.FromString(content.getvalue())
        getattr(model, part).precompiled_charsmap = b64decode(charsmap("a" * 200))
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        for read in (
            check_model_folder,
            lambda folder: load_tokenizer("SentencePieceTokenizer", folder / "tokenizer.model"),
        ):
            with pytest.raises(UserError, match="times longer"):
                read(tmp_path)
        (tmp_path / "marian").mkdir(exist_ok=True)
        (tmp_path / "tokenizer.model").rename(tmp_path / "marian" / "source.spm")
        with pytest.raises(UserError, match="times longer"):
            check_model_folder(tmp_path / "marian")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # of tiktoken
    check_model_folder(tmp_path)


def test_folder_of_a_model_has_regular_files(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "of_another.model").mkdir()
    check_model_folder(tmp_path)
    os.mkfifo(tmp_path / "additional_chat_templates" / "a.jinja")
    with pytest.raises(UnusableFile, match=r"a\.jinja is not a regular file"):
        check_model_folder(tmp_path)


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
