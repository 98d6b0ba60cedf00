"""Opens models in transformers' format, and writes them with all that loading needs: configuration, code, tokenizer."""

import json
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from maskmoe.conversion.families import copies_of_shared_tensors, open_huggingface
from maskmoe.conversion.model_files import INDEX_SUFFIX, SINGLE_FILE, SafetensorsSource, write_safetensors
from maskmoe.conversion.model_tensors import (
    ROUTING_MASK_PREFIX,
    OpenedModel,
    check_tensors,
    make_config,
    mtp_tensor_shapes,
    read_mask,
    tensor_shapes,
    with_routing_mask,
)
from maskmoe.conversion.seal import seal_model
from maskmoe.conversion.settings import CONFIG_FILE, read_model_config
from maskmoe.conversion.tensor_mapping import PADDING_PREFIX
from maskmoe.conversion.tensor_sources import JoinedSource, TensorSource
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json, write_record
from maskmoe.files.untrusted import reading
from maskmoe.huggingface import AUTO_MAP, MaskMoEConfig, MaskMoEForCausalLM, export_code
from maskmoe.routing_mask.mask import RoutingMask

# Files beside an exported model with the data that only Megatron needs.
_ARGS_FILE, _PADDING_FILE = "megatron/args.json", "megatron/padding.safetensors"
MTP_FILE = "megatron/mtp.safetensors"
"""Name of the file with the weights of multi-token prediction beside an exported model."""
_PROGRESS = ("iteration", "curr_iteration", "consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")


def open_model(folder: Path, mask: RoutingMask | None = None) -> OpenedModel:
    """Open an exported MaskMoE model, including the data that only Megatron needs, or a model of another family.

    Args:
        folder: The folder of the model.
        mask: The routing mask for a model that has none.

    Raises:
        UserError: The model cannot be read, its family is unknown, or its tensors do not match its configuration.
    """
    config = read_model_config(folder / CONFIG_FILE)
    with reading(f"{folder / CONFIG_FILE} does not describe a model: it"):  # transformers fails on some sizes
        if config.get("model_type") != MaskMoEConfig.model_type:
            return open_huggingface(folder, mask)
        config = make_config(MaskMoEConfig, config, folder / CONFIG_FILE).to_dict()
        shapes = tensor_shapes(config)
    # A MaskMoE model that was made without a mask has one without metadata, in which every id sees all experts.
    lacks_mask = shapes.get(f"{ROUTING_MASK_PREFIX}metadata") == (0,)
    if mask is not None and not lacks_mask:
        raise UserError(f"{folder} holds the routing mask that it was trained with; leave --routing-mask out")
    source: TensorSource = SafetensorsSource(folder)
    # Under FSDP, transformers saves an output layer that is tied to the embedding a second time.
    copies = copies_of_shared_tensors(source, config, folder)
    check_tensors(source.tensors, shapes, str(folder), ignored=copies)
    stored = None if lacks_mask else read_mask(source, ROUTING_MASK_PREFIX)
    if stored is not None and config["routing_mask"].get("sha256") not in (None, stored.digest):
        raise UserError(f"{folder} holds another routing mask than it was exported with; export the model again")
    if mtp_shapes := mtp_tensor_shapes(config):
        mtp = SafetensorsSource(folder, MTP_FILE)
        check_tensors(mtp.tensors, mtp_shapes, str(folder / MTP_FILE))
        source = JoinedSource(source, mtp)
    if any((folder / name).exists() for name in (_PADDING_FILE, f"{_PADDING_FILE}{INDEX_SUFFIX}")):
        source = JoinedSource(source, SafetensorsSource(folder, _PADDING_FILE))
    # A model that was never Megatron's has no arguments.
    args = Namespace(**read_json(folder / _ARGS_FILE)) if (folder / _ARGS_FILE).exists() else None
    model = OpenedModel(source, config, args)
    return with_routing_mask(model, mask) if lacks_mask else model


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
        _PADDING_FILE: [name for name in tensors if name.startswith(PADDING_PREFIX)],
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
        (folder / _ARGS_FILE).parent.mkdir(exist_ok=True)
        write_record(_json_values(model.args), folder / _ARGS_FILE)
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
