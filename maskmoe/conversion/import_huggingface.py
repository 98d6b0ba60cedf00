"""Opens models in transformers' format: exported MaskMoE models, and models of other families."""

from argparse import Namespace
from pathlib import Path

from maskmoe.conversion.families import copies_of_shared_tensors, open_huggingface
from maskmoe.conversion.model_files import INDEX_SUFFIX, SafetensorsSource
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
from maskmoe.conversion.settings import CONFIG_FILE, read_model_config
from maskmoe.conversion.tensor_sources import JoinedSource, TensorSource
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.parsing import reading
from maskmoe.huggingface import MaskMoEConfig
from maskmoe.routing_mask.mask import RoutingMask

# Files beside an exported model with the data that only Megatron needs.
ARGS_FILE, PADDING_FILE = "megatron/args.json", "megatron/padding.safetensors"
MTP_FILE = "megatron/mtp.safetensors"
"""Name of the file with the weights of multi-token prediction beside an exported model."""


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
    if any((folder / name).exists() for name in (PADDING_FILE, f"{PADDING_FILE}{INDEX_SUFFIX}")):
        source = JoinedSource(source, SafetensorsSource(folder, PADDING_FILE))
    # A model that was never Megatron's has no arguments.
    args = Namespace(**read_json(folder / ARGS_FILE)) if (folder / ARGS_FILE).exists() else None
    model = OpenedModel(source, config, args)
    return with_routing_mask(model, mask) if lacks_mask else model
