"""The dataset that all runs of a suite train on, and the stages that make it from text."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from maskmoe.comparison.stage import Stage, maskmoe_command
from maskmoe.comparison.suite import REQUIRED, DataSection
from maskmoe.data.documents import read_documents
from maskmoe.data.indexed_dataset import dataset_files, parse_data_path, read_index
from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.routing_mask.frequency import TokenFrequency

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents
_ALL_VALIDATION = "0,1,0"
_HELD_OUT_SHARE = 0.02
_MAX_HELD_OUT_TOKENS = 200_000


@dataclass(frozen=True)
class Dataset:
    """A dataset with its token counts, which exists already or is made from text in a folder.

    Attributes:
        folder: Folder of the files that are made.
        vocab_size: Number of ids of the tokenizer.
        seq_length: Tokens in a sample.
        text: Text files; if empty, `maskmoe corpus` collects the text of the installed Python.
        json_key: Key of the text in JSON lines.
        held_out: Further text files to evaluate on, by name.
        existing: Flags that name a dataset that exists already; empty if it is made from text with its tokenizer.
    """

    folder: Path
    vocab_size: str
    seq_length: int
    text: tuple[Path, ...] = ()
    json_key: str = "text"
    held_out: dict[str, Path] = field(default_factory=dict)
    existing: Flags = field(default_factory=dict)

    @classmethod
    def of(cls, section: DataSection, folder: Path, seq_length: int) -> "Dataset":
        """Return the dataset that the section `data` of a suite describes.

        Raises:
            UserError: A value is missing.
        """
        if not section.vocab_size.isdecimal():
            raise UserError("the suite's section `data` needs vocab-size, the number of ids of the tokenizer")
        if section.data_path and not (section.split and section.tokenizer_model):
            raise UserError("a dataset given by data-path also needs split and tokenizer-model")
        names = ("data_path", "split", "tokenizer_type", "tokenizer_model") if section.data_path else ()
        values = {name.replace("_", "-"): getattr(section, name) for name in names}
        existing = {flag: value if isinstance(value, tuple) else (value,) for flag, value in values.items()}
        text = () if existing else tuple(map(Path, section.input))
        held_out = {name: Path(path) for name, path in section.held_out.items()}
        return cls(folder, section.vocab_size, seq_length, text, "text", held_out, existing)

    def check(self) -> None:
        """Check the text files, which only training needs.

        Raises:
            UserError: A path is no file, the text is a single document, or the suite leaves the text to the command
                line, which names none.
        """
        if self.text == (Path(REQUIRED),):
            raise UserError(
                "the suite brings no text: name text files by --input FILE…, or a dataset by --data-path PREFIX "
                "--split A,B,C --tokenizer-model FILE"
            )
        for path in (*self.text, *self.held_out.values()):
            if not path.exists():
                raise UserError(f"the text file {path} does not exist")
            if path.is_dir():
                raise UserError(f"the text file {path} is a folder: name its files")
            if not path.is_file():
                raise UserError(f"the text file {path} is a pipe or a device, but is read several times: name a file")
        if self.text and len([*islice(read_documents(self.text, self.json_key), 2)]) < 2:
            raise UserError(
                "the input is a single document, but training and evaluation need one document each: give several "
                "files, JSON lines with one document each, or a text file above 1 MB"
            )

    @property
    def corpus(self) -> Path:
        """Text of the installed Python, as JSON lines."""
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer_prefix(self) -> Path:
        """Common start of the names of the files of the tokenizer that is trained on the text."""
        return self.folder / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        """The SentencePiece model that is trained on the text, or the existing dataset's tokenizer."""
        return Path(self.existing["tokenizer-model"][0] if self.existing else f"{self.tokenizer_prefix}.model")

    @property
    def prefix(self) -> Path:
        """Value of Megatron's `--data-path` for the dataset that is made from text."""
        return self.folder / f"dataset_{self.json_key}_document"

    @property
    def token_frequency(self) -> Path:
        """Token counts of the dataset."""
        return self.folder / "token_frequency.safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the dataset and its tokenizer."""
        prefixes = parse_data_path(self.existing["data-path"])[0] if self.existing else [self.prefix]
        return (*(path for prefix in prefixes for path in dataset_files(Path(prefix))), self.tokenizer_model)

    @property
    def flags(self) -> Flags:
        """Flags that name the dataset, the split and the tokenizer. The dataset must exist."""
        if self.existing:
            return self.existing
        split = choose_split(self.prefix, self.seq_length)
        return {"data-path": (str(self.prefix),), "split": (split,), **self._tokenizer_flags}

    @property
    def _tokenizer_flags(self) -> Flags:
        if self.existing:
            return {flag: self.existing[flag] for flag in ("tokenizer-type", "tokenizer-model")}
        return {"tokenizer-type": ("SentencePieceTokenizer",), "tokenizer-model": (str(self.tokenizer_model),)}

    def held_out_flags(self, name: str) -> Flags:
        """Return the flags of an evaluation on all documents of a further held-out text."""
        prefix = f"{self.folder / name}_{self.json_key}_document"
        return {"data-path": (prefix,), "split": (_ALL_VALIDATION,), **self._tokenizer_flags}

    def stages(self) -> Iterator[Stage]:
        """Yield the stages from text to token counts, or only the one that counts the tokens of an existing dataset."""
        text = self.text or (self.corpus,)
        if not self.existing:
            if not self.text:
                yield Stage("corpus", maskmoe_command("corpus", "--output", self.corpus), (self.corpus,))
            yield self._tokenizer_stage(text)
            # The last documents are held out. Shuffled documents make the held-out text resemble the training text.
            yield self._preprocess("dataset", text, ("--shuffle-seed", _SHUFFLE_SEED))
        for name, path in self.held_out.items():
            yield self._preprocess(name, (path,))
        data_path = self.existing["data-path"] if self.existing else (self.prefix,)
        flags = ("--data-path", *data_path, "--vocab-size", self.vocab_size, "--output", self.token_frequency)
        yield Stage("frequency", maskmoe_command("count", *flags), (self.token_frequency,), self.files)

    def _tokenizer_stage(self, text: Sequence[Path]) -> Stage:
        command = maskmoe_command(
            *("tokenizer", "--input", *text, "--json-keys", self.json_key, "--vocab-size", self.vocab_size),
            *("--max-lines", _MAX_TOKENIZER_LINES, "--output-prefix", self.tokenizer_prefix),
        )
        return Stage("tokenizer", command, (self.tokenizer_model, Path(f"{self.tokenizer_prefix}.vocab")), tuple(text))

    def _preprocess(self, name: str, text: Sequence[Path], options: Sequence[object] = ()) -> Stage:
        """Return the stage that encodes text into the dataset `name`."""
        command = maskmoe_command(
            *("preprocess", "--input", *text, "--json-keys", self.json_key),
            *("--tokenizer-type", *self._tokenizer_flags["tokenizer-type"], "--tokenizer-model", self.tokenizer_model),
            *("--output-prefix", self.folder / name, "--append-eod", *options),
        )
        results = tuple(dataset_files(self.folder / f"{name}_{self.json_key}_document"))
        return Stage(name, command, results, (*text, self.tokenizer_model))

    @property
    def names_of_digests(self) -> set[str]:
        """The names of what identifies the text, see `digests`."""
        return {"training", *(("training split",) if self.existing else ()), *self.held_out}

    def digests(self) -> dict[str, str] | None:
        """Return what identifies the text; None until the dataset and all further texts are made.

        These are the digest of the token counts, the split of an existing dataset, and the digest of each further text.
        """
        indexes = {name: Path(f"{self.held_out_flags(name)['data-path'][0]}.idx") for name in self.held_out}
        if not all(path.exists() for path in (self.token_frequency, *indexes.values())):
            return None
        split = {"training split": self.existing["split"][0]} if self.existing else {}
        held_out = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in indexes.items()}
        return {"training": TokenFrequency.load(self.token_frequency).digest, **split, **held_out}


def choose_split(dataset_prefix: Path, seq_length: int) -> str:
    """Return the value of Megatron's `--split`, which counts documents, that holds out the last documents.

    About 2 % of the tokens are held out, at least one sample and at most what a short evaluation needs.

    Raises:
        UserError: The dataset has too few documents or tokens for both parts.
    """
    boundaries = read_index(dataset_prefix).document_boundaries
    num_documents, num_tokens = len(boundaries) - 1, int(boundaries[-1])
    sample = seq_length + 1
    for wanted in (max(sample, min(int(_HELD_OUT_SHARE * num_tokens), _MAX_HELD_OUT_TOKENS)), sample):
        # Hold out as few documents as have the wanted number of tokens.
        train_documents = int(np.searchsorted(boundaries, num_tokens - wanted, side="right")) - 1
        if train_documents > 0 and boundaries[train_documents] >= sample:
            return f"{train_documents},{num_documents - train_documents},0"
    raise UserError(
        f"the input's {num_tokens} tokens in {num_documents} documents are too few to train and to evaluate on "
        f"samples of --seq-length {seq_length}: give more or smaller documents, or a smaller --seq-length"
    )
