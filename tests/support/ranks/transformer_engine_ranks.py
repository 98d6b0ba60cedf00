"""Models on Transformer Engine: `python transformer_engine_ranks.py FOLDER PROVIDER`, with RANK and WORLD_SIZE set.

PROVIDER is `stub` or `installed`. The script describes a model of each layout in `layouts.json`. It loads each
checkpoint FOLDER/NAME/converted and FOLDER/NAME/local and saves the model again, to FOLDER/NAME/converted_again and
FOLDER/NAME/local_again. It saves the models of the layouts in `SAVED` to FOLDER/LAYOUT/saved. The stub, which computes
on the CPU, also writes the logits of the ids in FOLDER/ids.pt to FOLDER/NAME/logits.pt, and the logits of `IDS` to
FOLDER/LAYOUT/logits.pt.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[2] == "stub":
    from support import stub_transformer_engine

    stub_transformer_engine.install()
from maskmoe.megatron_compat import cpu, prepare_process

if __name__ == "__main__":
    cpu.install(hidden=())
prepare_process()
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from support.megatron_models import load_converted_model, logits_of_megatron, save_as_release
from support.rank_program import run_as_rank
from support.small_moe import draw_parameters, make_config, make_mask, make_visible_experts, random_visible_sets

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.models import MaskMoEGPTModel

NUM_LAYERS, VOCAB_SIZE = 2, 9
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
SAVED = ("latent_attention", "latent_attention_of_whole_queries", "latent_experts")
IDS = torch.arange(2 * VOCAB_SIZE).view(2, VOCAB_SIZE) % VOCAB_SIZE


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
    config = make_config(config_class=config_class, transformer_impl=implementation, **settings)
    model, visible_experts = GPTModel, None
    if config.num_moe_experts:
        num_tables = NUM_LAYERS + (config.mtp_num_layers or 0)
        mask = make_mask(random_visible_sets(0, num_tables, VOCAB_SIZE, config.num_moe_experts))
        visible_experts = make_visible_experts(config, mask)
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


def save(model: GPTModel, folder: Path, computes: bool) -> None:
    """Save a model with random parameters and, if it computes here, its logits."""
    draw_parameters(model)
    if computes:
        torch.save(logits_of_megatron(model.eval(), IDS), folder / "logits.pt")
    (folder / "saved").mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "saved"))


def load_and_save(folder: Path, computes: bool) -> None:
    """Load checkpoints of a model with the flags in `flags.json`, and save them again."""
    flags = json.loads((folder / "flags.json").read_text())
    flags += ["--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]
    for name in ("converted", "local"):
        model, args = load_converted_model(folder / name, flags)
        save_as_release(model, args, folder / f"{name}_again")
    if computes:
        torch.save(logits_of_megatron(model, torch.load(folder.parent / "ids.pt")), folder / "logits.pt")


def main() -> None:
    folder, provider = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    described = {layout: asdict(describe(build_model(layout, "transformer_engine"))) for layout in LAYOUTS}
    (folder / "layouts.json").write_text(json.dumps(described))
    for layout in SAVED:
        (folder / layout).mkdir()
        save(build_model(layout, "transformer_engine"), folder / layout, computes=provider == "stub")
    for flags in sorted(folder.glob("*/flags.json")):
        load_and_save(flags.parent, computes=provider == "stub")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
