"""Finding the models of a series, and refusing models that cannot be one."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from support.small_series import ITERATIONS, VOCAB_SIZE
from support.tiny_maskmoe import make_config, make_model, random_mask

from maskmoe.analysis.model_series import (
    ModelShape,
    ModelSource,
    common_shape,
    find_models,
    tokenizer_folder,
)
from maskmoe.analysis.routing_statistics import AnalysisSettings
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A model in transformers' format."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model(random_mask()).save_pretrained(folder)
    return folder


@pytest.fixture
def series(checkpoints, tmp_path) -> Path:
    """A copy of the checkpoints that a test may damage."""
    return Path(shutil.copytree(checkpoints, tmp_path / "series"))


def test_all_checkpoints_in_order(checkpoints):
    models = find_models([checkpoints])
    assert [model.iteration for model in models] == list(ITERATIONS)
    assert [model.name for model in models] == [f"iteration {iteration}" for iteration in ITERATIONS]
    assert all(model.is_megatron and model.path.parent == checkpoints for model in models)
    shape, max_seq_length = common_shape(models)
    assert shape == ModelShape(VOCAB_SIZE, layers=(1, 3), num_experts=4, topk=2)
    assert max_seq_length == 32


def test_chosen_checkpoints_and_other_formats(checkpoints, tiny_model):
    single = checkpoints / "iter_0000004"
    models = find_models([tiny_model, checkpoints, single], [6, 2])
    assert models == (
        ModelSource(tiny_model, str(tiny_model)),
        ModelSource(checkpoints / "iter_0000006", f"{checkpoints} iteration 6", 6, True),
        ModelSource(checkpoints / "iter_0000002", f"{checkpoints} iteration 2", 2, True),
        ModelSource(single, f"{checkpoints} iteration 4", 4, True),
    )


def test_an_unfinished_save_is_left_out(series):
    (series / "iter_0000008").mkdir()
    assert [model.iteration for model in find_models([series])] == list(ITERATIONS)


def test_damaged_checkpoints(series):
    next((series / "iter_0000004").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"iter_0000004 .* is missing; choose sound checkpoints with --ckpt-step"):
        find_models([series])
    assert len(find_models([series], [2, 6])) == 2


def test_paths_that_are_no_models(tmp_path, tiny_model, checkpoints):
    for path, steps, words in (
        (tmp_path, (), "neither Megatron checkpoints nor a model"),
        (tiny_model, (3,), "--ckpt-step chooses among the checkpoints of a folder"),
        (checkpoints, (3,), "iter_0000003 does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            find_models([path], steps)


def test_models_that_are_no_series(checkpoints, tiny_model, tmp_path):
    with pytest.raises(UserError, match="the models of a series must be alike"):
        common_shape(find_models([checkpoints, tiny_model], [2]))
    MaskMoEForCausalLM(make_config(num_experts=0)).save_pretrained(tmp_path)
    for fields, words in (
        (make_config(num_experts=0).to_dict(), "has no routed experts"),
        ({"model_type": "mixtral"}, "of type 'mixtral', not 'maskmoe'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match=words):
            common_shape(find_models([tmp_path]))


def test_tokenizers(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (model,) = find_models([checkpoints / "iter_0000002"])
    with pytest.raises(UserError, match=r"tokenizer\.model; name it by --tokenizer-type"):
        # The arguments in the checkpoint have a path relative to the folder of the run.
        tokenizer_folder(model, AnalysisSettings()).__enter__()
    tokenizer = str(checkpoints.parent / "tokenizer.model")
    with tokenizer_folder(model, AnalysisSettings(tokenizer_model=tokenizer)) as folder:
        assert (folder / "tokenizer.json").is_file()
        assert folder.parent == tmp_path
    with tokenizer_folder(model, AnalysisSettings(tokenizer_type="NullTokenizer")) as folder:
        assert not any(folder.iterdir())
    assert not any(tmp_path.iterdir())
