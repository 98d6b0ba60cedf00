import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from maskmoe.data.default_corpus import default_corpus
from maskmoe.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real files, and texts with unusual characters and white space."""
    documents = [document["text"] for document in default_corpus(400_000)]
    return [*documents, "", " ", "\n\n", "\ttabs\tand  spaces \r\n", "naïve 😀 中文 e\u0301", "</s><unk><0x0A>"]


@pytest.fixture(scope="session")
def sentencepiece_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 600 ids."""
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    path.write_bytes(train_tokenizer(texts, vocab_size=600, num_threads=1))
    return path


@pytest.fixture(scope="session")
def huggingface_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer that starts each text with a special token, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<begin>", "<end>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))]
    )
    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    """A function that writes texts to a file of JSON lines and returns its path."""

    def write(name: str, documents: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return path

    return write
