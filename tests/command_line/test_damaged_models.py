"""Damaged and altered models and tokenizers: `maskmoe generate` and others refuse them with one line of error."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_lines import refuse_all
from support.datasets import build_mask

from maskmoe.checkpoint.routing_mask import buffers_of_routing_mask
from maskmoe.huggingface import MaskMoEForCausalLM
from maskmoe.routing_mask.frequency import TokenFrequency

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
Damage = Callable[[Path], object]


def cut(name: str, size: int) -> Damage:
    """Return a damage that leaves only the first bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, content: str | bytes) -> Damage:
    """Return a damage that replaces the content of a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Damage:
    """Return a damage that removes a file."""
    return lambda folder: (folder / name).unlink()


def set_values(name: str, **values: Any) -> Damage:
    """Return a damage that changes values of a JSON object."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Return a damage that changes the weights of the model."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def change_weight(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Return a damage that replaces the first weight whose name has a part."""

    def change_all(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(weights) if part in name)
        weights[name] = change(weights[name]).contiguous()

    return change_weights(change_all)


def remove_weight(part: str) -> Damage:
    """Return a damage that removes all weights whose name has a part."""

    def remove_all(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if part in name]:
            del weights[name]

    return change_weights(remove_all)


def name_weights_elsewhere(folder: Path) -> None:
    """Let the configuration name an index that names a file by its absolute path."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), str(folder / WEIGHTS))}
    (folder / "other.safetensors.index.json").write_text(json.dumps(index))
    set_values(CONFIG, transformers_weights="other.safetensors.index.json")(folder)


# One damage for each way in which a model or tokenizer fails: by a reader of files, by transformers, by a comparison.
DAMAGES: dict[str, Damage] = {
    "weights cut": cut(WEIGHTS, 10_000),
    "missing weights": remove(WEIGHTS),
    "missing router": remove_weight("gate"),
    "missing mask": remove_weight("routing_mask"),
    "unknown weight": change_weights(lambda weights: weights.update(other=torch.zeros(3))),
    "router for more experts": change_weight("mlp.gate", lambda weight: torch.cat([weight, weight])),
    "NaN in a router": change_weight("mlp.gate", lambda weight: torch.full_like(weight, float("nan"))),
    "integer weights": change_weight("q_proj", lambda weight: torch.ones_like(weight, dtype=torch.int32)),
    "config cut": cut(CONFIG, 100),
    "width that is a text": set_values(CONFIG, hidden_size="wide"),
    "vocabulary beyond all models": set_values(CONFIG, vocab_size=(1 << 24) + 1),
    "weights named elsewhere": name_weights_elsewhere,
    "adapters": write("adapter_config.json", "{}"),
    "heads of zero": set_values(CONFIG, num_attention_heads=0),
    "end of a text that is a text": write("generation_config.json", '{"eos_token_id": [1, "a"]}'),
    "mask that is a text": set_values(CONFIG, routing_mask="mask"),
    "unknown activation": set_values(CONFIG, hidden_act="unheard_of"),
    "type of the weights unknown": set_values(CONFIG, dtype="float12"),
    "pipe among the files": lambda folder: os.mkfifo(folder / "added_tokens.json"),
    "missing tokenizer": remove(TOKENIZER),
    "tokenizer that is a list": write(TOKENIZER, "[]"),
    "tokenizer with more ids than the model": set_values(
        TOKENIZER,
        added_tokens=[
            {"id": 500, "content": "<new>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
    ),
}
# Words that the error holds besides the folder.
WORDS = {
    "router for more experts": "misshapen weights",
    "vocabulary beyond all models": "vocab_size",
    "weights named elsewhere": "transformers_weights",
    "adapters": "merge_and_unload",
}


@pytest.fixture
def damaged(workshop: Path, tmp_path: Path) -> Callable[[Damage], Path]:
    """Return a function that makes a damaged copy of the model."""
    numbers = iter(range(1000))

    def make(damage: Damage) -> Path:
        folder = tmp_path / f"model{next(numbers)}"
        shutil.copytree(workshop / "model", folder)
        damage(folder)
        return folder

    return make


def test_generation_with_a_damaged_model(damaged, workshop):
    models = [damaged(damage) for damage in DAMAGES.values()]
    refuse_all(
        workshop,
        [
            (
                ["generate", "--load", str(model), "--prompt", "import", "--max-new-tokens", "3"],
                [str(model), WORDS.get(name, "")],
            )
            for name, model in zip(DAMAGES, models, strict=True)
        ],
    )


# ---- A mask that was altered after the export ------------------------------------------------------------------------

PREFIX = "model.routing_mask."


def alter_rows(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors[f"{PREFIX}row_of_id"]
    rows[0, 0] = (rows[0, 0] + 1) % 2


def replace_by_another_mask(tensors: dict[str, torch.Tensor]) -> None:
    """Replace the mask by an intact one of the same shape."""
    frequency = TokenFrequency.load(Path("counts.safetensors"))
    other = build_mask(frequency, 4, 2, "uniform", frequent_mass=0.6, frequent_visible_experts=3, seed=2)
    for name, tensor in buffers_of_routing_mask(other).items():
        assert tensor.shape == tensors[PREFIX + name].shape
        tensors[PREFIX + name] = tensor


def test_altered_mask_is_refused(damaged, workshop):
    models = [str(damaged(change_weights(alter))) for alter in (alter_rows, replace_by_another_mask)]
    generate = ["generate", "--prompt", "import", "--max-new-tokens", "3", "--load"]
    refuse_all(workshop, [([*generate, model], ["does not match its digest"]) for model in models])
    convert = ["convert", "hf-to-megatron", "--save", "OUT", "--load"]
    refuse_all(workshop, [([*convert, model], ["mask"]) for model in models], after_progress=True)
    for model in models:
        with pytest.raises(ValueError, match="does not match its digest"):
            MaskMoEForCausalLM.from_pretrained(model)


# ---- Code in the folder of a model -----------------------------------------------------------------------------------

MODEL_CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
TOKENIZER_CODE = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.mark.parametrize(
    "damage",
    [
        set_values(CONFIG, model_type="unknown", auto_map=MODEL_CODE),
        set_values("tokenizer_config.json", tokenizer_class="Evil", auto_map=TOKENIZER_CODE),
    ],
)
def test_code_of_a_models_folder_is_not_run(damaged, workshop, tmp_path, monkeypatch, damage):
    """The code is not run either if the user agrees to everything."""
    model = damaged(damage)
    (model / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'ran').touch()\nclass Evil: pass\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    refuse_all(workshop, [(["generate", "--load", str(model), "--prompt", "import", "--max-new-tokens", "3"], [])])
    assert not (tmp_path / "ran").exists()


# ---- Other commands --------------------------------------------------------------------------------------------------


# Damages that a reader of the routing or of Megatron's arguments finds.
ROUTING_DAMAGES = {
    name: DAMAGES[name]
    for name in ("weights cut", "missing router", "missing mask", "NaN in a router", "width that is a text", "adapters")
}


def with_arguments(content: str) -> Damage:
    """Return a damage that adds a file of Megatron's arguments."""

    def damage(folder: Path) -> None:
        (folder / "megatron").mkdir()
        write("megatron/args.json", content)(folder)

    return damage


def test_conversion_of_a_damaged_model(damaged, workshop):
    contents = ["[]", '{"num_layers": "two"}']
    models = [damaged(damage) for damage in (*ROUTING_DAMAGES.values(), *map(with_arguments, contents))]
    command = ["convert", "hf-to-megatron", "--save", "OUT", "--load"]
    refuse_all(workshop, [([*command, str(model)], []) for model in models], after_progress=True)


# Each of these contents makes the library panic, or is refused by it.
TOKENIZER_CONTENTS = {
    "BPE with a cycle": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
    "unigram with an unknown id beyond": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    "word level without unknown": {"type": "WordLevel", "vocab": {}, "unk_token": "<u>"},
    "ids with holes": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
}


def test_dataset_of_a_damaged_tokenizer(damaged, workshop):
    damages = [
        DAMAGES["missing tokenizer"],
        DAMAGES["tokenizer that is a list"],
        *(write(TOKENIZER, json.dumps({"version": "1.0", "model": model})) for model in TOKENIZER_CONTENTS.values()),
    ]
    folders = [damaged(damage) for damage in damages]
    command = [
        "preprocess",
        "--input",
        "text.txt",
        "--output-prefix",
        "OUT",
        "--tokenizer-type",
        "HuggingFaceTokenizer",
    ]
    refuse_all(
        workshop, [([*command, "--workers=1", "--tokenizer-model", str(folder)], [str(folder)]) for folder in folders]
    )
