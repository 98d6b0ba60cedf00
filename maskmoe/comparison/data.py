"""The dataset that all runs of a suite train on, and the stages that make the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.files import TextFiles
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents


@dataclass(frozen=True)
class TextData:
    """A dataset that is made from text, with its tokenizer and its token counts. Its last documents are held out.

    Attributes:
        files: where the stages keep their files.
        text: text files; if empty, the text is the sources and documentation of the installed Python and its packages.
        vocab_size: number of ids of the tokenizer.
        seq_length: tokens in a sample.
        corpus_flags: flags of `maskmoe corpus`, used if `text` is empty.
    """

    files: TextFiles
    text: tuple[Path, ...]
    vocab_size: int
    seq_length: int
    corpus_flags: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages from text to token counts."""
        corpus = () if self.text else (self.corpus,)
        return (*corpus, self.tokenizer, self.dataset, self.frequency)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files of the dataset and the tokenizer."""
        return (*self.files.dataset, self.files.tokenizer_model)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the dataset and of the text."""
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in self.text)]))

    @property
    def flags(self) -> Flags:
        """Flags that name the dataset, the split and the tokenizer."""
        return {
            "data-path": (str(self.files.dataset_prefix),),
            "split": (choose_split(self.files.dataset_prefix, self.seq_length).flag,),
            "tokenizer-type": ("SentencePieceTokenizer",),
            "tokenizer-model": (str(self.files.tokenizer_model),),
        }

    def corpus(self) -> Stage:
        """Collect text of the installed Python and its packages."""
        command = maskmoe_command("corpus", *self.corpus_flags, "--output", self.files.corpus)
        return Stage("corpus", command, inputs=(), outputs=(self.files.corpus,))

    def tokenizer(self) -> Stage:
        """Train a SentencePiece tokenizer on the text."""
        command = maskmoe_command(
            "tokenizer",
            *("--input", *self._text, "--json-keys", self.files.json_key),
            *("--vocab-size", self.vocab_size, "--max-lines", _MAX_TOKENIZER_LINES),
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
            *("--input", *self._text, "--json-keys", self.files.json_key),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.files.tokenizer_model),
            *("--output-prefix", self.files.dataset_stem, "--append-eod", "--shuffle-seed", _SHUFFLE_SEED),
        )
        inputs = (*self._text, self.files.tokenizer_model)
        return Stage("dataset", command, inputs=inputs, outputs=self.files.dataset)

    def frequency(self) -> Stage:
        """Count the tokens of the dataset."""
        files = self.files
        return _count_tokens([str(files.dataset_prefix)], self.vocab_size, files.dataset, files.token_frequency)

    @property
    def _text(self) -> tuple[Path, ...]:
        return self.text or (self.files.corpus,)


@dataclass(frozen=True)
class MissingData:
    """The data of a suite whose text the user must name but has not named. The runs can be listed, but not started."""

    files: TextFiles

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
    """

    files: TextFiles
    flags: Flags
    vocab_size: str

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
        return _count_tokens(self.flags["data-path"], self.vocab_size, self.inputs, self.files.token_frequency)


def _count_tokens(data_path: Sequence[str], vocab_size: int | str, inputs: tuple[Path, ...], output: Path) -> Stage:
    flags = ("--data-path", *data_path, "--vocab-size", vocab_size, "--output", output)
    return Stage("frequency", maskmoe_command("count", *flags), inputs=inputs, outputs=(output,))


Data = TextData | PreparedData | MissingData
"""A dataset with its token counts. The stages that make both form a plan, see `Plan`. Each kind of data has:

- `files`: where the stages keep their files;
- `stages`: makers of the stages that make the dataset;
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
        return PreparedData(files, _flags_of_dataset(flags), vocab_size)
    if flags.get("input") == ("required",):
        return MissingData(files)
    text = tuple(Path(word).absolute() for word in flags.get("input", ()))
    for path in text:
        if not path.is_file():
            raise UserError(f"the text file {path} does not exist; name files by --input")
    corpus_flags = ("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ()
    return TextData(files, text, int(vocab_size), seq_length, corpus_flags)


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
