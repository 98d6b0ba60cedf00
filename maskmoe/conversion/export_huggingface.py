"""Exports models in transformers' format with all that loading needs: weights, configuration, code, tokenizer, seal."""

import json
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from maskmoe.conversion.import_huggingface import ARGS_FILE, MTP_FILE, PADDING_FILE
from maskmoe.conversion.model_files import SINGLE_FILE, write_safetensors
from maskmoe.conversion.model_tensors import (
    OpenedModel,
    make_config,
    mtp_tensor_shapes,
    tensor_shapes,
)
from maskmoe.conversion.seal import seal_model
from maskmoe.conversion.settings import CONFIG_FILE
from maskmoe.conversion.tensor_mapping import PADDING_PREFIX
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.files.json_files import write_record
from maskmoe.huggingface import AUTO_MAP, MaskMoEConfig, MaskMoEForCausalLM, export_code

_PROGRESS = ("iteration", "curr_iteration", "consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")


def write_huggingface(
    model: OpenedModel, folder: Path, max_file_bytes: int, tokenizer_type: str, tokenizer_model: str | None
) -> None:
    """Write a model with its configuration, code and tokenizer, and the data that only Megatron needs.

    Args:
        model: The model; its source also provides multi-token prediction and may provide the padding of the vocabulary.
        folder: The folder for the files.
        max_file_bytes: Upper bound of the bytes of tensors in a file.
        tokenizer_type: Megatron's `--tokenizer-type`.
        tokenizer_model: Megatron's `--tokenizer-model`.

    Raises:
        UserError: The tokenizer cannot be read or has no equal in transformers.
    """
    special_ids = _special_ids(model.config, export_tokenizer(tokenizer_type, tokenizer_model, folder))
    # Write the tensors.
    tensors = model.source.tensors
    weights = tensor_shapes(model.config)
    contents = {
        SINGLE_FILE: weights,
        MTP_FILE: mtp_tensor_shapes(model.config),
        PADDING_FILE: [name for name in tensors if name.startswith(PADDING_PREFIX)],
    }
    for single_file, names in contents.items():
        if names:
            write_safetensors(model.source, names, folder, max_file_bytes, single_file)
    # Write all other files.
    dtype = str(tensors[next(iter(weights))].dtype).removeprefix("torch.")
    names = {"architectures": [MaskMoEForCausalLM.__name__], "auto_map": AUTO_MAP, "dtype": dtype}
    config = make_config(MaskMoEConfig, model.config | special_ids | names)
    (folder / CONFIG_FILE).write_text(config.to_json_string())
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(folder)
    export_code(folder)
    if model.args is not None:
        (folder / ARGS_FILE).parent.mkdir(exist_ok=True)
        write_record(_json_values(model.args), folder / ARGS_FILE)
    seal_model(folder)


def _special_ids(config: Mapping[str, Any], of_tokenizer: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the ids with which texts begin and end, as far as the tokenizer's ids replace the model's ids.

    Args:
        config: The fields of the model's `MaskMoEConfig`.
        of_tokenizer: The tokenizer's ids, by the same names as in `config`. If an id is None, the model keeps its own.
    """
    special_ids = {name: id_ for name, id_ in of_tokenizer.items() if id_ is not None}
    ends = config.get("eos_token_id")
    if isinstance(ends, list) and special_ids.get("eos_token_id") in ends:  # a text may have several ends
        del special_ids["eos_token_id"]
    return special_ids


def _json_values(args: Namespace) -> dict[str, Any]:
    """Return Megatron's arguments whose values JSON can hold, except the progress of training.

    Other values, such as dtypes and signals, do not describe the model.
    """
    values = {}
    for name, value in sorted(vars(args).items()):
        with suppress(TypeError, ValueError):
            if name not in _PROGRESS and json.loads(json.dumps(value)) == value:
                values[name] = value
    return values
