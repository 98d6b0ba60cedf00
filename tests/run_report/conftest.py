"""Event files as a run writes them."""

import pytest
from torch.utils.tensorboard import SummaryWriter

ARGUMENTS = {
    "train_iters": "20",
    "seq_length": "32",
    "num_layers": "4",
    "num_experts": "8",
    "save": "/runs/<b>&'run'",
    "hidden_size": "None",
    "maskmoe/command": 'pretrain --lr "1e-3"',
}


def write_start(folder, first, last, offset=0.0):
    """Write the event file of one start of a run, from the iteration `first` to `last`."""
    writer = SummaryWriter(folder)
    for name, text in ARGUMENTS.items():
        writer.add_text(name, text, first - 1)
    for step in range(first, last + 1):
        writer.add_scalar("lm loss", offset + 1 / step, step)
        writer.add_scalar("lm loss vs samples", offset + 1 / step, 16 * step)
        writer.add_scalar("batch-size", 16, step)
        writer.add_scalar("iteration-time", 0.25, step)
        writer.add_scalar("learning-rate", 1e-3, step)
        writer.add_scalar("mem-allocated-bytes", 2.0**31, step)
        if step % 5 == 0:
            writer.add_scalar("lm loss validation", offset + 2 / step, step)
        if step % 2 == 0:
            for layer in range(4):
                writer.add_scalar(f"moe/expert_load_max_over_mean_layer_{layer}", 1.5 + layer, step)
    writer.close()


@pytest.fixture
def resumed_run(tmp_path):
    """The folder of a run that stopped after iteration 12, and continued after iteration 7 up to iteration 15."""
    folder = tmp_path / "my run"
    write_start(folder / "tensorboard", 1, 12)
    (first,) = (folder / "tensorboard").iterdir()
    # The names of event files begin with the time in seconds.
    parts = first.name.split(".")
    first.rename(first.with_name(".".join([*parts[:3], "1000000000", *parts[4:]])))
    write_start(folder / "tensorboard", 8, 15, offset=1.0)
    return folder
