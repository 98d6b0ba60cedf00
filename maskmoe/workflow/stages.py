"""All stages of quickstart and comparison, from text to a model that writes text. Each stage is written only here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmoe.launch.command import standalone_command
from maskmoe.launch.devices import DEVICE_FLAGS, Devices
from maskmoe.launch.model_file import Flags, flag_words
from maskmoe.workflow.files import TextFiles, TrainingFiles
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents


@dataclass(frozen=True)
class TextStages:
    """The stages that turn text into a dataset with its tokenizer and token counts.

    Attributes:
        files: where the stages keep their files.
        input: text files; if empty, the text is the sources and documentation of the installed Python and its packages.
        vocab_size: number of ids of the tokenizer.
        corpus_flags: flags of `maskmoe corpus`, used if `input` is empty.
    """

    files: TextFiles
    input: tuple[Path, ...]
    vocab_size: int
    corpus_flags: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[StageMaker, ...]:
        """Makers of all stages, in order."""
        corpus = () if self.input else (self.corpus,)
        return (*corpus, self.tokenizer, self.dataset, self.frequency)

    def corpus(self) -> Stage:
        """Collect text of the installed Python and its packages."""
        command = maskmoe_command("corpus", *self.corpus_flags, "--output", self.files.corpus)
        return Stage("corpus", command, inputs=(), outputs=(self.files.corpus,))

    def tokenizer(self) -> Stage:
        """Train a SentencePiece tokenizer on the text."""
        command = maskmoe_command(
            "tokenizer",
            *("--input", *self._text),
            *("--json-keys", self.files.json_key),
            *("--vocab-size", self.vocab_size),
            *("--max-lines", _MAX_TOKENIZER_LINES),
            *("--output-prefix", self.files.tokenizer_prefix),
        )
        vocabulary = Path(f"{self.files.tokenizer_prefix}.vocab")
        return Stage("tokenizer", command, inputs=self._text, outputs=(self.files.tokenizer_model, vocabulary))

    def dataset(self) -> Stage:
        """Encode the text into a dataset, with its documents shuffled.

        The last documents are held out for evaluation. Shuffled documents make the held-out text resemble the training
        text.
        """
        command = maskmoe_command(
            "preprocess",
            *("--input", *self._text),
            *("--json-keys", self.files.json_key),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.files.tokenizer_model),
            *("--output-prefix", self.files.dataset_stem),
            "--append-eod",
            *("--shuffle-seed", _SHUFFLE_SEED),
        )
        inputs = (*self._text, self.files.tokenizer_model)
        return Stage("dataset", command, inputs=inputs, outputs=self.files.dataset)

    def frequency(self) -> Stage:
        """Count the tokens of the dataset."""
        files = self.files
        return count_tokens([str(files.dataset_prefix)], self.vocab_size, files.dataset, files.token_frequency)

    @property
    def _text(self) -> tuple[Path, ...]:
        return self.input or (self.files.corpus,)


def count_tokens(data_path: Sequence[str], vocab_size: int | str, inputs: tuple[Path, ...], output: Path) -> Stage:
    """Count how often each token id occurs in a dataset.

    Args:
        data_path: words of Megatron's `--data-path`.
        vocab_size: number of ids of the tokenizer.
        inputs: files of the dataset.
        output: file of the counts.
    """
    flags = ("--data-path", *data_path, "--vocab-size", vocab_size, "--output", output)
    return Stage("frequency", maskmoe_command("count", *flags), inputs=inputs, outputs=(output,))


def build_mask(flags: Flags, token_frequency: Path, output: Path) -> Stage:
    """Build a routing mask.

    Args:
        flags: flags of `maskmoe mask`, without the counts and the output.
        token_frequency: token counts.
        output: file of the mask.
    """
    words = flag_words({"token-frequency": (str(token_frequency),), **flags})
    command = maskmoe_command("mask", *words, "--output", output)
    return Stage("mask", command, inputs=(token_frequency,), outputs=(output,))


def check_settings(command: tuple[str, ...], inputs: tuple[Path, ...]) -> Stage:
    """Check the settings of a training without training.

    Args:
        command: the command of the check.
        inputs: files that the training reads.
    """
    return Stage("check", command, inputs, outputs=(), machine_flags=frozenset({"--distributed-backend"}))


def train(
    files: TrainingFiles,
    command: tuple[str, ...],
    inputs: tuple[Path, ...],
    last_checkpoint: Path,
    byproducts: tuple[Path, ...] = (),
    devices: Devices | None = None,
) -> Stage:
    """Train a model, or resume its training.

    Args:
        files: files of the run.
        command: the command that trains.
        inputs: files that the training reads.
        last_checkpoint: folder of the checkpoint that completes the training.
        byproducts: what the training makes besides checkpoints and TensorBoard's events.
        devices: devices of this machine; None if the command itself sets the environment that the devices need.
    """
    return Stage(
        "train",
        command,
        inputs,
        outputs=(last_checkpoint,),
        byproducts=(files.checkpoints, files.tensorboard, *byproducts),
        scratch=(files.dataset_cache,),
        environment=devices.environment if devices else {},
        is_resumable=True,
    )


def evaluate(files: TrainingFiles, processes: int, flags: Flags, inputs: tuple[Path, ...], devices: Devices) -> Stage:
    """Evaluate the newest checkpoint on all held-out text.

    Args:
        files: files of the run.
        processes: number of ranks.
        flags: flags of the layout, the data, the micro-batch size and the token counts.
        inputs: the last checkpoint, the token counts and the files of the dataset.
        devices: devices of this machine.
    """
    words = (
        *("--load", str(files.checkpoints), "--use-checkpoint-args"),
        *flag_words(flags),
        *("--eval-output", str(files.evaluation)),
        *devices.megatron_flags,
    )
    return Stage(
        "evaluate",
        standalone_command(processes, "maskmoe.training.evaluate", words),
        inputs,
        outputs=(files.evaluation,),
        scratch=(files.dataset_cache,),
        environment=devices.environment,
        machine_flags=DEVICE_FLAGS | {"--nproc-per-node", "--expert-model-parallel-size"},
    )


def analyze_routing(
    files: TrainingFiles, iterations: Iterable[int], flags: Flags, inputs: tuple[Path, ...], devices: Devices
) -> Stage:
    """Analyze how the checkpoints of a run route held-out text.

    Args:
        files: files of the run.
        iterations: iterations of the checkpoints.
        flags: flags of the data, the number of tokens and the token counts.
        inputs: the last checkpoint, the token counts and the files of the dataset.
        devices: devices of this machine.
    """
    checkpoints = ("--load", files.checkpoints, "--ckpt-step", *iterations)
    command = maskmoe_command("analyze", *checkpoints, *flag_words(flags), "--output-dir", files.routing)
    return Stage("routing", command, inputs, outputs=(files.routing,), environment=devices.environment)


def thin_checkpoints(files: TrainingFiles, results: tuple[Path, ...]) -> Stage:
    """Remove all checkpoints but the last.

    Args:
        files: files of the run.
        results: what was made from the checkpoints.
    """
    return Stage("thin", maskmoe_command("thin", "--load", files.checkpoints), inputs=results, outputs=())


def export(files: TrainingFiles, last_checkpoint: Path, tokenizer_model: Path) -> Stage:
    """Export the newest checkpoint to the format of transformers.

    Args:
        files: files of the run.
        last_checkpoint: folder of the newest checkpoint.
        tokenizer_model: SentencePiece model, which becomes part of the exported model.
    """
    command = maskmoe_command("convert", "megatron-to-hf", "--load", files.checkpoints, "--save", files.model)
    return Stage("export", command, inputs=(last_checkpoint, tokenizer_model), outputs=(files.model,))


def sample(files: TrainingFiles, prompt: str, num_tokens: int, seed: int) -> Stage:
    """Let the exported model continue a prompt.

    Args:
        files: files of the run.
        prompt: start of the text.
        num_tokens: most tokens that are generated.
        seed: seed of the generation.
    """
    command = maskmoe_command(
        "sample",
        *("--model", files.model),
        f"--prompt={prompt}",  # one word, so that the prompt may begin with a dash
        *("--max-new-tokens", num_tokens),
        *("--seed", seed),
        *("--output", files.sample),
    )
    return Stage("sample", command, inputs=(files.model,), outputs=(files.sample,))
