"""The text that all runs of a suite train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import Stage, StageFiles, tool_command
from maskmoe.workflow.text import TextFiles, TextStages


class Data(Protocol):
    """Where the data come from.

    Attributes:
        files: of the stages that make them.
        stages: makers of those stages.
        token_frequency: the counts.
        inputs: files of the dataset.
        folders: that all must be able to read who take up a run.
    """

    files: StageFiles
    stages: tuple[Callable[[], Stage], ...]
    token_frequency: Path
    inputs: tuple[Path, ...]
    folders: tuple[Path, ...]

    @property
    def flags(self) -> Flags:
        """Of training and evaluation."""


@dataclass(frozen=True)
class TextData:
    """A dataset made from text, its last documents held out."""

    files: TextFiles
    text: TextStages
    seq_length: int

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        return self.text.all

    @property
    def token_frequency(self) -> Path:
        return self.files.token_frequency

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (*self.files.dataset, self.files.tokenizer_model)

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in self.text.input)]))

    @property
    def flags(self) -> Flags:
        return {
            "data-path": (str(self.files.dataset_prefix),),
            "split": (choose_split(self.files.dataset_prefix, self.seq_length).flag,),
            "tokenizer-type": ("SentencePieceTokenizer",),
            "tokenizer-model": (str(self.files.tokenizer_model),),
        }


@dataclass(frozen=True)
class MissingData:
    """The suite wants text of the user's, and there is none: its runs can be shown, no more."""

    files: TextFiles

    @property
    def stages(self) -> NoReturn:
        raise UserError(
            "the suite brings no text: give it by --input FILE…, or a dataset by --data-path PREFIX --split A,B,C "
            "--tokenizer-model FILE"
        )

    token_frequency = inputs = folders = flags = stages


@dataclass(frozen=True)
class PreparedData:
    """A dataset that is there already; its tokens are counted."""

    files: TextFiles
    flags: Flags
    vocab_size: str

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        return (self.frequency,)

    @property
    def token_frequency(self) -> Path:
        return self.files.token_frequency

    @property
    def inputs(self) -> tuple[Path, ...]:
        prefixes = dataset_prefixes(self.flags["data-path"])
        return tuple(Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))

    @property
    def folders(self) -> tuple[Path, ...]:
        paths = (*self.inputs, *map(Path, self.flags["tokenizer-model"]))
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in paths)]))

    def frequency(self) -> Stage:
        command = tool_command(
            "count_token_frequency",
            *("--data-path", *self.flags["data-path"]),
            *("--vocab-size", self.vocab_size),
            *("--output", self.token_frequency),
        )
        return Stage("frequency", command, inputs=self.inputs, outputs=(self.token_frequency,))


def dataset_prefixes(words: Sequence[str]) -> list[str]:
    """The datasets of Megatron's `--data-path`, in which each may have its weight before it."""
    return [word for word in words if not word.replace(".", "", 1).isdecimal()]


def open_data(flags: Flags, folder: Path, seq_length: int) -> Data:
    """The data that a suite's `data` describes.

    Args:
        flags: `data-path`, with `split`, `tokenizer-model` and `tokenizer-type`, for a dataset that is there; else
            `input`, text files, or `max-bytes` of the installed Python's text. And `vocab-size`. `input: required`
            stands for text that the command line must name.
        folder: for what is made.
        seq_length: of samples.

    Raises:
        UserError: something is missing.
    """
    files = TextFiles(folder)
    if "vocab-size" not in flags:
        raise UserError("the suite's data need a vocab-size")
    vocab_size = flags["vocab-size"][0]
    if "data-path" in flags:
        if missing := [name for name in ("split", "tokenizer-model") if name not in flags]:
            raise UserError(f"a dataset given by data-path needs {' and '.join(missing)}, too")
        used = ("data-path", "split", "tokenizer-model", "tokenizer-type")
        given = {name: flags[name] for name in used if name in flags}
        prefixes = dataset_prefixes(flags["data-path"])
        given["data-path"] = tuple(str(Path(w).absolute()) if w in prefixes else w for w in flags["data-path"])
        given["tokenizer-model"] = tuple(str(Path(word).absolute()) for word in flags["tokenizer-model"])
        return PreparedData(files, {"tokenizer-type": ("SentencePieceTokenizer",), **given}, vocab_size)
    if flags.get("input") == ("required",):
        return MissingData(files)
    input = tuple(Path(word).absolute() for word in flags.get("input", ()))
    for path in input:
        if not path.is_file():
            raise UserError(f"there is no text file {path}")
    corpus_flags = ("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ()
    return TextData(files, TextStages(files, input, int(vocab_size), corpus_flags), seq_length)
