"""torchrun that ends a run which restarts cannot help: `python -m maskmoe.launch.agent` takes torchrun's arguments.

- Ranks that refuse their input, or that a signal has stopped, are not restarted. Their exit code is that of this
  program, in place of torchrun's 1.
- When torchrun ends a run on one node, it ends the run on all nodes.
- Every signal that ends the run reaches the ranks as SIGTERM, on which they save a checkpoint.
- One line says which rank has failed. torchrun's own log is `torchrun.log` in the folder of `--log-dir`.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher import api

from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.processes.run_tool import EXIT_BAD_INPUT, EXIT_RUN_FAILURE
from maskmoe.processes.signals import SIGNALS_THAT_END

_FAILED_RANKS_TIMEOUT = 30  # seconds until ranks that outlive a failed rank are killed
_ANSWER_TIMEOUT = 60.0  # seconds for an answer of node 0
_OTHER_NODE_TIMEOUT = 10.0  # seconds for which ranks may end by themselves when another node has ended the run


class Agent(LocalElasticAgent):
    """The agent of one node, which starts the node's ranks, watches them and ends them.

    Attributes:
        has_met: Whether the nodes of the run have met.
    """

    has_met = False

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Return the state of the ranks; allow no restart if a restart cannot help.

        Raises:
            RendezvousClosedError: Another node has ended the run, or node 0 is lost.
        """
        Agent.has_met = True
        result = super()._monitor_workers(worker_group)
        if self._pcontext and result.state is WorkerState.HEALTHY and self._has_ended_elsewhere():
            self._pcontext.wait(_OTHER_NODE_TIMEOUT)  # the ranks of this node may be about to end, too
            result = super()._monitor_workers(worker_group)
            if result.state is WorkerState.HEALTHY:
                raise RendezvousClosedError
        codes = {failure.exitcode for failure in result.failures.values()}
        if EXIT_BAD_INPUT in codes or (EXIT_REQUEUE in codes and not self._is_node_waiting()):
            self._remaining_restarts = 0
        elif result.state is WorkerState.FAILED and self._has_ended_elsewhere():
            raise RendezvousClosedError
        return result

    def _has_ended_elsewhere(self) -> bool:
        return self._ask("is_closed", if_lost=True)

    def _is_node_waiting(self) -> bool:
        """Return whether a node waits to be taken in. Then all ranks save and stop, and torchrun starts them again."""
        return self._ask("num_nodes_waiting", if_lost=False)

    def _ask(self, question: str, if_lost: bool) -> bool:
        """Ask node 0's rendezvous; return `if_lost` if node 0 has ended.

        If node 0 does not answer, for which torchrun itself waits without limit, end the ranks and this process.
        """
        timer = threading.Timer(_ANSWER_TIMEOUT, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            return bool(getattr(self._worker_group.spec.rdzv_handler, question)())
        except RendezvousError:
            return if_lost
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        _say("error: node 0 does not answer: its host or the network is down")
        self._kill_ranks()
        os._exit(EXIT_RUN_FAILURE)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        """End the ranks by SIGTERM, and kill those that are left after a time; the arguments are ignored.

        After a signal, ranks get the time to save, which further signals do not shorten, except a second Ctrl-C.
        """
        timeout = _FAILED_RANKS_TIMEOUT
        if isinstance(end := sys.exception(), SignalException):
            timeout = self._shutdown_timeout
            _say(f"{signal.Signals(end.sigval).name}: the run saves a checkpoint and stops")
            for number in SIGNALS_THAT_END:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGINT, lambda *_: self._kill_ranks())
        super()._shutdown(signal.SIGTERM, timeout)

    def _kill_ranks(self) -> None:
        for process in self._pcontext.pids().values() if self._pcontext else ():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def main() -> None:
    """Run torchrun with the arguments of this process, and exit with the exit code of the run."""
    arguments = run.get_args_parser().parse_args()
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")
    _redirect_log(arguments.log_dir)
    vars(api)["LocalElasticAgent"] = Agent
    try:
        run.run(arguments)
    except RendezvousError as error:
        is_over = Agent.has_met and not isinstance(error, RendezvousTimeoutError)
        if is_over or isinstance(error, RendezvousClosedError):
            _say("another node has ended the run, and says why in its output; or node 0 is lost")
        else:
            where = f"{arguments.rdzv_endpoint}, --rendezvous-id {arguments.rdzv_id}"
            reason = str(error.__cause__ or error).partition("\n")[0]
            _say(f"error: the {arguments.nnodes} nodes did not meet at {where}: {reason}")
        sys.exit(EXIT_RUN_FAILURE)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_BAD_INPUT, EXIT_REQUEUE):
            if code in codes:  # the rank has said why
                sys.exit(code)
        _say(describe_failure(error.failures, arguments.log_dir))
        sys.exit(EXIT_RUN_FAILURE)
    except SignalException:
        sys.exit(EXIT_REQUEUE)


def describe_failure(failures: Mapping[int, ProcessFailure], folder: str | None) -> str:
    """Return a line about the rank that failed first: a rank that a signal ended, before ranks that lost their peer.

    Args:
        failures: torchrun's records of the failed ranks, by rank. SIGTERM is torchrun's own.
        folder: The folder of `--log-dir`; None if the output of the ranks is in no file.
    """

    def order(rank: int) -> tuple[bool, int]:
        code = failures[rank].exitcode
        return code >= 0 or code == -signal.SIGTERM, failures[rank].timestamp

    rank = min(failures, key=order)
    code = failures[rank].exitcode
    how = f"failed with exit code {code}"
    if code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    logs = [*Path(folder).glob(f"*/attempt_*/{failures[rank].local_rank}/stderr.log")] if folder else []
    log = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    return f"rank {rank} {how}" + (f"; its log is {log}" if log else "")


def _redirect_log(folder: str | None) -> None:
    """Let torch's loggers write to `torchrun.log` in a folder, or nowhere, instead of to stderr."""
    handler = logging.FileHandler(Path(folder) / "torchrun.log", delay=True) if folder else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # torch gives handlers of their own to several of its loggers.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logger = logging.getLogger("torch")
    logger.handlers[:] = [handler]
    logger.propagate = False


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
