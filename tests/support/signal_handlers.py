"""The handlers of signals with which each test starts, also after a fixture ran a launcher or Megatron in this process.

A shell that starts the tests in the background makes them ignore Ctrl-C, and `nohup` makes them ignore SIGHUP. The
processes under test would inherit this.
"""

import signal

from maskmoe.processes.interruption import SIGNALS_THAT_END, Handler

HANDLERS: dict[signal.Signals, Handler] = dict.fromkeys(SIGNALS_THAT_END, signal.SIG_DFL)
HANDLERS[signal.SIGINT] = signal.default_int_handler


def install_handlers() -> None:
    """Install the handlers of `HANDLERS`."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
