"""The dataset that all runs of a suite train on, and the stages that make the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents


@dataclass(frozen=True)
class Dataset:
    """A dataset with its token counts, which exists already or is made from text.

    Attributes:
        files: where the stages keep their files.
        vocab_size: number of ids of the tokenizer.
        existing: flags of training and evaluation that name a dataset that exists already. None for a dataset that is
            made from text together with its tokenizer, and whose last documents are held out.
        text: text files; if empty, the text is the sources and documentation of the installed Python and its packages.
        seq_length: tokens in a sample.
        corpus_flags: flags of `maskmoe corpus`, used if `text` is empty.
    """

    files: StageFiles
    vocab_size: str
    existing: Flags | None
    text: tuple[Path, ...]
    seq_length: int
    corpus_flags: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages from text to token counts, or only of the stage that counts tokens."""
        if self.existing:
            return (self.frequency,)
        corpus = () if self.text else (self.corpus,)
        return (*corpus, self.tokenizer, self.dataset, self.frequency)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files of the dataset, and of the tokenizer if the stages make the tokenizer."""
        return self._dataset_files if self.existing else (*self._dataset_files, self.files.tokenizer_model)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the dataset, the tokenizer, the counts and the text."""
        tokenizer = map(Path, self.existing["tokenizer-model"]) if self.existing else ()
        paths = (*self.text, *self.inputs, *tokenizer)
        return tuple(dict.fromkeys([self.files.folder, *(path.parent for path in paths)]))

    @property
    def flags(self) -> Flags:
        """Flags that name the dataset, the split and the tokenizer."""
        return self.existing or {
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
        data_path = self.existing["data-path"] if self.existing else (self.files.dataset_prefix,)
        output = self.files.token_frequency
        flags = ("--data-path", *data_path, "--vocab-size", self.vocab_size, "--output", output)
        return Stage("frequency", maskmoe_command("count", *flags), inputs=self._dataset_files, outputs=(output,))

    @property
    def _text(self) -> tuple[Path, ...]:
        return self.text or (self.files.corpus,)

    @property
    def _dataset_files(self) -> tuple[Path, ...]:
        if self.existing is None:
            return self.files.dataset
        prefixes = dataset_prefixes(self.existing["data-path"])
        return tuple(Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in (".bin", ".idx"))


@dataclass(frozen=True)
class MissingData:
    """The data of a suite whose text the user must name but has not named. The runs can be listed, but not started."""

    files: StageFiles

    @property
    def stages(self) -> NoReturn:
        """Raise a UserError that asks for the text."""
        raise UserError(
            "the suite brings no text: name text files by --input FILE…, or a dataset by --data-path PREFIX "
            "--split A,B,C --tokenizer-model FILE"
        )

    inputs = folders = flags = stages


Data = Dataset | MissingData
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
    files = StageFiles(folder)
    if "vocab-size" not in flags:
        raise UserError("the suite's section `data` needs vocab-size")
    existing, text = None, ()
    if "data-path" in flags:
        existing = _flags_of_dataset(flags)
    elif flags.get("input") == ("required",):
        return MissingData(files)
    else:
        text = tuple(Path(word).absolute() for word in flags.get("input", ()))
    for path in text:
        if not path.is_file():
            raise UserError(f"the text file {path} does not exist; name files by --input")
    corpus_flags = ("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ()
    return Dataset(files, flags["vocab-size"][0], existing, text, seq_length, corpus_flags)


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
