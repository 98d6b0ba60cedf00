"""A run leaves its end in the journal and its page, whatever the end is."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
from support.report_pages import Page
from torch.distributed import HashStore

from maskmoe.errors import RunFailure, UserError
from maskmoe.launch.journal import Kind, read_journal
from maskmoe.processes.interruption import EXIT_REQUEUE, EXIT_REWIND
from maskmoe.run_status.status import read_status
from maskmoe.training.loop.rank_store import RankStore
from maskmoe.training.watch import end_of_run
from maskmoe.training.watch.end_of_run import recording_end, writing_page


def rank_of(rank, world_size=3):
    return RankStore(HashStore(), rank, world_size)


# How a block ends, the ranks that record the end, and what they write.
ENDS = {
    "complete": (None, [2], 0, "the training is complete"),
    "exit interval": (SystemExit(0), [2], 0, "the run stopped on request"),
    "signal": (SystemExit(EXIT_REQUEUE), [2], EXIT_REQUEUE, "the run stopped on request"),
    "verdict": (SystemExit(65), [0, 2], 65, "the run ended with exit code 65"),
    "failure": (RunFailure("a disk\nis full"), [0, 2], 1, "the run failed: a disk is full"),
    "error without a text": (AssertionError(), [0, 2], 1, "the run failed: AssertionError"),
    "rewind": (SystemExit(EXIT_REWIND), [], None, None),
}


@pytest.mark.parametrize(("end", "writers", "code", "text"), ENDS.values(), ids=ENDS)
def test_end_is_in_the_journal(tmp_path, end, writers, code, text):
    for rank in range(3):
        expecting = nullcontext() if end is None else pytest.raises(type(end))
        with expecting, recording_end(tmp_path / str(rank), rank_of(rank)):
            if end is not None:
                raise end
        expected = [(Kind.ENDED, text, code)] if rank in writers else []
        entries = read_journal(tmp_path / str(rank))
        assert [(entry.kind, entry.text, entry.facts["exit_code"]) for entry in entries] == expected


@pytest.fixture
def args(tmp_path):
    return Namespace(save=str(tmp_path / "run" / "checkpoints"), tensorboard_dir=None, report=True)


def test_page_is_written_after_any_end_but_a_refusal(args, tmp_path):
    page = tmp_path / "run" / "report.html"
    with pytest.raises(UserError), writing_page(args, rank_of(0)):
        raise UserError("another run trains")
    assert not page.parent.exists()
    page.parent.mkdir()
    (page.parent / "args.yaml").write_text("# train_iters: 9\n")
    for rank, report in ((1, True), (0, False)):
        args.report = report
        with writing_page(args, rank_of(rank)):
            pass
        assert not page.exists()
    args.report = True
    with pytest.raises(RunFailure), writing_page(args, rank_of(0)):
        raise RunFailure("a disk is full")
    assert "train_iters" in Page(page).text


@pytest.mark.parametrize("is_slow", [True, False], ids=["slow", "failing"])
def test_page_that_cannot_be_written_is_one_line(args, tmp_path, monkeypatch, capsys, is_slow):
    """The page takes too long, or its place is a folder."""
    page = tmp_path / "run" / "report.html"
    page.mkdir(parents=True)
    if is_slow:
        monkeypatch.setattr(end_of_run, "_MOST_SECONDS_FOR_PAGE", 0.01)
    with writing_page(args, rank_of(0)):
        pass
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
    page.assert_self_contained()
    assert "The run is finished: all iterations are done." in " ".join(page.text.split())
    assert "21 of 21" in page.text
    assert {"Loss in nats per token", "Load of the busiest expert by layer, from dark to bright"} <= set(page.titles)
    settings = dict(page.tables[2])
    assert settings["command"].startswith("torchrun --nnodes 1 --nproc-per-node ")
    assert {"parameters", "dispatch", "mask", "versions"} <= settings.keys()
    status = read_status(path.parent)
    assert [entry.kind for entry in status.history] == [Kind.STARTED, Kind.ENDED]
    assert status.history[-1].text == "the training is complete"


@pytest.mark.runs("reference")
def test_no_page_if_it_is_not_wanted(runs):
    (run,) = runs
    assert not [*run.folder.rglob("*report.html*")]
