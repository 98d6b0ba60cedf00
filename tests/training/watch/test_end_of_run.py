"""A run leaves its end in the journal and its page, whatever the end is."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
from support.report_pages import Page
from support.run_folders import write_checkpoint
from torch.distributed import HashStore

from maskmoe.errors import RunFailure, UserError
from maskmoe.files.run_folder import Kind, read_journal
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.run_status.status import read_status
from maskmoe.training.ranks import Ranks
from maskmoe.training.watch import end_of_run
from maskmoe.training.watch.end_of_run import EndOfRun, writing_page

ARGS = Namespace(save=None, train_iters=9, skip_train=False)


def rank_of(rank, world_size=3):
    return Ranks(HashStore(), rank, world_size)


# How a run ends, the ranks that record the end, and what they write.
ENDS = {
    "complete": (None, [2], 0, "the training is complete"),
    "exit interval": (SystemExit(0), [2], 0, "the run stopped on request"),
    "signal": (SystemExit(EXIT_REQUEUE), [2], EXIT_REQUEUE, "the run stopped on request"),
    "verdict": (SystemExit(65), [0, 2], 65, "the run ended with exit code 65"),
    "failure": (RunFailure("a disk\nis full"), [0, 2], 1, "the run failed: a disk is full"),
    "error without a text": (AssertionError(), [0, 2], 1, "the run failed: AssertionError"),
}


@pytest.mark.parametrize(("end", "writers", "code", "text"), ENDS.values(), ids=ENDS)
def test_end_is_in_the_journal(tmp_path, monkeypatch, end, writers, code, text):
    monkeypatch.setattr(end_of_run, "_TORCHRUN_DELAY", 0.0)
    for rank in range(3):
        EndOfRun(ARGS, tmp_path / str(rank), rank_of(rank)).on_end(end)
        expected = [(Kind.ENDED, text, code)] if rank in writers else []
        entries = read_journal(tmp_path / str(rank))
        assert all(entry.iteration == (None if end else 9) for entry in entries)
        assert [(entry.kind, entry.text, entry.facts["exit_code"]) for entry in entries] == expected


def test_stopped_run_names_its_newest_checkpoint(tmp_path):
    """Megatron saves no persistent checkpoint beside a non-persistent one."""
    local = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": None}
    args = Namespace(save=str(tmp_path), no_save_optim=False, **local)
    write_checkpoint(tmp_path, 20)
    assert end_of_run._describe_stop(args) == f"stopped: saved iteration 20 in {tmp_path}; the same command resumes"
    write_checkpoint(tmp_path / "non_persistent", 30)
    assert end_of_run._describe_stop(args).startswith(f"stopped: saved iteration 30 in {tmp_path}/non_persistent; the")


@pytest.mark.parametrize(
    ("args", "losses", "line"),
    [
        ({}, {}, "complete: 9 iterations, no iteration was left to train; no checkpoint was saved"),
        (
            {"skip_train": True, "train_iters": None},
            {"validation loss": 2.5},
            "complete: evaluated only, validation loss 2.5000; no checkpoint was saved",
        ),
    ],
)
def test_completed_run_says_what_it_did(monkeypatch, args, losses, line):
    monkeypatch.setattr(end_of_run.console, "losses", losses)
    assert end_of_run._describe_completion(Namespace(**vars(ARGS) | args)) == line


def end_run(folder, rank=0, error=None):
    with nullcontext() if error is None else pytest.raises(type(error)), writing_page(folder, rank_of(rank)):
        if error is not None:
            raise error


def test_page_is_written_after_any_end_but_a_refusal(tmp_path):
    (tmp_path / "args.yaml").write_text("# train_iters: 9\n")
    end_run(tmp_path, error=UserError("another run trains"))
    end_run(tmp_path, rank=1)
    end_run(None)
    assert not (tmp_path / "report.html").exists()
    end_run(tmp_path, error=RunFailure("a disk is full"))
    assert "train_iters" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize("is_slow", [True, False], ids=["slow", "failing"])
def test_page_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, is_slow):
    """The page takes too long, or its place is a folder."""
    page = tmp_path / "report.html"
    page.mkdir()
    if is_slow:
        monkeypatch.setattr(end_of_run, "_MOST_SECONDS_FOR_PAGE", 0.01)
    end_run(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: {page} is not written; `maskmoe status {page.parent} --html {page} --force` writes"
    )


@pytest.mark.runs("expert parallel 2, undisturbed")
def test_run_leaves_its_page_and_its_end(runs):
    """The last of two ranks logs the scalars and the end, and the first rank writes the page."""
    (run,) = runs
    (path,) = run.folder.rglob("*report.html*")
    page = Page(path)
    assert {"Loss in nats per token", "Load of the busiest expert by layer, from dark to bright"} <= set(page.titles)
    settings = dict(page.tables[1])
    assert settings["command"].startswith("torchrun --nnodes 1 --nproc-per-node ")
    assert {"parameters", "dispatch", "mask", "versions"} <= settings.keys()
    status = read_status(path.parent)
    assert [entry.kind for entry in status.history] == [Kind.STARTED, Kind.ENDED]
    assert status.history[-1].text == "the training is complete"


@pytest.mark.runs("reference")
def test_no_page_if_it_is_not_wanted(runs):
    (run,) = runs
    assert not [*run.folder.rglob("*report.html*")]
