"""`maskmoe pretrain`: pretrains a model from Megatron's flags."""

from maskmoe.launch.entry_point import run_entry_point


def main() -> None:
    """Run `maskmoe.training.pretrain` on this machine's GPUs, or as the rank that this process already is."""
    run_entry_point("maskmoe.training.pretrain", saves_checkpoints=True)
