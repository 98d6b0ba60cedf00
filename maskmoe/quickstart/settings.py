"""What a quickstart is told on its command line, and where its files are."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import ASSIGNMENTS
from maskmoe.workflow.stage import ROOT, TrainingFiles
from maskmoe.workflow.text import TextFiles

HEAD_SIZE = 32


@dataclass(frozen=True)
class Settings:
    """The settings of a run; see `--help` of `launch/quickstart.sh`."""

    input: tuple[Path, ...]
    run_dir: Path
    json_key: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_experts: int
    frequent_mass: float
    frequent_visible_experts: int
    assignment: str
    seq_length: int
    global_batch_size: int
    train_iters: int
    lr: float
    seed: int
    prompt: str | None

    def check(self) -> None:
        """Refuse what would fail only after minutes of work.

        Raises:
            UserError: naming the flag or file.
        """
        for path in self.input:
            if not path.is_file():
                raise UserError(f"--input {path} {'is a folder, not a file' if path.is_dir() else 'does not exist'}")
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise UserError(f"--run-dir {self.run_dir} is a file, not a folder")
        smallest = {"num_layers": 1, "num_experts": 2, "seq_length": 32, "global_batch_size": 1, "train_iters": 1}
        for name, minimum in smallest.items():
            if getattr(self, name) < minimum:
                raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}, not {getattr(self, name)}")
        if self.hidden_size < HEAD_SIZE or self.hidden_size % HEAD_SIZE:
            raise UserError(f"--hidden-size must be a multiple of {HEAD_SIZE}, not {self.hidden_size}")
        if not 0 <= self.frequent_mass <= 1:
            raise UserError(f"--frequent-mass is a share between 0 and 1, not {self.frequent_mass}")
        if not 2 <= self.frequent_visible_experts <= self.num_experts:
            raise UserError(
                f"--frequent-visible-experts must be between 2 and --num-experts {self.num_experts}, "
                f"not {self.frequent_visible_experts}"
            )
        if self.lr <= 0:
            raise UserError(f"--lr must be above 0, not {self.lr}")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parse the command line (by default this process's); relative paths are relative to the current folder."""
    parser = argparse.ArgumentParser(
        prog="launch/quickstart.sh",
        description="Train a MaskMoE language model from raw text on this machine: tokenizer, dataset, token counts, "
        "routing mask, training with expert parallelism (all GPUs; without any, 2 processes on the CPU), evaluation, "
        "export to transformers, and a sample of text that the exported model generates. Takes 6 to 8 minutes on 2 "
        "cores with the defaults. Started again after an interruption, it continues where it was; with other settings, "
        "it does again what they change.",
        epilog="The run folder gets report.md, loss.png, the checkpoints, the exported model, the routing mask, "
        "commands.sh with the command line of every stage, and logs/ with the full output of each.",
    )

    def add(group: argparse._ArgumentGroup, flag: str, default: object, help: str, **options) -> None:
        options = {"metavar": "N", "type": type(default), **options}
        group.add_argument(flag, default=default, help=f"{help} [{default}]", **options)

    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="text to train on: JSON lines (.jsonl) or plain text, also .gz and .zst "
        "[sources and documentation of the installed Python and its packages]",
    )
    files.add_argument("--json-key", default="text", metavar="KEY", help="key that holds the text in JSON lines [text]")
    files.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs" / "quickstart", metavar="DIR", help="[runs/quickstart]"
    )

    model = parser.add_argument_group("model")
    add(model, "--vocab-size", 4096, "ids of the tokenizer")
    add(model, "--num-layers", 4, "transformer layers")
    add(model, "--hidden-size", 128, f"width of the model, a multiple of {HEAD_SIZE}")
    add(model, "--num-experts", 8, "experts in each layer")

    mask = parser.add_argument_group("routing mask")
    add(mask, "--frequent-mass", 0.4, "the ids that make up this share of the text see several experts", metavar="P")
    add(mask, "--frequent-visible-experts", 4, "how many experts those see; all other ids see one", metavar="V")
    add(mask, "--assignment", "balanced", "how experts are assigned to ids", choices=ASSIGNMENTS, metavar=None)

    training = parser.add_argument_group("training")
    add(training, "--seq-length", 256, "tokens in a sample")
    add(training, "--global-batch-size", 8, "samples in an iteration")
    add(training, "--train-iters", 800, "iterations")
    add(training, "--lr", 4e-3, "largest learning rate", metavar="X")
    add(training, "--seed", 1234, "of initial weights and the order of the data")
    training.add_argument(
        "--prompt", metavar="TEXT", help="what the sample shall continue [the start of a held-out text]"
    )

    values = vars(parser.parse_args(arguments))
    values["input"] = tuple(path.absolute() for path in values["input"])
    values["run_dir"] = values["run_dir"].absolute()
    return Settings(**values)


@dataclass(frozen=True)
class RunFiles(TextFiles, TrainingFiles):
    """Where the files of a run are."""

    @property
    def model(self) -> Path:
        """In transformers' format."""
        return self.folder / "model"

    @property
    def sample(self) -> Path:
        return self.folder / "sample.txt"

    @property
    def report(self) -> Path:
        return self.folder / "report.md"

    @property
    def loss_curve(self) -> Path:
        return self.folder / "loss.png"
