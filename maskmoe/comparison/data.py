"""The dataset that all runs of a suite train on, and the steps that make it from text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maskmoe.comparison.steps import Step, maskmoe_command
from maskmoe.comparison.suite import DataSection
from maskmoe.data.data_path import parse_data_path
from maskmoe.data.indexed_dataset import dataset_files, read_index
from maskmoe.errors import UserError
from maskmoe.launch.model_file import Flags
from maskmoe.routing_mask.frequency import TokenFrequency

_MAX_TOKENIZER_LINES = 1_000_000
_SHUFFLE_SEED = 0  # belongs to the text: all runs, whatever their seeds, hold out the same documents
_ALL_VALIDATION = "0,1,0"
_FLAGS_OF_DATASET = {"data-path", "split", "tokenizer-type", "tokenizer-model"}
_HELD_OUT_SHARE = 0.02
_MAX_HELD_OUT_TOKENS = 200_000


@dataclass(frozen=True)
class Dataset:
    """A dataset with its token counts, which exists already or is made from text in a folder.

    Attributes:
        folder: Folder of the files that are made.
        vocab_size: Number of ids of the tokenizer.
        seq_length: Tokens in a sample.
        text: Text files.
        held_out: Further text files to evaluate on, by name.
        existing: Flags that name a dataset that exists already; empty if it is made from text with its tokenizer.
    """

    folder: Path
    vocab_size: str
    seq_length: int
    text: tuple[Path, ...] = ()
    held_out: dict[str, Path] = field(default_factory=dict)
    existing: Flags = field(default_factory=dict)

    @classmethod
    def of(cls, section: DataSection, folder: Path, seq_length: int) -> "Dataset":
        """Return the dataset that the section `data` of a suite describes.

        Raises:
            UserError: A flag of an existing dataset is missing.
        """
        if section.flags and (missing := _FLAGS_OF_DATASET - section.flags.keys()):
            raise UserError(f"the flags of the suite's dataset lack {', '.join(sorted(missing))}")
        held_out = {name: Path(path) for name, path in section.held_out.items()}
        text = tuple(map(Path, section.input))
        return cls(folder, section.vocab_size, seq_length, text, held_out, section.flags)

    def check(self) -> None:
        """Raise UserError if neither the suite nor the command line names a text."""
        if not (self.text or self.existing):
            raise UserError(
                "the suite names no text: name text files by --input FILE…, or write a suite that `extends` this one "
                "with its own `data`"
            )

    @property
    def tokenizer_model(self) -> Path:
        """The SentencePiece model that is trained on the text, or the existing dataset's tokenizer."""
        return Path(self.existing["tokenizer-model"][0] if self.existing else self.folder / "tokenizer.model")

    @property
    def prefix(self) -> Path:
        """Value of Megatron's `--data-path` for the dataset that is made from text."""
        return self.folder / "dataset_text_document"

    @property
    def token_frequency(self) -> Path:
        """Token counts of the dataset."""
        return self.folder / "token_frequency.safetensors"

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
        prefix = f"{self.folder / name}_text_document"
        return {"data-path": (prefix,), "split": (_ALL_VALIDATION,), **self._tokenizer_flags}

    @property
    def settings(self) -> dict[str, object]:
        """Settings of the folder's files; an input counts as changed with its size or modification time."""
        prefixes = parse_data_path(self.existing["data-path"])[0] if self.existing else ()
        files = [*self.text, *self.held_out.values(), *(file for each in prefixes for file in dataset_files(each))]
        existing = {flag: [*words] for flag, words in self.existing.items()}
        return {
            "vocab-size": self.vocab_size,
            "existing": existing,
            "files": {str(each): _version(each) for each in files},
        }

    def steps(self) -> tuple[Step, ...]:
        """Return the steps from text to token counts, or only the one that counts the tokens of an existing dataset."""
        steps = []
        if not self.existing:
            options = ("--vocab-size", self.vocab_size, "--max-lines", _MAX_TOKENIZER_LINES)
            output = ("--output-prefix", self.folder / "tokenizer")
            steps.append(_step("tokenizer", self.tokenizer_model, "--input", *self.text, *options, *output))
            # The last documents are held out. Shuffled documents make the held-out text resemble the training text.
            steps.append(self._preprocess("dataset", self.text, "--shuffle-seed", _SHUFFLE_SEED))
        steps += (self._preprocess(name, (path,)) for name, path in self.held_out.items())
        data_path = self.existing["data-path"] if self.existing else (self.prefix,)
        flags = ("--data-path", *data_path, "--vocab-size", self.vocab_size, "--output", self.token_frequency)
        return (*steps, _step("count", self.token_frequency, *flags))

    def _preprocess(self, name: str, text: Sequence[Path], *options: object) -> Step:
        """Return the step that encodes text into the dataset `name`."""
        tokenizer = ("--tokenizer-type", *self._tokenizer_flags["tokenizer-type"])
        tokenizer += ("--tokenizer-model", str(self.tokenizer_model))
        words = ("--input", *text, *tokenizer, "--output-prefix", self.folder / name, "--append-eod", *options)
        command = maskmoe_command("preprocess", *words, "--force")
        return Step(name, command, Path(f"{self.folder / name}_text_document.idx"))

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


def _step(subcommand: str, result: Path, *words: object) -> Step:
    return Step(subcommand, maskmoe_command(subcommand, *words, "--force"), result)


def _version(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
