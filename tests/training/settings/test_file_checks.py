"""The check of a run's datasets opens few files at a time, however many datasets there are."""

import math
from argparse import Namespace

import numpy as np
import pytest
from support.open_files import few_open_files

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.training.settings.file_checks import data_errors


@pytest.fixture
def args(tmp_path) -> Namespace:
    """The arguments of a run with 40 datasets of ten documents."""
    for number in range(40):
        with IndexedDatasetWriter(tmp_path / str(number), np.uint16) as writer:
            for _ in range(10):
                writer.add_document(np.arange(3))
    paths = dict.fromkeys(("train_data_path", "valid_data_path", "test_data_path"))
    files = {"data_args_path": None, "per_split_data_args_path": None, "mock_data": False}
    data_path = [str(tmp_path / str(number)) for number in range(40)]
    return Namespace(
        **paths, **files, data_path=data_path, split="9,1,0", skip_train=False, full_validation=False, eval_iters=1
    )


def test_few_files_are_open_at_a_time(args):
    with few_open_files():
        assert list(data_errors(args, None, 10, math.inf)) == []


def test_every_dataset_has_all_parts(args):
    args.split = "8,1,1"
    with IndexedDatasetWriter(args.data_path[-1], np.uint16) as writer:
        writer.add_document(np.arange(3))
    error, _ = data_errors(args, None, 10, math.inf)
    assert error.startswith(f"dataset {args.data_path[-1]}: --split 8,1,1 leaves the validation part no tokens")
