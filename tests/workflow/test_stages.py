"""The command lines and files of the stages."""

import itertools
from pathlib import Path

import pytest

from maskmoe.launch.devices import Devices
from maskmoe.workflow import stages
from maskmoe.workflow.files import TextFiles, TrainingFiles

ON_GPUS = Devices(num_gpus=4, num_cores=8, has_transformer_engine=True)
WITHOUT_GPUS = Devices(num_gpus=0, num_cores=8, has_transformer_engine=False)


def flags_of(stage):
    return dict(itertools.pairwise(stage.command))


@pytest.mark.parametrize("text", [(), (Path("/text/a"), Path("/text/b"))])
def test_text_stages_take_the_outputs_of_earlier_stages(tmp_path, text):
    maker = stages.TextStages(TextFiles(tmp_path), text, 300, corpus_flags=("--max-bytes", "9"))
    made = [make_stage() for make_stage in maker.all]
    assert [stage.name for stage in made] == [*([] if text else ["corpus"]), "tokenizer", "dataset", "frequency"]
    available = set(text)
    for stage in made:
        assert set(stage.inputs) <= available
        available |= set(stage.outputs)
    if not text:
        assert flags_of(made[0])["--max-bytes"] == "9"


def test_documents_are_shuffled_by_a_seed_of_the_text(tmp_path):
    command = stages.TextStages(TextFiles(tmp_path), (), 300).dataset().command
    assert command[-2:] == ("--shuffle-seed", "0")


def test_key_of_the_text_names_the_dataset(tmp_path):
    made = stages.TextStages(TextFiles(tmp_path, "content"), (), 300).dataset()
    assert flags_of(made)["--json-keys"] == "content"
    assert made.outputs[0] == tmp_path / "dataset_content_document.bin"


@pytest.mark.parametrize(
    ("devices", "environment", "is_bf16"),
    [(ON_GPUS, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, True), (WITHOUT_GPUS, {"OMP_NUM_THREADS": "4"}, False)],
)
def test_evaluation_suits_the_devices(tmp_path, devices, environment, is_bf16):
    stage = stages.evaluate(TrainingFiles(tmp_path), 2, {"data-path": ("data",)}, (), devices)
    assert flags_of(stage)["--nproc-per-node"] == "2"
    assert stage.environment == environment
    assert ("--bf16" in stage.command) == is_bf16
    assert {"--bf16", "--num-workers", "--nproc-per-node"} <= stage.machine_flags


def test_prompt_may_begin_with_a_dash(tmp_path):
    command = stages.sample(TrainingFiles(tmp_path), "-- import", 8, 1).command
    assert "--prompt=-- import" in command
