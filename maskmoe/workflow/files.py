"""Where the stages of a folder keep their files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageFiles:
    """The files that every folder of stages has.

    Attributes:
        folder: the folder.
    """

    folder: Path

    @property
    def commands(self) -> Path:
        """Shell script with the commands of all stages."""
        return self.folder / "commands.sh"

    @property
    def record(self) -> Path:
        """Record of the started and finished stages, see `RunRecord`."""
        return self.folder / "stages.json"

    @property
    def lock(self) -> Path:
        """Lock file, see `locked`."""
        return self.folder / ".lock"

    @property
    def previous(self) -> Path:
        """Folder that keeps the outputs of repeated stages."""
        return self.folder / "previous"

    @property
    def logs(self) -> Path:
        """Folder of all logs."""
        return self.folder / "logs"

    def log(self, stage: str) -> Path:
        """Return the path of a stage's log."""
        return self.logs / f"{stage}.log"


@dataclass(frozen=True)
class TextFiles(StageFiles):
    """The files that are made from text.

    Attributes:
        json_key: key of the text in JSON lines; the dataset's files contain the key in their names.
    """

    json_key: str = "text"

    @property
    def corpus(self) -> Path:
        """JSON lines with the text of the installed Python, if the user gives no text."""
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer_prefix(self) -> Path:
        """Common start of the names of the tokenizer's files."""
        return self.folder / "tokenizer"

    @property
    def tokenizer_model(self) -> Path:
        """SentencePiece model."""
        return self.folder / "tokenizer.model"

    @property
    def dataset_stem(self) -> Path:
        """Value of `--output-prefix` when the dataset is made."""
        return self.folder / "dataset"

    @property
    def dataset_prefix(self) -> Path:
        """Value of Megatron's `--data-path`."""
        return self.folder / f"dataset_{self.json_key}_document"

    @property
    def dataset(self) -> tuple[Path, ...]:
        """All files of the dataset."""
        return tuple(Path(f"{self.dataset_prefix}{suffix}") for suffix in (".bin", ".idx", ".tokenizer.json"))

    @property
    def token_frequency(self) -> Path:
        """Token counts of the dataset."""
        return self.folder / "token_frequency.safetensors"


@dataclass(frozen=True)
class TrainingFiles(StageFiles):
    """The files of a folder in which one model is trained and evaluated."""

    @property
    def routing_mask(self) -> Path:
        """Routing mask of the model."""
        return self.folder / "routing_mask.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Folder of Megatron checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.folder / "tensorboard"

    @property
    def dataset_cache(self) -> Path:
        """Folder of the sample indices that Megatron caches."""
        return self.folder / "dataset_cache"

    @property
    def evaluation(self) -> Path:
        """Result of the evaluation, as JSON."""
        return self.folder / "evaluation.json"

    @property
    def routing(self) -> Path:
        """Folder with the analysis of the routing."""
        return self.folder / "routing"

    @property
    def model(self) -> Path:
        """Folder of the model that is exported to transformers."""
        return self.folder / "model"

    @property
    def sample(self) -> Path:
        """Text that the exported model has generated."""
        return self.folder / "sample.txt"

    def checkpoint(self, iteration: int) -> Path:
        """Return the folder of one checkpoint, as Megatron names the folder."""
        return self.checkpoints / f"iter_{iteration:07d}"
