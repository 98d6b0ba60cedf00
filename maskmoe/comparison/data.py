"""The dataset that all runs of a suite train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.files import TextFiles
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import Stage, StageMaker
from maskmoe.workflow.stages import TextStages, count_tokens


@dataclass(frozen=True)
class TextData:
    """A dataset that is made from text. Its last documents are held out.

    Attributes:
        files: where the stages keep their files.
        text: the stages.
        seq_length: tokens in a sample.
    """

    files: TextFiles
    text: TextStages
    seq_length: int

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages from text to token counts."""
        return self.text.all

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files of the dataset and the tokenizer."""
        return (*self.files.dataset, self.files.tokenizer_model)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the dataset and of the text."""
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in self.text.input)]))

    @property
    def flags(self) -> Flags:
        """Flags that name the dataset, the split and the tokenizer."""
        return {
            "data-path": (str(self.files.dataset_prefix),),
            "split": (choose_split(self.files.dataset_prefix, self.seq_length).flag,),
            "tokenizer-type": ("SentencePieceTokenizer",),
            "tokenizer-model": (str(self.files.tokenizer_model),),
        }


@dataclass(frozen=True)
class MissingData:
    """The data of a suite whose text the user must name but has not named. The runs can be listed, but not started."""

    files: TextFiles
    seq_length: int

    @property
    def stages(self) -> NoReturn:
        """Raise a UserError that asks for the text."""
        raise UserError(
            "the suite brings no text: name text files by --input FILE…, or a dataset by --data-path PREFIX "
            "--split A,B,C --tokenizer-model FILE"
        )

    inputs = folders = flags = stages


@dataclass(frozen=True)
class PreparedData:
    """A dataset that exists already. Only its tokens are counted.

    Attributes:
        files: where the stages keep their files.
        flags: flags of training and evaluation that name the dataset.
        vocab_size: number of ids of the tokenizer.
        seq_length: tokens in a sample.
    """

    files: TextFiles
    flags: Flags
    vocab_size: str
    seq_length: int

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Maker of the one stage, which counts tokens."""
        return (self.frequency,)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files of the dataset."""
        prefixes = dataset_prefixes(self.flags["data-path"])
        return tuple(Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the dataset, the tokenizer and the counts."""
        paths = (*self.inputs, *map(Path, self.flags["tokenizer-model"]))
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in paths)]))

    def frequency(self) -> Stage:
        """Count the tokens of the dataset."""
        return count_tokens(self.flags["data-path"], self.vocab_size, self.inputs, self.files.token_frequency)


Data = TextData | PreparedData | MissingData
"""A dataset with its token counts. The stages that make both form a plan, see `Plan`. Each kind of data has:

- `files`: where the stages keep their files;
- `stages`: makers of the stages that make the dataset;
- `seq_length`: tokens in a sample;
- `inputs`: files of the dataset;
- `folders`: folders that every process of a run must be able to read;
- `flags`: flags of training and evaluation that name the dataset.
"""


def dataset_prefixes(words: Sequence[str]) -> list[str]:
    """Return the datasets of Megatron's `--data-path`, without the weights that may precede them."""
    return [word for word in words if not word.replace(".", "", 1).isdecimal()]


def open_data(flags: Flags, folder: Path, seq_length: int) -> Data:
    """Return the data that the section `data` of a suite describes.

    Args:
        flags: the section's flags. `data-path`, with `split`, `tokenizer-model` and `tokenizer-type`, names an existing
            dataset; otherwise `input` names text files, or `max-bytes` limits the text of the installed Python.
            `vocab-size` is always needed. `input: required` asks for text on the command line.
        folder: folder of the files that are made.
        seq_length: tokens in a sample.

    Raises:
        UserError: a flag or a text file is missing.
    """
    files = TextFiles(folder)
    if "vocab-size" not in flags:
        raise UserError("the suite's section `data` needs vocab-size")
    vocab_size = flags["vocab-size"][0]
    if "data-path" in flags:
        return PreparedData(files, _flags_of_dataset(flags), vocab_size, seq_length)
    if flags.get("input") == ("required",):
        return MissingData(files, seq_length)
    text = tuple(Path(word).absolute() for word in flags.get("input", ()))
    for path in text:
        if not path.is_file():
            raise UserError(f"the text file {path} does not exist; name files by --input")
    corpus_flags = ("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ()
    return TextData(files, TextStages(files, text, int(vocab_size), corpus_flags), seq_length)


def _flags_of_dataset(flags: Flags) -> Flags:
    """Return the flags that name an existing dataset, with absolute paths."""
    if missing := [name for name in ("split", "tokenizer-model") if name not in flags]:
        raise UserError(f"a dataset given by data-path also needs {' and '.join(missing)}")
    names = ("data-path", "split", "tokenizer-model", "tokenizer-type")
    given = {name: flags[name] for name in names if name in flags}
    prefixes = dataset_prefixes(flags["data-path"])
    given["data-path"] = tuple(str(Path(word).absolute()) if word in prefixes else word for word in flags["data-path"])
    given["tokenizer-model"] = tuple(str(Path(word).absolute()) for word in flags["tokenizer-model"])
    return {"tokenizer-type": ("SentencePieceTokenizer",), **given}
