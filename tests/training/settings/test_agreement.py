"""Ranks that were started with other settings or files than the first rank end the run, on all nodes."""

import os
import shutil
import sys
import threading
from argparse import Namespace
from contextlib import ExitStack

import numpy as np
import pytest
from support.datasets import write_documents
from support.launchers import Launch
from support.runs import free_port
from support.training import Run

from maskmoe.errors import UserError
from maskmoe.training.settings.agreement import check_agreement


class Gather:
    """Lets threads exchange messages as ranks do."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._messages: dict[tuple[str, int], str] = {}
        self._ranks = ranks

    def as_rank(self, rank: int):
        def gather(key: str, message: str) -> list[str]:
            self._messages[key, rank] = message
            self._barrier.wait(60)
            return [self._messages[key, other] for other in range(self._ranks)]

        return gather


def disagreement(*of_ranks: Namespace) -> str | None:
    """Return the error that all ranks raise, None if all ranks agree."""
    gather, errors = Gather(len(of_ranks)), {}

    def run(rank: int) -> None:
        try:
            check_agreement(of_ranks[rank], gather.as_rank(rank))
            errors[rank] = None
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(of_ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(of_ranks)
    (error,) = {*errors.values()}
    return error


@pytest.fixture
def args(tmp_path) -> Namespace:
    for name in ("mask", "tokenizer.json"):
        (tmp_path / name).write_text(f"{name} of the first node")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_text("of the first node")
    write_documents(tmp_path / "data", [np.arange(9), np.arange(5)], np.uint16)
    return Namespace(
        **{"rank": 0, "lr": 0.1, "seed": 1, "moe_router_topk": 2, "expert_model_parallel_size": 1, "fp16": False},
        routing_mask=f"{tmp_path}/mask",
        tokenizer_model=f"{tmp_path}/tokenizer.json",
        data_path=["0.5", f"{tmp_path}/data", "0.5", "missing"],
        **dict.fromkeys(("train_data_path", "valid_data_path", "test_data_path", "data_args_path")),
        per_split_data_args_path=None,
        data_cache_path="/tmp/a",
    )


def changed(args: Namespace, **values: object) -> Namespace:
    return Namespace(**vars(args) | values)


def test_ranks_may_differ_in_their_numbers_and_their_places(args, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("mask", "data.bin", "data.idx"):
        shutil.copy(tmp_path / name, elsewhere)
    data = [*args.data_path[:1], f"{elsewhere}/data", *args.data_path[2:]]
    second = changed(args, rank=1, data_cache_path="/tmp/b", routing_mask=f"{elsewhere}/mask", data_path=data)
    assert disagreement(args, second, args) is None


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("lr", 0.2, "--lr is 0.1 on ranks 0, 2 (host {host}), but 0.2 on rank 1 (host {host})"),
        ("expert_model_parallel_size", 2, "--expert-model-parallel-size"),
        ("fp16", True, "--fp16"),
        ("routing_mask", "{path}/tokenizer.json", "the content of --routing-mask"),
        ("routing_mask", "{path}/missing", "but missing on rank 1"),
        ("tokenizer_model", "{path}/folder", "the content of --tokenizer-model"),
        ("data_path", ["0.4", "{path}/data", "0.5", "missing"], "the content of the datasets"),
        ("data_path", ["0.5", "{path}/other", "0.5", "missing"], "the content of the datasets"),
    ],
)
def test_difference_is_named_with_its_ranks(args, tmp_path, name, value, flag):
    write_documents(tmp_path / "other", [np.arange(9), np.arange(5)[::-1]], np.uint16)
    words = [word.format(path=tmp_path) for word in value] if isinstance(value, list) else value
    words = value.format(path=tmp_path) if isinstance(value, str) else words
    error = disagreement(args, changed(args, rank=1, **{name: words}), changed(args, rank=2))
    assert error is not None
    assert error.startswith("the ranks were not started alike: ")
    assert flag.format(host=os.uname().nodename) in error


def test_all_differences_are_named(args):
    error = disagreement(args, changed(args, lr=0.2, seed=7))
    assert "--lr" in error
    assert "--seed" in error


# ---- Real launchers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--lr 1e-3 --routing-mask starving.safetensors", ("--lr is 0.002", "the content of --routing-mask")),
        pytest.param("--global-batch-size 4", ("--global-batch-size is 8",), marks=pytest.mark.slow),
        pytest.param("--tensor-model-parallel-size 2", ("--tensor-model-parallel-size",), marks=pytest.mark.slow),
        pytest.param("--seed 7", ("--seed",), marks=pytest.mark.slow),
        pytest.param("--data-path ended", ("the content of the datasets",), marks=pytest.mark.slow),
    ],
)
def test_nodes_that_were_started_differently_end_with_one_line(workplace, tmp_path, flags, difference):
    (tmp_path / "model.yaml").write_text("log-interval: 1\n")
    endpoint = f"127.0.0.1:{free_port()}"
    with ExitStack() as launches:
        nodes = []
        for node in (0, 1):
            options = (
                f"--nodes 2 --node-rank {node} --nproc-per-node 1 --rendezvous {endpoint} --run-dir {tmp_path}/run"
            )
            model_flags = workplace.flags(Run(flags if node else ""), tmp_path)
            command = [sys.executable, "-m", "maskmoe", "pretrain", *options.split(), tmp_path / "model.yaml"]
            (tmp_path / str(node)).mkdir()
            launch = Launch([*command, *model_flags], workplace.folder, tmp_path / str(node) / "node", {})
            nodes.append(launches.enter_context(launch))
        assert [node.wait() for node in nodes] == [2, 2], "\n".join(node.output[-3000:] for node in nodes)
        for node in nodes:
            errors = [line for line in node.output.splitlines() if "error: " in line]
            assert len(errors) == 1, node.output
            assert "not started alike" in errors[0]
            for text in difference:
                assert text in errors[0]
            assert "on rank 0 " in errors[0]
            assert "on rank 1 " in errors[0]
