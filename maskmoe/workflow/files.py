"""Where the stages of a folder keep their files."""

from pathlib import Path

from maskmoe.data.indexed_dataset import dataset_files


class StageFiles:
    """The files of a folder of stages: a folder in which text becomes a dataset, or a model is trained, or both.

    Attributes:
        folder: the folder.
        commands: shell script with the commands of all stages.
        record: record of the started and finished stages, see `RunRecord`.
        lock: lock file, see `locked`.
        previous: folder that keeps the outputs of repeated stages.
        logs: folder of all logs.
        json_key: key of the text in JSON lines; the dataset's files contain the key in their names.
        corpus: JSON lines with the text of the installed Python or of pinned packages, if the user gives no text.
        tokenizer_prefix: common start of the names of the tokenizer's files.
        tokenizer_model: SentencePiece model.
        dataset_stem: value of `--output-prefix` when the dataset is made.
        dataset_prefix: value of Megatron's `--data-path`.
        dataset: all files of the dataset.
        token_frequency: token counts of the dataset.
        model_file: model file of the run, which launch/pretrain.sh takes.
        routing_mask: routing mask of the model.
        checkpoints: folder of Megatron checkpoints.
        tensorboard: folder of TensorBoard's event files.
        slurm: folder with the logs of Slurm jobs that train or evaluate the run.
        dataset_cache: folder of the sample indices that Megatron caches.
        evaluation: result of the evaluation, as JSON.
        routing: folder with the analysis of the routing.
        model: folder of the model that is exported to transformers.
        sample: text that the exported model has generated.
    """

    def __init__(self, folder: Path, json_key: str = "text") -> None:
        self.folder = folder
        self.commands = folder / "commands.sh"
        self.record = folder / "stages.json"
        self.lock = folder / ".lock"
        self.previous = folder / "previous"
        self.logs = folder / "logs"
        # From text to token counts.
        self.json_key = json_key
        self.corpus = folder / "corpus.jsonl"
        self.tokenizer_prefix = folder / "tokenizer"
        self.tokenizer_model = folder / "tokenizer.model"
        self.dataset_stem = folder / "dataset"
        self.dataset_prefix = folder / f"dataset_{json_key}_document"
        self.dataset = tuple(dataset_files(self.dataset_prefix))
        self.token_frequency = folder / "token_frequency.safetensors"
        # One model, its training and its evaluation.
        self.model_file = folder / "run.yaml"
        self.routing_mask = folder / "routing_mask.safetensors"
        self.checkpoints = folder / "checkpoints"
        self.tensorboard = folder / "tensorboard"
        self.slurm = folder / "slurm"
        self.dataset_cache = folder / "dataset_cache"
        self.evaluation = folder / "evaluation.json"
        self.routing = folder / "routing"
        self.model = folder / "model"
        self.sample = folder / "sample.txt"

    def held_out_corpus(self, name: str) -> Path:
        """Return the path of the text of a further held-out set, beside `corpus`."""
        return self.folder / f"corpus-{name}.jsonl"

    def held_out_stem(self, name: str) -> Path:
        """Return the value of `--output-prefix` when the dataset of a further held-out set is made."""
        return self.folder / f"held-out-{name}"

    def held_out_prefix(self, name: str) -> Path:
        """Return the value of Megatron's `--data-path` for a further held-out set."""
        return self.folder / f"held-out-{name}_{self.json_key}_document"

    def evaluation_on(self, name: str) -> Path:
        """Return the path of the result of the evaluation on a further held-out set."""
        return self.folder / f"evaluation-{name}.json"

    def log(self, stage: str) -> Path:
        """Return the path of a stage's log."""
        return self.logs / f"{stage}.log"

    def checkpoint(self, iteration: int) -> Path:
        """Return the folder of one checkpoint, as Megatron names the folder."""
        return self.checkpoints / f"iter_{iteration:07d}"
