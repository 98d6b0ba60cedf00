"""The stages that turn text into a dataset with its tokenizer and token counts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskmoe.workflow.stage import Stage, StageFiles, tool_command

_MAX_TOKENIZER_LINES = 1_000_000


@dataclass(frozen=True)
class TextFiles(StageFiles):
    """Where the files made from text are.

    Attributes:
        json_key: names the dataset's files, as in tools/preprocess_data.py.
    """

    json_key: str = "text"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer_prefix(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def dataset_stem(self) -> Path:
        return self.folder / "dataset"

    @property
    def dataset_prefix(self) -> Path:
        return self.folder / f"dataset_{self.json_key}_document"

    @property
    def dataset(self) -> tuple[Path, ...]:
        return tuple(Path(f"{self.dataset_prefix}{suffix}") for suffix in (".bin", ".idx", ".tokenizer.json"))

    @property
    def token_frequency(self) -> Path:
        return self.folder / "token_frequency.safetensors"


@dataclass(frozen=True)
class TextStages:
    """Makers of the stages.

    Attributes:
        files: where everything is.
        input: text files; none: sources and documentation of the installed Python and its packages.
        vocab_size: ids of the tokenizer.
        corpus_flags: of tools/make_corpus.py, if there is no input.
    """

    files: TextFiles
    input: tuple[Path, ...]
    vocab_size: int
    corpus_flags: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Callable[[], Stage], ...]:
        """In order."""
        return (*(() if self.input else (self.corpus,)), self.tokenizer, self.dataset, self.frequency)

    def corpus(self) -> Stage:
        command = tool_command("make_corpus", *self.corpus_flags, "--output", self.files.corpus)
        return Stage("corpus", command, inputs=(), outputs=(self.files.corpus,))

    def tokenizer(self) -> Stage:
        command = tool_command(
            "train_tokenizer",
            *("--input", *self._text),
            *("--json-keys", self.files.json_key),
            *("--vocab-size", self.vocab_size),
            *("--max-lines", _MAX_TOKENIZER_LINES),
            *("--output-prefix", self.files.tokenizer_prefix),
        )
        vocabulary = Path(f"{self.files.tokenizer_prefix}.vocab")
        return Stage("tokenizer", command, inputs=self._text, outputs=(self.files.tokenizer_model, vocabulary))

    def dataset(self) -> Stage:
        command = tool_command(
            "preprocess_data",
            *("--input", *self._text),
            *("--json-keys", self.files.json_key),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.files.tokenizer_model),
            *("--output-prefix", self.files.dataset_stem),
            "--append-eod",
        )
        inputs = (*self._text, self.files.tokenizer_model)
        return Stage("dataset", command, inputs=inputs, outputs=self.files.dataset)

    def frequency(self) -> Stage:
        command = tool_command(
            "count_token_frequency",
            *("--data-path", self.files.dataset_prefix),
            *("--vocab-size", self.vocab_size),
            *("--output", self.files.token_frequency),
        )
        return Stage("frequency", command, inputs=self.files.dataset, outputs=(self.files.token_frequency,))

    @property
    def _text(self) -> tuple[Path, ...]:
        return self.input or (self.files.corpus,)
