"""The dataset that all runs of a suite train on, and the stages that make the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.split import choose_split
from maskmoe.workflow.stage import Stage, StageMaker, maskmoe_command

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents
_ALL_VALIDATION = "0,1,0"


@dataclass(frozen=True)
class HeldOutSet:
    """A further dataset that models are evaluated on, with the tokenizer of the training text.

    Attributes:
        name: name in file names.
        data: where the stages of the data keep their files.
    """

    name: str
    data: StageFiles

    @property
    def text(self) -> Path:
        """Text of the set, as JSON lines."""
        return self.data.held_out_corpus(self.name)

    @property
    def dataset(self) -> tuple[Path, ...]:
        """Files of the dataset."""
        return tuple(dataset_files(self.data.held_out_prefix(self.name)))

    @property
    def flags(self) -> Flags:
        """Flags of an evaluation on all documents of the set."""
        return {
            "data-path": (str(self.data.held_out_prefix(self.name)),),
            "split": (_ALL_VALIDATION,),
            "tokenizer-type": ("SentencePieceTokenizer",),
            "tokenizer-model": (str(self.data.tokenizer_model),),
        }


@dataclass(frozen=True)
class Dataset:
    """A dataset with its token counts, which exists already or is made from text.

    Attributes:
        files: where the stages keep their files.
        vocab_size: number of ids of the tokenizer.
        existing: flags of training and evaluation that name a dataset that exists already. None for a dataset that is
            made from text together with its tokenizer, and whose last documents are held out.
        text: text files; if empty, `maskmoe corpus` collects the text.
        seq_length: tokens in a sample.
        corpus_flags: flags of `maskmoe corpus`, used if `text` is empty.
        held_out: further held-out sets, whose texts `maskmoe corpus` collects, too.
    """

    files: StageFiles
    vocab_size: str
    existing: Flags | None
    text: tuple[Path, ...]
    seq_length: int
    corpus_flags: tuple[str, ...] = ()
    held_out: tuple[HeldOutSet, ...] = ()

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages from text to token counts, or only of the stage that counts tokens."""
        if self.existing:
            return (self.frequency,)
        corpus = () if self.text else (self.corpus,)
        held_out = (partial(self.held_out_dataset, each) for each in self.held_out)
        return (*corpus, self.tokenizer, self.dataset, *held_out, self.frequency)

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

    def token_files(self) -> dict[str, list[Path]]:
        """Return all files that determine the tokens, by what the files are.

        The keys are `tokenizer`, `dataset.bin` and `dataset.idx`, and `NAME.bin` and `NAME.idx` for each further
        held-out set. A blend has several files for a key. A tokenizer that is only a name has none.
        """
        tokenizer = [Path(word) for word in self.flags["tokenizer-model"]]
        files = {"tokenizer": [file for path in tokenizer for file in _files_in(path)]}
        datasets = {"dataset": self._dataset_files} | {each.name: each.dataset for each in self.held_out}
        for name, paths in datasets.items():
            files |= {f"{name}{end}": [path for path in paths if path.suffix == end] for end in (".bin", ".idx")}
        return files

    def corpus(self) -> Stage:
        """Collect the text of the installed Python, or of pinned packages, and of the further held-out sets."""
        command = maskmoe_command("corpus", *self.corpus_flags, "--output", self.files.corpus)
        outputs = (self.files.corpus, *(each.text for each in self.held_out))
        return Stage("corpus", command, inputs=(), outputs=outputs, machine_flags=frozenset({"--packages"}))

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

    def held_out_dataset(self, held_out: HeldOutSet) -> Stage:
        """Encode the text of a further held-out set into a dataset."""
        command = maskmoe_command(
            "preprocess",
            *("--input", held_out.text, "--json-keys", self.files.json_key),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.files.tokenizer_model),
            *("--output-prefix", self.files.held_out_stem(held_out.name), "--append-eod"),
        )
        inputs = (held_out.text, self.files.tokenizer_model)
        return Stage(f"dataset-{held_out.name}", command, inputs=inputs, outputs=held_out.dataset)

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
    held_out: tuple[HeldOutSet, ...] = ()

    @property
    def stages(self) -> NoReturn:
        """Raise a UserError that asks for the text."""
        raise UserError(
            "the suite brings no text: name text files by --input FILE…, or a dataset by --data-path PREFIX "
            "--split A,B,C --tokenizer-model FILE"
        )

    inputs = folders = flags = stages

    def token_files(self) -> NoReturn:
        """Raise a UserError that asks for the text."""
        return self.stages


Data = Dataset | MissingData
"""A dataset with its token counts. The stages that make both form a plan, see `Plan`. Each kind of data has:

- `files`: where the stages keep their files;
- `stages`: makers of the stages that make the dataset;
- `inputs`: files of the dataset;
- `folders`: folders that every process of a run must be able to read;
- `flags`: flags of training and evaluation that name the dataset;
- `held_out`: further held-out sets;
- `token_files()`: the files that determine the tokens.
"""


def dataset_prefixes(words: Sequence[str]) -> list[str]:
    """Return the datasets of Megatron's `--data-path`, without the weights that may precede them."""
    return [word for word in words if not word.replace(".", "", 1).isdecimal()]


def open_data(flags: Flags, folder: Path, seq_length: int) -> Data:
    """Return the data that the section `data` of a suite describes.

    Args:
        flags: the section's flags. `data-path`, with `split`, `tokenizer-model` and `tokenizer-type`, names an existing
            dataset; otherwise `input` names text files, or `sources` describes the text of pinned packages, whose
            wheels are in the folder `packages`, or `max-bytes` limits the text of the installed Python. `vocab-size`
            is always needed. `input: required` asks for text on the command line.
        folder: folder of the files that are made.
        seq_length: tokens in a sample.

    Raises:
        UserError: a flag or a text file is missing, or the description of the sources cannot be used.
    """
    files = StageFiles(folder)
    if "vocab-size" not in flags:
        raise UserError("the suite's section `data` needs vocab-size")
    if "packages" in flags and "sources" not in flags:
        raise UserError("--packages names the folder of wheels, but the section `data` of the suite has no sources")
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
    dataset = Dataset(files, flags["vocab-size"][0], existing, text, seq_length)
    if existing or text:
        return dataset
    if "sources" in flags:
        raise UserError("the text of packages is made by tools/studies/laptop_text.py; name its files by --input")
    return replace(dataset, corpus_flags=("--max-bytes", *flags["max-bytes"]) if "max-bytes" in flags else ())


def _files_in(path: Path) -> list[Path]:
    """Return a file, or the files of a folder by name; nothing for a name without a file."""
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.is_file())
    return [path] if path.exists() else []


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
