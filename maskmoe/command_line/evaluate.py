"""`maskmoe evaluate`: computes a checkpoint's loss by token frequency."""

from maskmoe.launch.command import entry_point
from maskmoe.launch.entry_point import run_entry_point


def main() -> None:
    """Run `maskmoe.training.evaluate` on this machine's GPUs, or as the rank that this process already is."""
    run_entry_point(entry_point("evaluate"), saves_checkpoints=False)
