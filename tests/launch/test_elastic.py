"""How the launchers of an elastic run agree, with other programs than torchrun; and the parts of which they consist."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.launch import Launch
from support.system import wait_until

from maskmoe.errors import RunFailure, UserError
from maskmoe.files.run_folder import Kind, read_journal
from maskmoe.launch import elastic, elastic_files
from maskmoe.launch.elastic import ElasticRun, LayoutChooser
from maskmoe.launch.elastic_files import Generation, Generations, Member, Membership, leading_member
from maskmoe.launch.model_file import ModelFile
from maskmoe.launch.options import NodeRange, Options, parse_options
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.processes.lifetimes import Holder

PROGRAM = Path(__file__).parent / "elastic_node.py"
MODEL = """
save-interval: 10
layouts:
  1: {}
  2: {expert-model-parallel-size: 2}
  4: {expert-model-parallel-size: 4}
"""
MEMBERS = [Member(f"id{number}", Holder(f"host{number}", number, float(number)), "", 0, 1) for number in range(6)]


@contextmanager
def failing(folder: Path) -> Iterator[None]:
    """Replace a folder by a file during the block, so that reading the folder fails."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


# ---- Launchers -------------------------------------------------------------------------------------------------------


class Run:
    """A run whose launchers are started and stopped by a test."""

    def __init__(self, folder: Path, nodes: str) -> None:
        self.folder = folder / "run"
        self._nodes = nodes
        self._model = folder / "model.yaml"
        self._model.write_text(MODEL)
        self.launchers: list[Launch] = []

    def start(self, host: str, *options: str) -> Launch:
        """Start the launcher of a node."""
        command = [sys.executable, PROGRAM, host, "--nodes", self._nodes, "--run-dir", self.folder]
        command += ["--gpus-per-node", "1", "--node-timeout", "2", "--address", "localhost"]
        self.launchers.append(Launch([*command, *options, self._model], self.folder.parent, self.folder, {}))
        return self.launchers[-1]

    def start_two(self) -> tuple[Launch, Launch]:
        """Start the launchers of two nodes, of which the first leads, and wait until their ranks have begun."""
        first = self.start("a")
        first.wait_for_output("waiting for 1 to 2 nodes")
        second = self.start("b")
        self.wait_for_nodes(1, 2)
        return first, second

    def wait_for_nodes(self, generation: int, nodes: int) -> str:
        """Wait until all ranks of a generation have begun; return the flags of its layout."""
        files = [self.folder / f"began-{generation}-{rank}" for rank in range(nodes)]
        wait_until(
            lambda: all(file.exists() for file in files),
            f"generation {generation} on {nodes} nodes",
            timeout=60,
            report=lambda: "".join(launcher.output[-2000:] for launcher in self.launchers),
        )
        assert not (self.folder / f"began-{generation}-{nodes}").exists()
        return files[0].read_text()

    def say(self, word: str) -> None:
        """Make a file that the ranks obey."""
        (self.folder / word).touch()

    def finish(self, *launchers: Launch) -> None:
        """Let the ranks finish, and check that launchers exit with 0."""
        self.say("finish")
        assert [launcher.wait() for launcher in launchers] == [0] * len(launchers)


@pytest.fixture
def new_run(request, tmp_path) -> Callable[[str], Run]:
    """Return a function that makes a run; its launchers are killed at the end of the test."""

    def new_run(nodes: str) -> Run:
        run = Run(tmp_path, nodes)
        request.addfinalizer(lambda: [launcher.kill() for launcher in run.launchers])
        return run

    return new_run


def test_lost_and_returned_node(new_run):
    run = new_run("1:2")
    first, second = run.start_two()
    assert run.wait_for_nodes(1, 2) == "expert-model-parallel-size=2"
    second.kill()
    assert run.wait_for_nodes(2, 1) == ""
    assert "b left the run, or gave no sign of life for 2 s; the run continues without it" in first.output
    assert "training on 1 node (a), 1 rank" in first.output
    back = run.start("b")
    first.wait_for_output("b has come, and is taken in at the next checkpoint")
    assert not (run.folder / "began-3-0").exists()
    run.say("saved")
    assert run.wait_for_nodes(3, 2) == "expert-model-parallel-size=2"
    run.finish(first, back)
    kinds = [entry.kind for entry in read_journal(run.folder)]
    assert kinds.count(Kind.NODES) == 5
    assert kinds.count(Kind.LAUNCHED) == 3


def test_lost_leader(new_run):
    run = new_run("1:3")
    first = run.start("a")
    first.wait_for_output("waiting for 1 to 3 nodes")
    others = [run.start("b"), run.start("c")]
    # Three ranks have the layout of one rank, the largest that divides them.
    assert run.wait_for_nodes(1, 3) == ""
    first.kill()
    assert run.wait_for_nodes(2, 2) == "expert-model-parallel-size=2"
    run.finish(*others)


def test_nodes_that_have_waited_for_long_take_over(new_run):
    run = new_run("1:2")
    training = run.start_two()
    waiting = [run.start(host, "--rendezvous-timeout", "5") for host in "cd"]
    for launcher in waiting:
        launcher.wait_for_output("the run trains already")
    time.sleep(5)
    for launcher in training:
        launcher.kill()
    # They still wait for each other.
    assert run.wait_for_nodes(2, 2) == "expert-model-parallel-size=2"
    run.finish(*waiting)


def test_node_that_is_cut_off_is_left_out_and_taken_in_again(new_run):
    run = new_run("1:2")
    first, second = run.start_two()
    run.say("cut-b")
    run.wait_for_nodes(2, 1)
    run.say("saved")
    (run.folder / "cut-b").unlink()
    run.wait_for_nodes(3, 2)
    run.finish(first, second)


def test_stopped_node_leaves_and_the_others_continue(new_run):
    run = new_run("1:2")
    first, second = run.start_two()
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() == EXIT_REQUEUE
    run.wait_for_nodes(2, 1)
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.wait() == EXIT_REQUEUE
    assert not list((run.folder / "elastic" / "members").iterdir())


def test_ranks_that_go_back_are_started_again(new_run):
    """Torchrun may not start them again, so they end with the exit code that asks for a restart."""
    run = new_run("1:2")
    first, second = run.start_two()
    run.say("go-back-1")
    run.wait_for_nodes(2, 2)
    run.finish(first, second)


def test_failure_of_the_ranks_ends_the_run_everywhere(new_run):
    run = new_run("1:2")
    first, second = run.start_two()
    # Only the ranks of one node fail, and those of the other node wait for them.
    run.say("fail-0")
    assert (first.wait(), second.wait()) == (3, 3)
    # A later start is a new attempt.
    (run.folder / "fail-0").unlink()
    again = run.start("a"), run.start("b")
    run.wait_for_nodes(2, 2)
    run.finish(*again)


def test_ranks_that_fail_with_a_lost_node_continue_on_a_slow_file_system(new_run, monkeypatch):
    """The launcher learns late that the node is lost, after the ranks have failed."""
    monkeypatch.setenv("MOST_SECONDS", "0.15")
    run = new_run("1:2")
    first, second = run.start_two()
    second.kill()
    run.say("fail-0")
    first.wait_for_output("looking whether a node is lost")
    (run.folder / "fail-0").unlink()
    # If this machine is slow, too, the lost node still seems alive in the next generation.
    first.wait_for_output("training on 1 node (a), 1 rank")
    run.finish(first)


def test_too_few_nodes(new_run):
    launcher = new_run("2:3").start("a", "--rendezvous-timeout", "1")
    assert launcher.wait() == EXIT_REQUEUE
    assert "1 node of 2 to 3 came within 1 s; start the command on more nodes" in launcher.output


def test_file_system_that_fails_for_a_while_or_for_good(new_run):
    run = new_run("1:2")
    launcher = run.start("a", "--node-timeout", "5")
    launcher.wait_for_output("waiting for 1 to 2 nodes")
    with failing(run.folder / "elastic"):
        time.sleep(0.5)
    other = run.start("b")
    run.wait_for_nodes(1, 2)
    other.kill()
    with failing(run.folder / "elastic"):
        run.say("go-back-1")
        assert launcher.wait() == 1
    assert f"error: cannot use {run.folder}: Not a directory; the same command resumes the run" in launcher.output


def test_enough_nodes_start_at_the_latest_after_the_timeout(new_run):
    run = new_run("1:2")
    launcher = run.start("a", "--rendezvous-timeout", "1")
    run.wait_for_nodes(1, 1)
    run.finish(launcher)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("num-layers: 2", "needs --save-interval"),
        ("save-interval: 10\nexit-duration-in-mins: 5", "excludes --exit-duration-in-mins"),
    ],
)
def test_run_that_could_not_continue_or_end_is_refused(tmp_path, flags, error):
    run = Run(tmp_path, "1:2")
    (tmp_path / "model.yaml").write_text(flags)
    with run.start("a") as launcher:
        assert launcher.wait() == 2
    assert f"error: --nodes 1:2 {error}" in launcher.output
    assert not run.folder.exists()


# ---- Parts -----------------------------------------------------------------------------------------------------------


def test_launcher_is_not_gone_while_the_folder_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(elastic_files, "_BEAT_SECONDS", 1e6)  # the test looks instead of the threads
    folder = tmp_path / "members"
    with Membership(folder, "localhost", 1, 60) as here, Membership(folder, "localhost", 1, 60) as other:
        here.beat()
        with failing(folder), pytest.raises(NotADirectoryError):
            here.beat()
        assert not here.is_gone(other.me)
        with monkeypatch.context() as context:
            context.setattr(os, "listdir", lambda _: [])  # a cache of a network file system is behind
            here.beat()
        assert not here.is_gone(other.me)
        other.__exit__()
        here.beat()
        assert here.is_gone(other.me)


@pytest.mark.parametrize("stalls", [False, True], ids=["full", "stalled"])
def test_launcher_is_not_gone_because_no_launcher_can_write(tmp_path, monkeypatch, stalls):
    """A launcher that is silent while this one can write is gone after the timeout."""
    monkeypatch.setattr(elastic_files, "_BEAT_SECONDS", 1e6)  # the test beats instead of the threads
    clock = [0.0]
    monkeypatch.setattr(elastic_files.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(elastic_files, "connection_error", lambda *_: None)

    def fail(*_: object) -> None:
        clock[0] += 60 * stalls
        raise OSError(errno.ENOSPC, "No space left on device")

    with Membership(tmp_path, "localhost", 1, 30) as here, Membership(tmp_path, "localhost", 1, 30) as other:
        here.beat()
        here.follow(here.me)
        with monkeypatch.context() as context:
            context.setattr(Path, "write_bytes", fail)
            for _ in range(60):
                clock[0] += 2
                with pytest.raises(OSError, match="No space"):
                    here.beat()
                assert not here.is_gone(other.me)
                assert not here.is_cut_off(other.me)
        silent = 0
        while not here.is_gone(other.me):
            clock[0] += 2
            silent += 2
            here.beat()
        assert 24 <= silent <= 32


def test_launcher_of_another_host_with_the_name_of_this_host_is_not_gone(tmp_path):
    """Its process id belongs to no process of this host."""
    with Membership(tmp_path, "localhost", 1, 60) as here:
        ended = replace(here.me, id="ended", process=replace(here.me.process, started=1.0))
        other = replace(ended, id="other", process=replace(ended.process, pid_namespace="another machine"))
        for member in (ended, other):
            content = {"beat": 1, "reaches": "", "member": asdict(member)}
            (tmp_path / f"{member.id}.json").write_text(json.dumps(content))
        here.beat()
        assert here.is_gone(ended)
        assert not here.is_gone(other)


@pytest.mark.parametrize("before", ["none", "lost", "ended"])
def test_generation_that_another_launcher_writes_during_the_check_stays(tmp_path, monkeypatch, before):
    model = tmp_path / "model.yaml"
    model.write_text("save-interval: 10")
    options = parse_options("pretrain", ["--nodes", "1:2", "--run-dir", str(tmp_path), str(model)], {})
    launcher = ElasticRun(options, ModelFile.read(model, {}), 1)
    generations = Generations(tmp_path / "elastic")
    winner = Generation(1 if before == "none" else 2, (MEMBERS[1],), 7, {})

    def check(*_, **__):
        assert generations.write(winner)
        return 0

    monkeypatch.setattr(elastic, "check", check)
    with launcher._nodes:
        if before != "none":
            generations.write(Generation(1, (MEMBERS[0],), 7, {}))
        if before == "ended":
            generations.end(1, 0)
        running = launcher._running()
        assert (running is None) == (before != "lost")
        assert launcher._propose(running, may_start=True) is None
        assert generations.newest() == winner
        # The next attempt sees the other launcher's generation.
        after = launcher._propose(launcher._running(), may_start=True)
        assert (after.number, after.members) == (winner.number + 1, (launcher._nodes.me,))


def test_signal_that_also_ends_the_check_of_a_layout_stops_the_launcher(tmp_path, monkeypatch):
    """Ctrl-C reaches the whole process group."""
    model = tmp_path / "model.yaml"
    model.write_text("save-interval: 10")
    options = parse_options("pretrain", ["--nodes", "1:1", "--run-dir", str(tmp_path), str(model)], {})
    launcher = ElasticRun(options, ModelFile.read(model, {}), 1)
    monkeypatch.setattr(launcher._supervisor, "listen", lambda: None)
    monkeypatch.setattr(elastic, "check", lambda *_, **__: launcher._supervisor._signals.append(signal.SIGINT) or 130)
    assert launcher.run() == EXIT_REQUEUE


@pytest.mark.parametrize("content", ["", "{}", '{"number": 1, "members": [{}], "port": 7, "flags": {}}'])
def test_damaged_generation_is_reported(tmp_path, content):
    (tmp_path / "generation-000001.json").write_text(content)
    with pytest.raises(RunFailure, match=r"generation-000001\.json is damaged"):
        Generations(tmp_path).newest()


subsets = st.lists(st.sampled_from(MEMBERS), unique=True)


@given(subsets.filter(bool), subsets.filter(bool))
def test_all_launchers_find_the_same_leader(trained, known):
    """The leader is the first member of the generation that is there; a new launcher leads only if none is there."""
    known.sort(key=lambda member: member.process.started)
    leader = leading_member(Generation(1, tuple(trained), 7, {}), known)
    survivors = [member for member in trained if member in known]
    assert leader == (survivors[0] if survivors else known[0])
    assert leading_member(None, known) == known[0]


@given(
    layouts=st.sets(st.integers(1, 12)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    least=st.integers(1, 4),
    more=st.integers(0, 4),
    failing=st.sets(st.integers(1, 24)),
)
def test_most_nodes_that_can_train_are_chosen(layouts, ranks, least, more, failing):
    model = ModelFile(Path("m.yaml"), {"save-interval": ("9",)}, {size: {"size": (str(size),)} for size in layouts})
    checked = []

    def check(_flags, ranks):
        checked.append(ranks)
        return ranks not in failing

    options = Options(nodes=NodeRange(least, least + more, True), flags=[], run_dir=Path("run"), verbose=False)
    chooser = LayoutChooser(options, model, check)
    possible = [
        number
        for number in range(least, min(least + more, len(ranks)) + 1)
        if (total := sum(ranks[:number])) not in failing and (not layouts or any(total % size == 0 for size in layouts))
    ]
    if possible:
        nodes, flags = chooser.choose(ranks)
        assert nodes == possible[-1]
        fitting = [size for size in layouts if sum(ranks[:nodes]) % size == 0]
        assert flags.get("size") == ((str(max(fitting)),) if layouts else None)
        assert chooser.count(ranks) == possible[-1]
    else:
        with pytest.raises(UserError, match="can train"):
            chooser.choose(ranks)
    assert len(checked) == len(set(checked))
