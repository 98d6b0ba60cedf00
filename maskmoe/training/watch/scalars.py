"""Logs scalars of our own to TensorBoard and Weights & Biases."""

from collections.abc import Mapping

from megatron.training import get_tensorboard_writer, get_wandb_writer


def log_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write scalars to the writers that Megatron has opened, which are on the last rank.

    Args:
        scalars: Values by tag.
        iteration: The iteration of the values, counted from 1.
    """
    if writer := get_tensorboard_writer():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(dict(scalars), iteration)
