"""Lets signals save a checkpoint."""

import signal
from argparse import Namespace

from maskmoe.processes.interruption import SIGNALS_THAT_SAVE
from maskmoe.training.watch.callback import Callback


class SaveOnSignals(Callback):
    """Makes Megatron save a checkpoint on every signal of `SIGNALS_THAT_SAVE`, not only on `--exit-signal`.

    Megatron saves after the iteration in progress. Before the first iteration there is nothing to save, and a rank may
    wait for other ranks without handling signals. So until then, `--exit-signal`, with which torchrun ends ranks, ends
    the process at once.

    Args:
        args: Megatron's arguments. Megatron has installed its handler of `--exit-signal`.
    """

    def __init__(self, args: Namespace) -> None:
        self._exit_signal = args.exit_signal if args.exit_signal_handler else None
        if self._exit_signal is not None:
            self._save = signal.getsignal(self._exit_signal)
            for number in SIGNALS_THAT_SAVE:
                signal.signal(number, self._save)
            signal.signal(self._exit_signal, signal.SIG_DFL)

    def before_micro_batch(self) -> None:
        """Let `--exit-signal` save, too, from the first micro-batch on."""
        if self._exit_signal is not None:
            signal.signal(self._exit_signal, self._save)
            self._exit_signal = None
