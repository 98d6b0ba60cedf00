"""The stages that turn text into a dataset: their command lines and files."""

import itertools
from pathlib import Path

import pytest

from maskmoe.comparison.data import Dataset
from maskmoe.workflow.files import StageFiles


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
