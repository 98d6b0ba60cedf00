"""`maskmoe generate`: generates text from a Megatron checkpoint."""

from maskmoe.launch.command import entry_point
from maskmoe.launch.entry_point import run_entry_point


def main() -> None:
    """Run `maskmoe.training.generate` on this machine's GPUs, or as the rank that this process already is."""
    run_entry_point(entry_point("generate"), saves_checkpoints=False)
