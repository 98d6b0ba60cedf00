"""Names, shapes and checkpoints of models on Transformer Engine's modules, which `tests/run.sh --te` builds."""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from support import small_moe as moe
from support.converted_models import load_converted_model, save_as_release, save_model, to_megatron
from support.launchers import RunRanks
from support.tensors import assert_same_tensors

from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.tensor_sources import Block
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.models import MaskMoEGPTModel

# Together, the models have shared experts with a gate, dense layers, biases, norms of each head or of all heads, and
# multi-latent attention.
MODELS = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")

NUM_LAYERS, VOCAB_SIZE = 2, 9

pytestmark = pytest.mark.te
GROUPED = {"moe_grouped_gemm": True}
LATENT_ATTENTION = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "qk_layernorm": True,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": None},
    "experts": GROUPED,
    "experts_one_by_one": {"moe_grouped_gemm": False},
    "dense_layer_and_shared_experts": {
        **GROUPED,
        "moe_layer_freq": [0, 1],
        "moe_shared_expert_intermediate_size": 10,
        "moe_shared_expert_gate": True,
    },
    "norms_of_heads": {**GROUPED, "qk_layernorm": True, "add_qkv_bias": True},
    "norms_of_all_heads": {**GROUPED, "qk_layernorm": True, "all_heads": True},
    "layer_norms": {**GROUPED, "moe_layer_freq": [0, 1], "normalization": "LayerNorm"},
    "expert_bias": {**GROUPED, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "multi_token_prediction": {**GROUPED, "mtp_num_layers": 1},
    "latent_attention": {**GROUPED, "moe_layer_freq": [0, 1], **LATENT_ATTENTION},
    "latent_attention_of_whole_queries": {**GROUPED, **LATENT_ATTENTION, "q_lora_rank": None, "rope_type": "rope"},
    "latent_experts": {**GROUPED, **LATENT_ATTENTION, "moe_latent_size": 6, "moe_shared_expert_intermediate_size": 10},
}
"""Settings of models by name."""


@dataclass
class Described:
    """Names and shapes of a model.

    Attributes:
        parameters: shapes of the parameters.
        tensors: shapes of the tensors of its checkpoint.
        objects: names of the other entries of its checkpoint.
    """

    parameters: dict[str, list[int]]
    tensors: dict[str, list[int]] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)


def build_model(layout: str, implementation: str) -> GPTModel:
    """Build the model of a layout, with `implementation` as `transformer_impl`."""
    settings = {"num_layers": NUM_LAYERS, "hidden_size": 16, "num_query_groups": 1, **LAYOUTS[layout]}
    all_heads = settings.pop("all_heads", False)
    config_class = MLATransformerConfig if "multi_latent_attention" in settings else TransformerConfig
    config = moe.make_config(config_class=config_class, transformer_impl=implementation, **settings)
    model, visible_experts = GPTModel, None
    if config.num_moe_experts:
        num_tables = NUM_LAYERS + (config.mtp_num_layers or 0)
        mask = moe.make_mask(moe.random_visible_sets(0, num_tables, VOCAB_SIZE, config.num_moe_experts))
        visible_experts = moe.make_visible_experts(config, mask)
        model = partial(MaskMoEGPTModel, visible_experts=visible_experts)
    described = (config, visible_experts, "all", None, all_heads)
    return model(
        config,
        get_maskmoe_decoder_block_spec(*described),
        mtp_block_spec=get_maskmoe_mtp_block_spec(*described) if config.mtp_num_layers else None,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=16,
        position_embedding_type="rope",
    )


def describe(model: GPTModel) -> Described:
    """Describe a model and its checkpoint."""
    described = Described({name: list(parameter.shape) for name, parameter in model.named_parameters()})
    state = model.sharded_state_dict()
    apply_factories(state)
    for entry in nested_values(state):
        if isinstance(entry, ShardedObject):
            described.objects.append(entry.unique_key)
        else:
            described.tensors[entry.key] = list(entry.global_shape)
    return described


def load_and_save(folder: Path) -> None:
    """Load checkpoints of a model with the flags in `flags.json`, and save them again."""
    flags = json.loads((folder / "flags.json").read_text())
    flags += ["--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]
    for name in ("converted", "local"):
        model, args = load_converted_model(folder / name, flags)
        save_as_release(model, args, folder / f"{name}_again")


def work_on_transformer_engine(folder: Path) -> dict[str, dict[str, Any]]:
    """Describe a model of each layout, and exchange checkpoints with the local models.

    Load each checkpoint FOLDER/NAME/converted and FOLDER/NAME/local and save the model again, to
    FOLDER/NAME/converted_again and FOLDER/NAME/local_again.
    """
    moe.initialize_parallelism()
    described = {layout: asdict(describe(build_model(layout, "transformer_engine"))) for layout in LAYOUTS}
    for flags in folder.glob("*/flags.json"):
        load_and_save(flags.parent)
    return described


@dataclass(frozen=True)
class Built:
    """The results of a process with Transformer Engine.

    Attributes:
        layouts: descriptions of the models by the name of the layout.
        folder: holds a folder for each of `MODELS`.
    """

    layouts: dict[str, Described]
    folder: Path


@pytest.fixture(scope="module")
def built(run_ranks: RunRanks, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("transformer_engine")
    for name in MODELS:
        save_model(name, folder / name / "original")
        flags = to_megatron(folder / name / "original", folder / name / "converted")
        (folder / name / "flags.json").write_text(json.dumps(flags))
        save_as_release(*load_converted_model(folder / name / "converted", flags), folder / name / "local")
    (layouts,) = run_ranks(work_on_transformer_engine, folder, folder, world_size=1, uses_transformer_engine=True)
    return Built({name: Described(**values) for name, values in layouts.items()}, folder)


def parameter_on_transformer_engine(name: str, local: Described) -> str:
    """Return the name of a local model's parameter on Transformer Engine, which fuses norms and groups experts."""
    if any("linear_kv_up_proj" in other for other in local.parameters):
        has_up_projection = any("linear_q_up_proj" in other for other in local.parameters)
        name = name.replace(
            ".q_layernorm.", f".{'linear_q_up_proj' if has_up_projection else 'linear_q_proj'}.layer_norm_"
        )
        name = name.replace(".kv_layernorm.", ".linear_kv_up_proj.layer_norm_")
    else:
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    layer, _, rest = name.partition("pre_mlp_layernorm.")
    if rest and f"{layer}mlp.router.weight" not in local.parameters:
        name = f"{layer}mlp.linear_fc1.layer_norm_{rest}"
    return name


def tensor_on_transformer_engine(name: str, local: Described) -> str:
    """Return the name of a local checkpoint's tensor in a checkpoint of Transformer Engine."""
    layer, _, rest = name.partition("mlp.linear_fc1.layer_norm_")
    return f"{layer}pre_mlp_layernorm.{rest}" if rest and f"{layer}mlp.router.weight" in local.tensors else name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_equal_the_local_models(layout: str, built: Built, one_rank: None) -> None:
    local, found = describe(build_model(layout, "local")), built.layouts[layout]
    expected = {parameter_on_transformer_engine(name, local): shape for name, shape in local.parameters.items()}
    if LAYOUTS[layout].get("moe_grouped_gemm"):
        one_by_one = r"local_experts\.(\d+)\.(linear_fc.)\.weight"
        expected = {re.sub(one_by_one, r"\2.weight\1", name): shape for name, shape in expected.items()}
    assert found.parameters == expected
    assert found.tensors == {tensor_on_transformer_engine(name, local): shape for name, shape in local.tensors.items()}
    # Only Transformer Engine's norms have a state of FP8.
    further = set(found.objects) - set(local.objects)
    assert set(local.objects) <= set(found.objects)
    assert all(re.search(r"(norm)\._extra_state/", name) for name in further), further


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint in transformers' format, which is the same for all modules."""
    source = open_megatron(checkpoint).source
    return {name: source.read(Block.whole(name, spec.shape)) for name, spec in source.tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_are_exchanged_with_local_models(name: str, built: Built, one_rank: None) -> None:
    """A converted and a local checkpoint are loaded and saved with Transformer Engine, and the result by local modules.

    All of these checkpoints hold the same tensors.
    """
    folder = built.folder / name
    local, _ = load_converted_model(folder / "local_again", json.loads((folder / "flags.json").read_text()))
    expected = tensors_of(folder / "local" / "release")
    for again in ("converted_again", "local_again"):
        assert_same_tensors(tensors_of(folder / again / "release"), expected)
    original, _ = load_converted_model(folder / "local", json.loads((folder / "flags.json").read_text()))
    assert_same_tensors(dict(local.named_parameters()), dict(original.named_parameters()))
