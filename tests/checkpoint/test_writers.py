"""A rank ends when the process that writes its checkpoints dies, because Megatron would wait for that process."""

import subprocess
import sys

# Ranks are forks of one process, because the imports take most of the time.
START_WRITERS = """
import multiprocessing, os, signal, threading
from maskmoe.megatron_compat import prepare_process
prepare_process()
from maskmoe.checkpoint.writers import end_with_writer, rank_is_ending

def write(end):
    if end != "is done":
        os.kill(os.getpid(), signal.SIGKILL)

def be_a_rank(end):
    writer = multiprocessing.get_context("fork").Process(target=write, args=(end,))
    writer.start()
    watch = threading.Thread(target=end_with_writer, args=(writer,))
    watch.start()
    if end == "is ended by the rank":
        rank_is_ending.set()
    watch.join()

if __name__ == "__main__":
    for end in ("dies", "is done", "is ended by the rank"):
        if not (rank := os.fork()):
            be_a_rank(end)
            os._exit(0)
        print(end, os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), flush=True)
"""


def test_rank_ends_with_a_dead_writer():
    program = [sys.executable, "-c", START_WRITERS]
    ranks = subprocess.run(program, capture_output=True, text=True, timeout=120, check=True)
    assert ranks.stdout.splitlines() == ["dies 1", "is done 0", "is ended by the rank 0"]
    (line,) = (line for line in ranks.stderr.splitlines() if line.startswith("error:"))
    assert "the process that writes checkpoints has died (host " in line
    assert ", exit code -9); " in line
