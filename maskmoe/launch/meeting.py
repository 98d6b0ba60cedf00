"""Says on which nodes torchrun waits while the nodes of a run meet, which torchrun itself does not."""

import pickle
import threading
import time

from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

_LOOK_SECONDS = 10.0


def watch_meeting(endpoint: str, run_id: str, nodes: int) -> None:
    """Start a thread that prints how many nodes have come, whenever the number changes, until all nodes are there.

    Args:
        endpoint: Host and port at which the nodes meet.
        run_id: The name of the meeting.
        nodes: The number of nodes.
    """
    threading.Thread(target=_watch, args=(endpoint, run_id, nodes), name="watch of the meeting", daemon=True).start()


def _watch(endpoint: str, run_id: str, nodes: int) -> None:
    parameters = RendezvousParameters("c10d", endpoint, run_id, min_nodes=nodes, max_nodes=nodes, is_host=False)
    told = None
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            content = create_backend(parameters)[0].get_state()
        except RendezvousError:
            continue  # the first node is not there yet, or no longer
        # Every torchrun of the run reads this state in the same way.
        state = pickle.loads(content[0]) if content else None
        if state is not None and state.complete:
            return
        here = len(state.participants) if state is not None else 0
        if here != told:
            told = here
            print(
                f"launch: waiting for {nodes - here} of {nodes} nodes at {endpoint}: each node needs the same --nodes, "
                f"--rendezvous, --rendezvous-id {run_id} (by default the name of --run-dir), and its own --node-rank",
                flush=True,
            )
