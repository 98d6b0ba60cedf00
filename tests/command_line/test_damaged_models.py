"""Damaged models, tokenizers and checkpoints: `maskmoe sample` and others refuse them with one line of error."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_lines import refuse_all, run_command

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


def into_folder(name: str) -> Damage:
    """Return a damage that replaces a file by a folder."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


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


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: torch.full_like(weight, value)


DAMAGES: dict[str, Damage] = {
    "weights cut": cut(WEIGHTS, 10_000),
    "weights cut in their header": cut(WEIGHTS, 20),
    "empty weights": cut(WEIGHTS, 0),
    "weights that are text": write(WEIGHTS, "not weights"),
    "weights with an endless header": write(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"),
    "missing weights": remove(WEIGHTS),
    "weights that are a folder": into_folder(WEIGHTS),
    "missing embedding": remove_weight("embed_tokens"),
    "missing router": remove_weight("gate"),
    "missing experts": remove_weight("experts"),
    "missing attention": remove_weight("q_proj"),
    "missing mask": remove_weight("routing_mask"),
    "missing last norm": remove_weight("model.norm"),
    "unknown weight": change_weights(lambda weights: weights.update(other=torch.zeros(3))),
    "router for more experts": change_weight("mlp.gate", lambda weight: torch.cat([weight, weight])),
    "router with another width": change_weight("mlp.gate", lambda weight: weight[:, :-1]),
    "smaller embedding": change_weight("embed_tokens", lambda weight: weight[:-7]),
    "transposed attention": change_weight("k_proj", lambda weight: weight.T),
    "flat expert": change_weight("experts", lambda weight: weight.flatten()),
    "NaN in the embedding": change_weight("embed_tokens", filled(float("nan"))),
    "NaN in a router": change_weight("mlp.gate", filled(float("nan"))),
    "infinite norm": change_weight("norm", filled(float("inf"))),
    "integer weights": change_weight("q_proj", lambda weight: torch.ones_like(weight, dtype=torch.int32)),
    "complex weights": change_weight("q_proj", lambda weight: weight.to(torch.complex64)),
    "missing config": remove(CONFIG),
    "config cut": cut(CONFIG, 100),
    "empty config": cut(CONFIG, 0),
    "config that is a list": write(CONFIG, "[1, 2]"),
    "config that is a number": write(CONFIG, "3"),
    "config in another encoding": write(CONFIG, b"\xff\xfe\x00"),
    "config that is a folder": into_folder(CONFIG),
    "unknown model type": set_values(CONFIG, model_type="unheard_of"),
    "model type that is a list": set_values(CONFIG, model_type=["maskmoe"]),
    "width that is a text": set_values(CONFIG, hidden_size="wide"),
    "width of zero": set_values(CONFIG, hidden_size=0),
    "negative width": set_values(CONFIG, hidden_size=-32),
    "width that is null": set_values(CONFIG, hidden_size=None),
    "heads of zero": set_values(CONFIG, num_attention_heads=0),
    "positions that are a text": set_values(CONFIG, max_position_embeddings="many"),
    "no positions": set_values(CONFIG, max_position_embeddings=0),
    "no layers": set_values(CONFIG, num_hidden_layers=0),
    "layers that are a list": set_values(CONFIG, num_hidden_layers=[2]),
    "more layers": set_values(CONFIG, num_hidden_layers=3, mlp_layer_types=["sparse"] * 3),
    "more experts than weights": set_values(CONFIG, num_experts=64),
    "no experts": set_values(CONFIG, num_experts=0),
    "more experts of a token than experts": set_values(CONFIG, num_experts_per_tok=9),
    "layer of an unknown kind": set_values(CONFIG, mlp_layer_types=["sparse", "odd"]),
    "infinite epsilon": set_values(CONFIG, rms_norm_eps=float("inf")),
    "epsilon of NaN": set_values(CONFIG, rms_norm_eps=float("nan")),
    "rotary embedding that is a text": set_values(CONFIG, rope_parameters="default"),
    "mask that is a text": set_values(CONFIG, routing_mask="mask"),
    "mask with a negative number of rows": set_values(
        CONFIG, routing_mask={"num_tables": 2, "num_rows": -1, "row_dtype": "int16", "metadata_bytes": 10}
    ),
    "unknown activation": set_values(CONFIG, hidden_act="unheard_of"),
    "smaller vocabulary": set_values(CONFIG, vocab_size=300),
    "type of the weights unknown": set_values(CONFIG, dtype="float12"),
    "missing tokenizer": remove(TOKENIZER),
    "tokenizer cut": cut(TOKENIZER, 500),
    "empty tokenizer": cut(TOKENIZER, 0),
    "tokenizer that is a list": write(TOKENIZER, "[]"),
    "tokenizer that is a number": write(TOKENIZER, "7"),
    "tokenizer without a model": set_values(TOKENIZER, model=None),
    "tokenizer of an unknown kind": set_values(TOKENIZER, model={"type": "Unheard"}),
    "tokenizer with more ids than the model": set_values(
        TOKENIZER,
        added_tokens=[
            {"id": 500, "content": "<new>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
    ),
    "tokenizer's settings cut": cut("tokenizer_config.json", 30),
    "tokenizer's settings that are a list": write("tokenizer_config.json", "[]"),
    "tokenizer of an unknown class": set_values("tokenizer_config.json", tokenizer_class=["Odd"]),
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


def test_sample_of_a_damaged_model(damaged, workshop):
    models = [damaged(damage) for damage in DAMAGES.values()]
    refuse_all(
        workshop,
        [
            (["sample", "--model", str(model), "--prompt", "import", "--max-new-tokens", "3"], [str(model)])
            for model in models
        ],
    )


def test_sample_of_an_intact_model(workshop):
    outcome = run_command("sample", "--model", "model", "--prompt", "import", "--max-new-tokens", 3)
    assert (outcome.code, outcome.messages()) == (0, "")
    assert outcome.output.startswith("import")


def test_sample_of_a_prompt_that_does_not_fit(workshop):
    refuse_all(
        workshop,
        [
            (["sample", "--model", "model", "--prompt", ""], ["--prompt is empty"]),
            (["sample", "--model", "model", "--prompt", "a b" * 50], ["100 prompt tokens", "64 positions"]),
            (
                ["sample", "--model", "model", "--prompt", "a", "--max-new-tokens", "64"],
                ["1 prompt tokens and 64 new ones", "--max-new-tokens"],
            ),
        ],
    )


# Damages that only a reader of the routing, or of Megatron's arguments, can see.
ROUTING_DAMAGES = {
    "NaN in a router": change_weight("mlp.gate", filled(float("nan"))),
    "infinite router": change_weight("mlp.gate", filled(float("inf"))),
    "NaN in the embedding": change_weight("embed_tokens", filled(float("nan"))),
    "missing router": remove_weight("gate"),
    "missing weights": remove(WEIGHTS),
    "weights cut": cut(WEIGHTS, 10_000),
    "infinite epsilon": set_values(CONFIG, rms_norm_eps=float("inf")),
    "width that is a text": set_values(CONFIG, hidden_size="wide"),
    "config cut": cut(CONFIG, 100),
    "layers that are a list": set_values(CONFIG, num_hidden_layers=[2]),
    "mask that is a text": set_values(CONFIG, routing_mask="mask"),
    "config without its type": write(CONFIG, "{}"),
}


def test_analysis_of_a_damaged_model(damaged, workshop):
    models = [damaged(damage) for damage in ROUTING_DAMAGES.values()]
    common = ["--data-path", "data", "--output-dir", "OUT"]
    cases = [(["analyze", "--load", str(model), *common], [str(model)]) for model in models]
    refuse_all(workshop, cases, after_progress=True)


def with_arguments(content: str) -> Damage:
    """Return a damage that adds a file of Megatron's arguments."""

    def damage(folder: Path) -> None:
        (folder / "megatron").mkdir()
        write("megatron/args.json", content)(folder)

    return damage


def test_conversion_of_a_damaged_model(damaged, workshop):
    contents = ["{}", "[]", "3", '{"num_layers": "two"}', '{"rank": 0, "tokenizer_type": [1]}', "{"]
    models = [damaged(damage) for damage in (*ROUTING_DAMAGES.values(), *map(with_arguments, contents))]
    command = ["convert", "hf-to-megatron", "--save", "OUT", "--load"]
    refuse_all(workshop, [([*command, str(model)], []) for model in models], after_progress=True)


TOKENIZER_DAMAGES = {
    name: damage
    for name, damage in DAMAGES.items()
    if name.startswith(("tokenizer ", "empty tokenizer")) and "more ids" not in name and "class" not in name
}
# Each of these contents makes the library panic, or is refused by it.
TOKENIZER_CONTENTS = {
    "BPE with a cycle": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
    "unigram without pieces": {"type": "Unigram", "unk_id": 5, "vocab": []},
    "unigram with an unknown id beyond": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]},
    "unigram with an empty piece": {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0]]},
    "word level without unknown": {"type": "WordLevel", "vocab": {}, "unk_token": "<u>"},
    "word piece without vocabulary": {"type": "WordPiece", "vocab": {}},
    "ids with holes": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
    "negative ids": {"type": "BPE", "vocab": {"a": -1}, "merges": []},
}


def test_dataset_of_a_damaged_tokenizer(damaged, workshop):
    damages = [*TOKENIZER_DAMAGES.values()]
    damages += [
        write(TOKENIZER, json.dumps({"version": "1.0", "model": model})) for model in TOKENIZER_CONTENTS.values()
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
    refuse_all(workshop, [([*command, "--workers=1", "--tokenizer-model", str(folder)], []) for folder in folders])
