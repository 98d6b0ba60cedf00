"""A rank ends when the process that writes its checkpoints dies, because Megatron would wait for that process."""

import subprocess
import sys

import pytest

START_WRITER = """
import multiprocessing, os, signal, sys, threading, time
from maskmoe.megatron_compat import prepare_process
prepare_process()
from maskmoe.checkpoint.writers import end_with_writer, rank_is_ending

def write():
    if sys.argv[1] != "is done":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    watch = threading.Thread(target=end_with_writer, args=(writer,))
    watch.start()
    if sys.argv[1] == "is ended by the rank":
        rank_is_ending.set()
    watch.join()
    print("the rank goes on")
"""


@pytest.mark.parametrize("end", ["dies", "is done", "is ended by the rank"])
def test_rank_ends_with_a_dead_writer(end):
    program = [sys.executable, "-c", START_WRITER, end]
    rank = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    if end == "dies":
        assert (rank.returncode, rank.stdout) == (1, "")
        (line,) = (line for line in rank.stderr.splitlines() if line.startswith("error:"))
        assert "the process that writes checkpoints has died (host " in line
        assert ", exit code -9); " in line
    else:
        assert (rank.returncode, rank.stdout) == (0, "the rank goes on\n")
