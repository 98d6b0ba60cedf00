"""Runs that train on while nodes come and go: `launch/pretrain.sh --nodes MIN:MAX`.

torchrun cannot do this alone: all of its agents meet at one of the nodes and are lost with that node, and the ranks of
all restarts get the same flags. So the launchers of the nodes agree on each part of the run, a *generation*, by files
of the run folder, which all nodes see (`elastic_files`). A generation says which nodes train with which flags, and is a
separate start of torchrun. `LayoutChooser` chooses how many of the nodes train, and with which flags; `ElasticRun`
trains one generation after the other.

One launcher leads: it writes the generations. Every launcher finds out alone which launcher leads. If two launchers
think that they lead, only one of them can write the next generation, and the lock of the run folder lets only one of
two trainings write checkpoints.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from maskmoe.arguments.flags import override, split_flags
from maskmoe.errors import RunFailure, UserError, counted, refused_by_system
from maskmoe.files.run_folder import Journal, Kind
from maskmoe.launch.command import run_flags
from maskmoe.launch.elastic_files import Generation, Generations, Member, Membership, leading_member
from maskmoe.launch.machine import find_devices, listen
from maskmoe.launch.model_file import Flags, ModelFile
from maskmoe.launch.node_run import NodeRun, Supervisor, check, say
from maskmoe.launch.options import Options
from maskmoe.processes.folder_lock import check_unlocked
from maskmoe.processes.interruption import EXIT_REQUEUE, LEAVE_FILE
from maskmoe.processes.network import connection_error
from maskmoe.processes.run_tool import EXIT_BAD_INPUT

FOLDER = "elastic"
"""Name of the folder in a run folder in which launchers meet."""

_LAST_CALL_SECONDS = 30.0  # for which nothing may change before a run starts on fewer than all nodes
_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.5
_BEATS_SECONDS = 6.0  # after a timeout, until all launchers have written and read


class LayoutChooser:
    """Chooses layouts from the model file, and checks each one once before it is used.

    Args:
        options: The launcher's options.
        model: The model file.
        check: Returns whether a run with some flags on a number of ranks may start; prints what is wrong.

    Raises:
        UserError: The run saves no checkpoints, from which another set of nodes could continue, or has a time limit.
    """

    def __init__(self, options: Options, model: ModelFile, check: Callable[[Flags, int], bool]) -> None:
        self._options = options
        self._model = model
        self._check = check
        self._verdicts: dict[int, bool] = {}
        flags = self._run_flags(model.flags)
        if "save-interval" not in flags:
            raise UserError(
                f"--nodes {options.nodes} needs --save-interval, because the run continues from checkpoints"
            )
        if "exit-duration-in-mins" in flags:
            raise UserError(
                f"--nodes {options.nodes} excludes --exit-duration-in-mins, because the launchers would start the "
                "stopped ranks again: leave out the flag, and stop the launchers by SIGTERM"
            )

    def count(self, node_ranks: Sequence[int]) -> int:
        """Return how many nodes, from the first on, have a layout that is not known to fail; 0 for none.

        Args:
            node_ranks: The number of ranks of each node that is there.
        """
        nodes = self._options.nodes
        for number in range(min(len(node_ranks), nodes.most), nodes.least - 1, -1):
            ranks = sum(node_ranks[:number])
            if self._model.fits(ranks) and self._verdicts.get(ranks, True):
                return number
        return 0

    def choose(self, node_ranks: Sequence[int]) -> tuple[int, Flags]:
        """Return the largest number of nodes that have a layout which passes the check, and the flags of their ranks.

        Args:
            node_ranks: The number of ranks of each node that is there; at least as many nodes as must train.

        Raises:
            UserError: No number of nodes has such a layout.
        """
        while number := self.count(node_ranks):
            ranks = sum(node_ranks[:number])
            flags = self._run_flags(self._model.flags_for(ranks))
            if ranks not in self._verdicts:
                self._verdicts[ranks] = self._check(flags, ranks)
            if self._verdicts[ranks]:
                return number, flags
            say(f"{counted(ranks, 'rank')} cannot train (see above)")
        raise UserError(
            f"none of {self._options.nodes.least} to {min(len(node_ranks), self._options.nodes.most)} nodes can train: "
            f"the model file {self._model.path} needs a layout for one of these numbers of nodes"
        )

    def _run_flags(self, model_flags: Flags) -> Flags:
        return run_flags(self._options, model_flags, split_flags(self._options.flags))


class ElasticRun:
    """One node's part of a run that trains on while nodes come and go.

    Args:
        options: The launcher's options.
        model: The model file.
        processes: The number of ranks of this node.

    Raises:
        UserError: The run saves no checkpoints, from which another set of nodes could continue, or has a time limit.
    """

    def __init__(self, options: Options, model: ModelFile, processes: int) -> None:
        self._options = options
        self._supervisor = Supervisor(options.shutdown_timeout)
        self._chooser = LayoutChooser(options, model, self._may_start)
        self._journal = Journal(options.run_dir)
        folder = options.run_dir / FOLDER
        self._generations = Generations(folder)
        self._nodes = Membership(folder / "members", options.address, processes, options.node_timeout)
        self._trained = 0  # the newest generation in which this node has trained
        # The newest generation if the run had ended before this launcher came, else 0; None until that is known.
        self._ended_before: int | None = None
        self._next_look = 0.0
        self._is_ending = False
        self._lost: set[Member] = set()  # the launchers whose loss has been reported

    def run(self) -> int:
        """Take part in the run until it ends, or until a signal stops this node; return the exit code.

        Raises:
            UserError: The run folder cannot be used, or no layout passes the check.
            RunFailure: A file in which the launchers meet is damaged, or the file system fails during the run.
        """
        self._supervisor.listen()
        with refused_by_system(f"cannot use {self._options.run_dir}", "choose another --run-dir"), self._nodes:
            while True:
                outcome = self._next_generation()
                if isinstance(outcome, Generation):
                    outcome = self._train(outcome)
                if outcome is not None:
                    return outcome

    # ---- Agreeing on the next generation -----------------------------------------------------------------------------

    def _next_generation(self) -> Generation | int:
        """Wait for the next generation in which this node trains, or write it if this launcher leads.

        Returns:
            The generation, or the exit code of this launcher if the run ends before.

        Raises:
            RunFailure: The file system has failed for as long as a launcher may be silent.
        """
        arrived = begin = changed = worked = time.monotonic()
        known: list[Member] = []
        has_said = False
        while not self._supervisor.is_stopped:
            now = time.monotonic()
            try:
                running = self._running()
                if isinstance(running, int):
                    return running
                if running is not None and running.number > self._trained and self._nodes.me in running.members:
                    return running
                if known != (known := self._nodes.known()):
                    changed = now
                leader = leading_member(running, known)
                self._nodes.follow(leader)
                if not has_said and now - arrived > _POLL_SECONDS:
                    has_said = True
                    say(self._describe_wait(running, leader))
                if leader == self._nodes.me:
                    is_late = now - begin > self._options.rendezvous_timeout
                    if generation := self._propose(running, is_late or now - changed > _LAST_CALL_SECONDS):
                        return generation
                    if is_late:
                        return self._give_up()
                elif running is not None and leader in running.members:
                    begin = now  # a node may wait without limit while other nodes train
                worked = now
            except OSError as error:
                if now - worked > self._options.node_timeout:
                    raise RunFailure(
                        f"cannot use {self._options.run_dir}: {error.strerror}; the same command resumes the run once "
                        "its disk has space and works"
                    ) from error
            time.sleep(_POLL_SECONDS)
        return EXIT_REQUEUE

    def _running(self) -> Generation | int | None:
        """Return the generation that runs, None if none runs, or the exit code of the run if it has ended."""
        newest = self._generations.newest()
        code = None if newest is None else self._generations.exit_code(newest.number)
        if self._ended_before is None:
            self._ended_before = 0 if newest is None or code is None else newest.number
        if newest is None or newest.number == self._ended_before:
            return None
        return newest if code is None else code

    def _propose(self, running: Generation | None, may_start: bool) -> Generation | None:
        """Write the next generation, as the leader; return None if it is too early, or another launcher has written it.

        Args:
            running: The generation that has just run, in which this node may have trained.
            may_start: Whether the run may start on fewer than all nodes.

        Raises:
            UserError: No number of nodes passes the check.
        """
        ready = self._nodes.ready()
        if running is not None and self._nodes.me in running.members:
            # The nodes of the generation before come as soon as their ranks have ended.
            missing = [member for member in running.members if member not in ready]
            if not all(map(self._nodes.is_cut_off, missing)):
                return None
            self._report_loss(missing)
        elif len(ready) < self._options.nodes.most and not may_start:
            return None
        if not self._chooser.count(_ranks_of(ready)):
            return None
        nodes, flags = self._chooser.choose(_ranks_of(ready))
        if self._supervisor.is_stopped:
            return None
        # The number follows the generation that this choice is based on. If another launcher has written a generation
        # meanwhile, this one cannot be written.
        number = (running.number if running is not None else self._ended_before or 0) + 1
        generation = Generation(number, tuple(ready[:nodes]), _free_port(), flags)
        if not self._generations.write(generation):
            return None
        hosts = _hosts_of(generation.members)
        text = f"training on {counted(nodes, 'node')} ({hosts}), {counted(generation.ranks, 'rank')}"
        self._report(text, nodes=nodes, ranks=generation.ranks)
        return generation

    def _may_start(self, flags: Flags, ranks: int) -> bool:
        """Check a run on a number of ranks like those of this machine; print what is wrong, and return the result."""
        say(f"checking settings and files for {counted(ranks, 'rank')}")
        if not find_devices().num_gpus:
            flags = override({"distributed-backend": ("gloo",)}, flags)
        passes = check(flags, ranks, shows_report="verbose" in flags) == 0
        # Ctrl-C also ends the check, whose failure then says nothing about the run.
        return passes or self._supervisor.is_stopped

    def _give_up(self) -> int:
        """Say that too few nodes have come, and return the exit code of a run that can be started again."""
        ready, nodes, seconds = len(self._nodes.ready()), self._options.nodes, self._options.rendezvous_timeout
        text = f"{counted(ready, 'node')} of {nodes.least} to {nodes.most} came within {seconds} s"
        if ready >= nodes.least:
            text += f", and the model file has no layout for {nodes.least} to {ready} nodes"
        say(f"{text}; start the command on more nodes, with the same --run-dir")
        return EXIT_REQUEUE

    def _describe_wait(self, running: Generation | None, leader: Member) -> str:
        if leader == self._nodes.me:
            nodes = self._options.nodes
            return f"waiting for {nodes.least} to {nodes.most} nodes, which need the run folder {self._options.run_dir}"
        if running is not None and leader in running.members:
            return f"the run trains already; {leader.process.host} takes this node in at the next checkpoint"
        return f"waiting for {leader.process.host}, which starts the run"

    # ---- Training a generation ---------------------------------------------------------------------------------------

    def _train(self, generation: Generation) -> int | None:
        """Run this node's ranks of a generation.

        Returns:
            The exit code of this launcher; None if another generation follows.
        """
        self._trained, self._is_ending = generation.number, False
        self._lost.difference_update(generation.members)
        node_rank = generation.members.index(self._nodes.me)
        # The other nodes see the new generation and kill their former ranks, one of which may hold the lock.
        if node_rank == 0 and (save := generation.flags.get("save")):
            check_unlocked(Path(save[0]))
        if node_rank and not self._reach_first_node(generation):
            return None
        meeting = replace(
            self._options.meeting,
            nodes=len(generation.members),
            node_rank=node_rank,
            endpoint=generation.endpoint,
            name=f"{self._options.rendezvous_id}.{generation.number}",
        )
        leave_file = {LEAVE_FILE: str(self._generations.leave_file(generation.number))}
        processes = self._nodes.me.ranks
        run = NodeRun(self._options, meeting, generation.flags, processes, generation.ranks, leave_file)
        code = run.train(self._supervisor, must_end=lambda: self._must_end(generation))
        if not self._is_ending:
            run.record_end(code)
        if self._supervisor.is_stopped:
            return code
        # The ranks ask for another start after a signal to another node, and after a request to leave.
        if self._is_ending or code == EXIT_REQUEUE:
            return None
        if code not in (0, EXIT_BAD_INPUT) and self._others_have_changed(generation, code):
            return None
        self._generations.end(generation.number, code)
        return code

    def _reach_first_node(self, generation: Generation) -> bool:
        """Wait until torchrun listens on the first node; return False if another generation begins before."""
        while not (self._supervisor.is_stopped or self._must_end(generation)):
            if connection_error(*generation.endpoint) is None:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _must_end(self, generation: Generation) -> bool:
        """Return whether the ranks of a generation must be killed; asks `_find_changes` once a second."""
        if not self._is_ending and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            with suppress(OSError):  # the file system may fail for a while
                self._is_ending = self._find_changes(generation)
        return self._is_ending

    def _find_changes(self, generation: Generation) -> bool:
        """Return whether a node is lost, the next generation has begun, or the run has failed on another node.

        The leader also asks for a generation with more nodes if nodes wait.

        Args:
            generation: The generation that this node trains.

        Raises:
            OSError: A file cannot be read or written.
        """
        # A node that has completed the training must not keep other nodes from doing so.
        if self._generations.newest_number() > generation.number or self._generations.exit_code(generation.number):
            return True
        leader = leading_member(generation, self._nodes.known())
        self._nodes.follow(leader)
        if leader != self._nodes.me:
            return False
        lost = list(filter(self._nodes.is_cut_off, generation.members))
        self._report_loss(lost)
        if not lost:
            self._invite(generation)
        return bool(lost)

    def _report_loss(self, members: Sequence[Member]) -> None:
        """Print and record once that nodes are lost, and remove what their launchers have left in the folder."""
        lost = [member for member in members if member not in self._lost]
        if lost:
            self._lost.update(lost)
            it = "it" if len(lost) == 1 else "them"
            silence = f"{_hosts_of(lost)} left the run, or gave no sign of life for {self._options.node_timeout} s"
            self._report(f"{silence}; the run continues without {it}")
            self._nodes.remove_files_of(lost)

    def _invite(self, generation: Generation) -> None:
        """Ask the ranks to end after their next checkpoint if nodes wait that can train."""
        leave_file = self._generations.leave_file(generation.number)
        waiting = [member for member in self._nodes.ready() if member not in generation.members]
        count = self._chooser.count(_ranks_of([*generation.members, *waiting]))
        if count > len(generation.members) and not leave_file.exists():
            self._report(f"{_hosts_of(waiting)} has come, and is taken in at the next checkpoint")
            leave_file.touch()

    def _report(self, text: str, **facts: int) -> None:
        """Print that the nodes of the run change, and write it into the journal."""
        say(text)
        self._journal.write(Kind.NODES, text, **facts)

    def _others_have_changed(self, generation: Generation, code: int) -> bool:
        """Return whether the ranks failed because nodes have come or gone; wait until that is known.

        Args:
            generation: The generation whose ranks have ended.
            code: The exit code of the ranks, a failure.
        """
        say(f"the ranks ended with exit code {code}; looking whether a node is lost")
        # A silent node counts as lost by the clock of the folder, which a slow file system delays.
        patience = self._options.node_timeout + _BEATS_SECONDS
        known_at = self._nodes.now() + patience
        given_up_at = time.monotonic() + patience + self._options.rendezvous_timeout
        while self._nodes.now() < known_at and time.monotonic() < given_up_at and not self._supervisor.is_stopped:
            if self._must_end(generation) or any(map(self._nodes.is_gone, generation.members)):
                return True
            with suppress(OSError):  # the file system may fail for a while
                if self._generations.exit_code(generation.number) is not None:
                    return False
            time.sleep(_POLL_SECONDS)
        return self._supervisor.is_stopped


def _ranks_of(members: Iterable[Member]) -> list[int]:
    """Return the number of ranks of each member's node."""
    return [member.ranks for member in members]


def _hosts_of(members: Iterable[Member]) -> str:
    """Return the names of the members' hosts."""
    return ", ".join(member.process.host for member in members)


def _free_port() -> int:
    with listen() as server:
        return server.getsockname()[1]
