"""What tests of several folders use."""

import socket
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from maskmoe.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.frequency import count_token_frequency
from maskmoe.routing_mask.mask import build_routing_mask

LAPTOP_VOCAB_SIZE = 4095  # NullTokenizer adds one


def read_scalars(run_folder: Path, keep_repeated: bool = False) -> dict[str, list[ScalarEvent]]:
    """What a run, with all its restarts, has logged to `tensorboard` in its folder, with the precision of fp32.

    Args:
        run_folder: of the run.
        keep_repeated: of a step that was logged more than once, all values; otherwise the last.
    """
    events = EventAccumulator(
        str(run_folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=not keep_repeated
    )
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_losses(run_folder: Path) -> dict[int, float]:
    """The training losses by iteration; none if none was logged."""
    return {event.step: event.value for event in read_scalars(run_folder).get("lm loss", ())}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def make_laptop_data(folder: Path, num_documents: int) -> str:
    """Write random data and a routing mask for launch/models/laptop.yaml; returns the flags that name them."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data", optimal_dtype(LAPTOP_VOCAB_SIZE)) as dataset:
        for length in rng.integers(20, 200, size=num_documents):
            dataset.add_document(np.minimum(rng.zipf(1.3, size=length), LAPTOP_VOCAB_SIZE) - 1)
    frequency = count_token_frequency([str(folder / "data")], LAPTOP_VOCAB_SIZE, workers=1)
    recipe = MaskRecipe(8, 4, "balanced", frequent_mass=0.4, frequent_visible_experts=4, seed=1)
    build_routing_mask(recipe, frequency=frequency).save(folder / "mask.safetensors")
    return (
        f"--data-path {folder}/data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {LAPTOP_VOCAB_SIZE} "
        f"--routing-mask {folder}/mask.safetensors"
    )
