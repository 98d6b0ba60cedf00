"""Files, pipes, standard input and saved datasets are found and read; other names are refused by one line."""

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from maskmoe.command_line import preprocess_data, train_tokenizer
from maskmoe.data import corpus
from maskmoe.data.corpus import parse_block, progress_bar, read_blocks, read_documents
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.data.inputs import ReadingOptions, find_inputs, unescape
from maskmoe.errors import UserError

LINES = b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(50))
DOCUMENTS = [f"text {number}" for number in range(50)]


def documents(name: Path | str, *options: str | None) -> list[str]:
    blocks = read_blocks(find_inputs([name], ReadingOptions(*options)))
    return [text for block in blocks for text in parse_block(block, ["text"])[0]]


@pytest.fixture
def standard_input() -> Iterator[Callable[[bytes | Path | None], None]]:
    """A function that makes a pipe with some bytes, or a file, the standard input; None closes standard input."""
    saved = os.dup(0)
    writers = []

    def connect(content: bytes | Path | None) -> None:
        if content is None:
            os.close(0)
            return
        if isinstance(content, Path):
            source = os.open(content, os.O_RDONLY)
        else:
            source, target = os.pipe()
            pipe = os.fdopen(target, "wb", buffering=0)
            writers.append(threading.Thread(target=lambda: (pipe.write(content), pipe.close()), daemon=True))
            writers[-1].start()
        os.dup2(source, 0)
        os.close(source)

    yield connect
    os.dup2(saved, 0)
    os.close(saved)


# ---- Standard input and pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input(standard_input: Callable, name: str, compress: Callable[[bytes], bytes]) -> None:
    standard_input(compress(LINES))
    assert documents(name) == DOCUMENTS


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_from_a_file(standard_input: Callable, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(LINES)
    standard_input(tmp_path / "a")
    assert documents(name) == DOCUMENTS


def test_format_of_standard_input(standard_input: Callable) -> None:
    standard_input(b"plain text\n")
    with pytest.raises(UserError, match=r"^standard input \(read as jsonl, see --input-format\): line 1: invalid JSON"):
        documents("-")
    standard_input(b"plain text\n")
    assert documents("-", "text") == ["plain text\n"]
    standard_input(b"a<end>b")
    assert documents("-", "text", "<end>") == ["a", "b"]
    with pytest.raises(UserError, match="Parquet file cannot be read from a pipe"):
        documents("-", "parquet")
    standard_input(b"text")
    with pytest.raises(UserError, match="standard input is damaged or truncated, or no arrow file"):
        documents("-", "arrow")


def test_closed_standard_input(standard_input: Callable) -> None:
    standard_input(None)
    with pytest.raises(UserError, match="standard input cannot be read: Bad file descriptor"):
        documents("-")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("pipe", LINES, DOCUMENTS),
        ("a.jsonl", LINES, DOCUMENTS),
        ("a.txt", LINES, [LINES.decode()]),
        ("a.txt.gz", gzip.compress(LINES), [LINES.decode()]),
    ],
)
def test_named_pipe(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,), daemon=True)
    writer.start()
    assert documents(tmp_path / name) == expected
    writer.join()


def test_a_pipe_has_no_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("text")
    assert progress_bar(find_inputs([tmp_path / "pipe", tmp_path / "a.txt"]), "").total is None
    assert progress_bar(find_inputs([tmp_path / "a.txt"] * 2), "").total == 8


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for names in (["-", "/dev/stdin"], [tmp_path / "pipe", tmp_path / "link"]):
        with pytest.raises(UserError, match="named twice"):
            find_inputs(names)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/dev/urandom"])
def test_devices_without_end_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"input {name} is a device"):
        find_inputs([name])


def test_an_endless_device_as_standard_input_is_refused(standard_input: Callable) -> None:
    standard_input(Path("/dev/zero"))
    for name, place in (("-", "standard input"), ("/dev/stdin", "standard input"), ("/dev/fd/0", "/dev/fd/0")):
        with pytest.raises(UserError, match=f"input {place} is a device"):
            find_inputs([name])


def test_a_terminal_is_read() -> None:
    master, terminal = os.openpty()
    os.write(master, LINES.splitlines()[0] + b"\n\x04")
    assert documents(f"/dev/fd/{terminal}") == DOCUMENTS[:1]
    os.close(master)
    os.close(terminal)


def test_no_text_from_the_null_device() -> None:
    assert documents("/dev/null") == []


def test_commands_read_standard_input(
    standard_input: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    text = "".join(f"{number} words and more words\n<|end|>\n" for number in range(300))
    options = ["--input", "-", "--input-format", "text", "--document-separator", r"<|end|>\n"]
    standard_input(text.encode())
    prefix = str(tmp_path / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["x", *options, "--vocab-size", "300", "--output-prefix", prefix])
    train_tokenizer.main()
    standard_input(text.encode())
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"]
    monkeypatch.setattr(sys, "argv", ["x", *options, *model, "--workers", "1", "--output-prefix", str(tmp_path / "a")])
    preprocess_data.main()
    processor = SentencePieceProcessor(model_file=f"{prefix}.model")
    expected = [token for part in text.split("<|end|>\n") for token in processor.encode(part)]
    assert open_tokens(tmp_path / "a_text_document").tolist() == expected
    assert "300 documents" in capfd.readouterr().out


# ---- Formats and names -----------------------------------------------------------------------------------------------


def test_format_is_given_or_told_by_the_suffix(tmp_path: Path) -> None:
    for name in ("a", "a.txt", "a.NDJSON", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES))
        assert documents(tmp_path / name, "jsonl") == DOCUMENTS
        expected = DOCUMENTS if "json" in name.lower() else [LINES.decode()]
        assert documents(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.jsonl", (), r"missing\.jsonl does not exist"),
        ("x" * 5000, (), "cannot be read: File name too long"),
        ("a\0b", (), "cannot be read: .*embedded null"),
        (
            "folder",
            (),
            r"folder is a folder, not a file, and holds no saved dataset; name the files, .*folder/\*.jsonl",
        ),
        ("a.jsonl", (None, None, "train"), "--dataset-split is for saved datasets"),
        ("a.jsonl", (None, "x", None), "--document-separator divides plain text, but no input is plain text"),
        ("a.jsonl", ("parquet",), "is damaged or truncated, or no parquet file"),
    ],
)
def test_unusable_inputs(tmp_path: Path, name: str, options: tuple, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=message) as caught:
        documents(f"{tmp_path}/{name}", *options)
    assert "\n" not in str(caught.value)


# ---- Plain text with a separator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "aa", "é", "\0", "abab"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block_bytes=st.integers(1, 40), chunk_bytes=st.integers(1, 9))
def test_separators(tmp_path: Path, separator: str, data: st.DataObject, block_bytes: int, chunk_bytes: int) -> None:
    parts = st.one_of(st.just(separator), st.sampled_from([*separator, "\n", " ", "x", "日"]), st.text(max_size=3))
    text = "".join(data.draw(st.lists(parts, max_size=30)))
    path = tmp_path / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK_BYTES", block_bytes)
        patch.setattr(corpus, "_CHUNK_BYTES", chunk_bytes)
        path.write_bytes(text.encode())
        found = documents(path, None, separator)
    assert found == [part for part in text.removeprefix("\ufeff").split(separator) if part.strip()]


def test_a_document_between_separators_is_not_divided(tmp_path: Path) -> None:
    long = "line\n" * (corpus.DOCUMENT_BYTES // 2)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(f"a--{long}--b\n".encode(), 1))
    assert documents(tmp_path / "a.txt.gz", None, "--") == ["a", long, "b\n"]


def test_invalid_utf8_between_separators_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"one\n--two\n--th\xffree\n")
    with pytest.raises(UserError, match=r"a\.txt: line 3: invalid UTF-8 at byte 14 "):
        documents(tmp_path / "a.txt", None, "--")


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        (r"\n\n", "\n\n"),
        ("<|endoftext|>", "<|endoftext|>"),
        (r"\t\r\f\0\\n", "\t\r\f\0\\n"),
        (r"\x1e\u2029", "\x1e\u2029"),
        ("\n", "\n"),
    ],
)
def test_escapes(text: str, separator: str) -> None:
    assert unescape(text) == separator


@pytest.mark.parametrize("text", ["", r"\q", "a\\", r"\x1", r"\ud800", r"\N{DASH}", "\udcff"])
def test_bad_escapes(text: str) -> None:
    with pytest.raises(UserError, match=r"separator|escape"):
        unescape(text)


# ---- Saved datasets of Hugging Face ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets that `datasets` has saved, and a cache with one that it has prepared."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_dict({"text": DOCUMENTS, "id": range(50)})
    whole.save_to_disk(folder / "one")
    whole.shuffle(seed=0).save_to_disk(folder / "shuffled", num_shards=3)
    datasets.DatasetDict(train=whole.select(range(40)), test=whole.select(range(40, 50))).save_to_disk(folder / "dict")
    datasets.DatasetDict(train=whole).save_to_disk(folder / "single")
    source = folder / "MySource"
    source.mkdir()
    (source / "train.jsonl").write_bytes(LINES)
    (source / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
    datasets.load_dataset(str(source), cache_dir=str(folder / "cache"))
    datasets.disable_progress_bars()
    return folder


def test_saved_datasets_are_read_as_by_datasets(saved: Path) -> None:
    import datasets

    assert documents(saved / "one") == DOCUMENTS
    assert documents(saved / "shuffled") == datasets.load_from_disk(str(saved / "shuffled"))["text"][:]
    assert documents(saved / "shuffled") != DOCUMENTS
    assert documents(saved / "single") == DOCUMENTS
    for split in ("train", "test"):
        expected = datasets.load_from_disk(str(saved / "dict"))[split]["text"][:]
        assert documents(saved / "dict", None, None, split) == expected
        assert documents(saved / "dict" / split) == expected


def test_cached_datasets(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(saved / "cache"))
    for name in ("MySource", "my_source"):
        assert documents(name, None, None, "train") == DOCUMENTS
        assert documents(name, None, None, "test") == DOCUMENTS[:1]
    (info,) = (saved / "cache").glob("*/*/*/*/dataset_info.json")
    assert documents(info.parent, None, None, "train") == DOCUMENTS
    with pytest.raises(UserError, match=r"owner/MySource does not exist, and .*cache has no dataset of that name"):
        documents("owner/MySource", None, None, "train")


def test_cached_dataset_of_an_owner_in_two_forms(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (prepared,) = (saved / "cache").glob("*/*/*/*/dataset_info.json")
    for number in (1, 2):
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        folder = tmp_path / "home" / "datasets" / "owner___my_source" / f"configuration{number}" / "0.0.0" / "abc"
        folder.parent.mkdir(parents=True)
        folder.symlink_to(prepared.parent)
        folder.with_suffix(".incomplete").symlink_to(prepared.parent)
        if number == 1:
            assert documents("owner/MySource", None, None, "train") == DOCUMENTS
    with pytest.raises(UserError, match=r"cached in 2 forms; give one of the folders: .*configuration1/0\.0\.0/abc, "):
        documents("owner/MySource", None, None, "train")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("dict", None, "has the splits train, test; choose one with --dataset-split"),
        ("dict", "validation", "has no split 'validation'; its splits are train, test"),
        ("one", "train", "is a single split, not 'train'"),
    ],
)
def test_splits_are_chosen(saved: Path, name: str, split: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents(saved / name, None, None, split)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", '{"_data_files": [{"filename": "../../secret.arrow"}]}', "is not a list of file names"),
        ("state.json", '{"_data_files": [{"filename": ".."}]}', "is not a list of file names"),
        ("state.json", '{"_data_files": [{"filename": 5}]}', "is not a list of file names"),
        ("state.json", '{"_data_files": ["a.arrow"]}', "is not a list of file names"),
        ("state.json", "{}", "is not a list of file names"),
        ("state.json", '{"_data_files": [{"filename": "lost.arrow"}]}', "not complete: lost.arrow does not exist"),
        ("state.json", '{"_data_files": [], "_indices_data_files": [1]}', "has a list of selected rows"),
        ("state.json", "[", r"state\.json is damaged \(Invalid JSON: "),
        ("dataset_dict.json", '{"splits": ["/etc"]}', "is not a list of file names"),
        ("dataset_dict.json", '{"splits": "train"}', "is not a list of file names"),
        ("dataset_dict.json", '{"splits": ["train"]}', "state.json"),
        ("dataset_info.json", '{"splits": {"train": {}}}', "lacks files of the split 'train'"),
        ("dataset_info.json", "{}", "holds no saved dataset"),
    ],
)
def test_damaged_saved_datasets(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        documents(tmp_path)
    assert "\n" not in str(caught.value)


def test_incomplete_cache(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"splits": {"train": {}}}')
    for number in (0, 2):
        (tmp_path / f"x-train-0000{number}-of-00003.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="lacks files of the split 'train'"):
        documents(tmp_path)


def test_read_documents_takes_all_kinds(saved: Path) -> None:
    assert list(read_documents([saved / "one", saved / "MySource" / "train.jsonl"])) == DOCUMENTS * 2
