"""Measure how much exported models attend to the preceding token, and how well they predict repeated pairs of tokens.

A model that copies from its context needs two layers of attention: one that passes on each token's preceding token, and
one that looks for earlier occurrences of the present token (Olsson et al., arXiv 2209.11895). In a model of two layers
the first part must lie in the first layer.

    python tools/studies/preceding_token.py --models exported/* --datasets held_out_text_document --output result.json

prints one line for each model, and writes the figures into `result.json` and a plot into `result.png`. Models are
grouped by their folders' names up to `.seed-`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from maskmoe.command_line.run_tool import run_tool
from maskmoe.comparison.report import new_figure, tidy
from maskmoe.conversion.model_files import load_exported_model, load_exported_tokenizer
from maskmoe.data.indexed_dataset import dataset_files, open_tokens
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs, write_text

_BATCH = 50  # windows


@dataclass(frozen=True)
class Measurement:
    """The figures of one model.

    Attributes:
        model: name of the model's folder.
        attention: weight of the preceding token in the first layer, averaged over tokens; the largest of all heads.
        repeated: mean loss in nats of the tokens that have followed an equal token before in the window.
        other: mean loss in nats of all other tokens.
        repeated_share: share of the repeating tokens among all predicted tokens.
    """

    model: str
    attention: float
    repeated: float
    other: float
    repeated_share: float

    @property
    def group(self) -> str:
        """The models that differ in nothing but the seed."""
        return self.model.partition(".seed-")[0]


def read_windows(prefixes: Iterable[str], length: int) -> torch.Tensor:
    """Return all windows of some datasets, without the tokens at the ends that fill no window; int64 [windows, length].

    Raises:
        UserError: a dataset is damaged or has no whole window.
    """
    windows = []
    for prefix in prefixes:
        tokens = open_tokens(prefix)
        if len(tokens) < length:
            raise UserError(f"{prefix} has {len(tokens)} tokens, fewer than a window of {length}; use a longer text")
        whole = tokens[: len(tokens) // length * length]
        windows.append(whole.astype(np.int64).reshape(-1, length))
    return torch.from_numpy(np.concatenate(windows))


def repeated_pairs(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return whether a pair of an input and its target has occurred at an earlier position of the window.

    Args:
        inputs: int64 [windows, positions].
        targets: the tokens that follow the inputs, int64 [windows, positions].

    Returns:
        bool [windows, positions].
    """
    is_equal = (inputs[:, :, None] == inputs[:, None]) & (targets[:, :, None] == targets[:, None])
    return is_equal.tril(-1).any(-1)


def attention_to_preceding(attention: torch.Tensor) -> torch.Tensor:
    """Return the weight of the preceding token for each head, averaged over windows and positions; fp32 [heads].

    Args:
        attention: fp32 [windows, heads, positions, positions].
    """
    return attention.diagonal(-1, -2, -1).mean((0, 2))


@torch.inference_mode()
def measure(name: str, model: Any, windows: torch.Tensor) -> Measurement:
    """Measure one model.

    Args:
        name: name of the model.
        model: a causal language model of transformers.
        windows: token ids, int64 [windows, positions + 1].
    """
    model.set_attn_implementation("eager")  # the others do not return attention
    losses, heads, repeated = [], [], []
    for batch in windows.split(_BATCH):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        outputs = model(inputs, output_attentions=True)
        logits = outputs.logits.float().transpose(1, 2)  # [windows, vocabulary, positions]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        heads.append(attention_to_preceding(outputs.attentions[0].float()) * len(batch))
        repeated.append(repeated_pairs(inputs, targets))
    loss, is_repeated = torch.cat(losses), torch.cat(repeated)
    return Measurement(
        name,
        (torch.stack(heads).sum(0) / len(windows)).max().item(),
        loss[is_repeated].mean().item(),
        loss[~is_repeated].mean().item(),
        is_repeated.float().mean().item(),
    )


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the loss of repeated pairs by the attention to the preceding token: one point for each model."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for group in dict.fromkeys(each.group for each in measurements):
        points = [(each.attention, each.repeated) for each in measurements if each.group == group]
        axes.scatter(*zip(*points, strict=True), label=group, alpha=0.8)
    x_label, y_label = "attention to the preceding token in the first layer", "loss of repeated pairs (nats per token)"
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
    axes.legend(frameon=False)
    tidy(axes)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="DIR", help="exported models")
    parser.add_argument("--datasets", nargs="+", required=True, metavar="PREFIX", help="tokenized held-out texts")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file of the figures")
    arguments = parser.parse_args()
    picture = arguments.output.with_suffix(".png")
    inputs = [*arguments.models, *(path for prefix in arguments.datasets for path in dataset_files(prefix))]
    check_outputs([arguments.output, picture], inputs, force=True)
    print("attention  repeated  other  model")
    measurements = []
    for folder in tqdm(arguments.models, unit="model", disable=None):
        model = load_exported_model(folder, load_exported_tokenizer(folder))
        length = model.config.max_position_embeddings + 1
        found = measure(folder.name, model, read_windows(arguments.datasets, length))
        measurements.append(found)
        tqdm.write(f"{found.attention:9.2f}  {found.repeated:8.3f}  {found.other:5.3f}  {found.model}")
    write_text(arguments.output, json.dumps([asdict(each) for each in measurements], indent=1) + "\n")
    draw(measurements, picture)


if __name__ == "__main__":
    run_tool(main)
