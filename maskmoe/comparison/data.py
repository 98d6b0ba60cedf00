"""The dataset that all runs of a suite train on."""

from collections.abc import Callable, Iterable, Sequence
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
class Dataset:
    """A dataset with its token counts. The stages that make both form a plan, see `Plan`.

    Attributes:
        files: where the stages keep their files.
        seq_length: tokens in a sample.
        stages: makers of the stages that make the dataset.
        inputs: files of the dataset.
        folders: folders that every process of a run must be able to read.
        make_flags: returns `flags`.
    """

    files: TextFiles
    seq_length: int
    stages: tuple[StageMaker, ...]
    inputs: tuple[Path, ...]
    folders: tuple[Path, ...]
    make_flags: Callable[[], Flags]

    @property
    def flags(self) -> Flags:
        """Flags of training and evaluation that name the dataset, which must exist already."""
        return self.make_flags()


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


Data = Dataset | MissingData


def text_data(files: TextFiles, text: TextStages, seq_length: int) -> Dataset:
    """Return a dataset that is made from text. Its last documents are held out.

    Args:
        files: where the stages keep their files.
        text: the stages from text to token counts.
        seq_length: tokens in a sample.
    """

    def flags() -> Flags:
        return {
            "data-path": (str(files.dataset_prefix),),
            "split": (choose_split(files.dataset_prefix, seq_length).flag,),
            "tokenizer-type": ("SentencePieceTokenizer",),
            "tokenizer-model": (str(files.tokenizer_model),),
        }

    inputs = (*files.dataset, files.tokenizer_model)
    return Dataset(files, seq_length, text.all, inputs, _folders(files, text.input), flags)


def prepared_data(files: TextFiles, flags: Flags, seq_length: int) -> Dataset:
    """Return a dataset that exists already. Only its tokens are counted.

    Args:
        files: where the stages keep their files.
        flags: flags that name the dataset, and `vocab-size`.
        seq_length: tokens in a sample.

    Raises:
        UserError: a flag is missing.
    """
    if missing := [name for name in ("split", "tokenizer-model") if name not in flags]:
        raise UserError(f"a dataset given by data-path also needs {' and '.join(missing)}")
    # Stages run in any folder, so all paths are absolute.
    prefixes, tokenizer = dataset_prefixes(flags["data-path"]), flags["tokenizer-model"]
    absolute = {word: str(Path(word).absolute()) for word in (*prefixes, *tokenizer)}
    given = {"tokenizer-type": ("SentencePieceTokenizer",), **flags}
    names = ("tokenizer-type", "data-path", "split", "tokenizer-model")
    named = {name: tuple(absolute.get(word, word) for word in given[name]) for name in names}
    inputs = tuple(Path(f"{absolute[prefix]}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))

    def frequency() -> Stage:
        return count_tokens(named["data-path"], flags["vocab-size"][0], inputs, files.token_frequency)

    folders = _folders(files, (*inputs, *map(Path, named["tokenizer-model"])))
    return Dataset(files, seq_length, (frequency,), inputs, folders, lambda: named)


def _folders(files: TextFiles, paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys([files.folder, *(path.parent for path in paths)]))


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
    if "data-path" in flags:
        return prepared_data(files, flags, seq_length)
    if flags.get("input") == ("required",):
        return MissingData(files, seq_length)
    text = tuple(Path(word).absolute() for word in flags.get("input", ()))
    for path in text:
        if not path.is_file():
            raise UserError(f"the text file {path} does not exist; name files by --input")
    corpus_flags = ("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ()
    return text_data(files, TextStages(files, text, int(flags["vocab-size"][0]), corpus_flags), seq_length)
