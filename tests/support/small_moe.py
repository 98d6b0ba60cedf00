"""Small routing masks, layers and models, and a reference router in plain torch, token by token."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask
from maskmoe.routing_mask.tables import stack_tables, table_of_sets
from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.models import MaskMoEGPTModel
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing import AuxLossTokens
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts

# With the CPU adapter, the current device is the CPU.
DEVICE = torch.device(torch.cuda.current_device())

LATENT_SIZES = {"q_lora_rank": 10, "kv_lora_rank": 6, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
"""Sizes of multi-latent attention that all differ."""
YARN = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.3}


def make_mask(visible: np.ndarray, num_layers: int | None = None) -> RoutingMask:
    """Build a mask of visible sets, bool [tables, vocab, N]; `num_layers` layers can share one table."""
    num_tables, vocab_size, num_experts = visible.shape
    num_layers = num_layers or num_tables
    tables = stack_tables([table_of_sets(table) for table in visible], num_experts)
    provenance = MaskProvenance("uniform", 0.5, 2, seed=0, shared_table=num_tables == 1 and num_layers > 1)
    return RoutingMask(*tables, vocab_size, num_experts, num_layers, provenance)


def random_visible_sets(
    seed: int, tables: int, vocab_size: int, num_experts: int, sizes: tuple[int, ...] | None = None
) -> np.ndarray:
    """Draw visible sets, bool [tables, vocab, N], of random `sizes`; by default half of the ids see one expert."""
    rng = np.random.default_rng(seed)
    if sizes is None:
        num_visible = np.where(rng.random((tables, vocab_size)) < 0.5, 1, rng.integers(1, num_experts + 1, vocab_size))
    else:
        num_visible = rng.choice(sizes, (tables, vocab_size))
    order = rng.random((tables, vocab_size, num_experts)).argsort(axis=-1)
    return order < num_visible[..., None]


def visible_halves(vocab_size: int, num_experts: int) -> np.ndarray:
    """Return visible sets, bool [1, vocab, N]: even ids see the first half of the experts, odd ids the second half."""
    return (np.arange(vocab_size)[:, None] % 2 == np.arange(num_experts) // (num_experts // 2))[None]


def make_config(
    num_experts: int | None = 4,
    topk: int = 2,
    config_class: type[TransformerConfig] = TransformerConfig,
    **settings: Any,
) -> TransformerConfig:
    """Build a configuration of one layer without router losses; `settings` override its values."""
    defaults = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "num_attention_heads": 2,
        "num_moe_experts": num_experts,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": topk == 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
    }
    return config_class(**(defaults | settings))


def process_groups() -> ProcessGroupCollection:
    """Return the process groups that `parallel_state` holds."""
    return ProcessGroupCollection.use_mpu_process_groups()


def initialize_parallelism(**sizes: int) -> ProcessGroupCollection:
    """Initialise Megatron's process groups of the given sizes, and its random numbers; return the groups."""
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    return process_groups()


def make_visible_experts(config: TransformerConfig, mask: RoutingMask) -> VisibleExperts:
    """Put a mask on the device."""
    return VisibleExperts(config, mask, process_groups()).to(DEVICE)


def make_router(
    config: TransformerConfig,
    mask: RoutingMask,
    layer_number: int = 1,
    router_class: type[MaskMoERouter] = MaskMoERouter,
    **settings: Any,
) -> MaskMoERouter:
    """Build a router on the device; `settings` are arguments of `MaskMoERouter`."""
    visible_experts = make_visible_experts(config, mask)
    router = router_class(config, process_groups(), visible_experts=visible_experts, **settings).to(DEVICE)
    router.set_layer_number(layer_number)
    return router


def make_layer(
    config: TransformerConfig, mask: RoutingMask, layer_number: int = 1, aux_loss_tokens: AuxLossTokens = "all"
) -> MaskMoELayer:
    """Build the MoE layer of a transformer layer's spec."""
    spec = get_maskmoe_decoder_block_spec(config, make_visible_experts(config, mask), aux_loss_tokens)
    mlp = spec.layer_specs[layer_number - 1].submodules.mlp
    layer = mlp(config, pg_collection=process_groups()).to(DEVICE)
    layer.set_layer_number(layer_number)
    return layer


def plan_ids(layer: MaskMoELayer, token_ids: TokenIds) -> TokenIds:
    """Return the ids with a plan for a layer that uses the first table of its mask."""
    topk = layer.config.moe_router_topk
    planner = DispatchPlanner(layer.router.visible_experts, topk, [0], process_groups().ep)
    return replace(token_ids, plan=planner.plan(token_ids))


def make_model(config: TransformerConfig, mask: RoutingMask, sequence_length: int = 16) -> MaskMoEGPTModel:
    """Build a GPT model on the device."""
    visible_experts = make_visible_experts(config, mask)
    return MaskMoEGPTModel(
        config,
        get_maskmoe_decoder_block_spec(config, visible_experts),
        visible_experts=visible_experts,
        vocab_size=mask.vocab_size,
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
    ).to(DEVICE)


def draw_parameters(module: torch.nn.Module) -> None:
    """Draw a module's parameters with a fixed seed; numbers that are drawn afterwards are the same each time, too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def take_metrics() -> dict[str, Tensor]:
    """Return the router losses [layers] recorded since the last call, by name."""
    metrics = get_moe_metrics_tracker().metrics
    values = {name: entry.values.clone() for name, entry in metrics.items()}
    metrics.clear()
    return values


@dataclass(frozen=True)
class ReferenceRouting:
    """The routing of some tokens by the definition of the method.

    Attributes:
        probs: float64 [tokens, experts], the weights.
        routing_map: bool [tokens, experts], the selected experts.
        load_balancing_loss: scalar, over all sequences together.
        seq_load_balancing_loss: scalar, the mean over sequences.
        z_loss: scalar.
    """

    probs: Tensor
    routing_map: Tensor
    load_balancing_loss: Tensor
    seq_load_balancing_loss: Tensor
    z_loss: Tensor


def reference_routing(
    logits: Tensor,
    visible: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    expert_bias: Tensor | None = None,
    aux_loss_tokens: str = "all",
    num_groups: int = 1,
    group_topk: int = 1,
    is_padding: Tensor | None = None,
    num_sequences: int = 1,
) -> ReferenceRouting:
    """Route tokens one after the other; the losses do not include their coefficients.

    Args:
        logits: [tokens, experts], ordered by position, then by sequence.
        visible: bool [tokens, experts].
        topk: k.
        score_function: softmax, sigmoid or sqrtsoftplus.
        pre_softmax: apply softmax before the selection.
        expert_bias: [experts], added to scores for the selection; None: no bias.
        aux_loss_tokens: tokens that load-balancing losses count, `all` or `routable`.
        num_groups: expert groups.
        group_topk: groups chosen for each token.
        is_padding: bool [tokens]; None: no padding.
        num_sequences: sequences in the batch.
    """
    logits = logits.double()
    num_tokens, num_experts = logits.shape
    bias = torch.zeros(num_experts, device=logits.device) if expert_bias is None else expert_bias
    probs, routing_map = torch.zeros_like(logits), torch.zeros_like(visible)
    score_sum = [torch.zeros_like(logits[0]) for _ in range(num_sequences)]
    assignments = torch.zeros(num_sequences, num_experts, device=logits.device, dtype=torch.float64)
    num_counted = [0] * num_sequences
    z_loss = logits.new_zeros(())
    num_real = num_tokens if is_padding is None else int((~is_padding).sum())
    for token in range(num_tokens):
        seen = visible[token].nonzero().flatten()
        z = logits[token, seen]
        if score_function == "softmax":
            scores = z.softmax(0)
            preference = scores if pre_softmax else z
        else:
            raw = z.sigmoid() if score_function == "sigmoid" else torch.nn.functional.softplus(z).sqrt()
            preference = raw + bias[seen]
            scores = raw / raw.sum()
        candidates = reference_groups(seen, preference, num_experts, topk, num_groups, group_topk)
        chosen = candidates[preference[candidates].topk(min(topk, len(candidates))).indices]
        if score_function == "softmax":
            weights = scores[chosen] if pre_softmax else z[chosen].softmax(0)
        else:
            weights = raw[chosen] / raw[chosen].sum() if topk > 1 else raw[chosen]
        probs = probs.index_put((torch.tensor(token), seen[chosen]), weights)
        routing_map[token, seen[chosen]] = True
        if is_padding is not None and is_padding[token]:
            continue
        if len(seen) > 1:
            z_loss = z_loss + z.exp().sum().log().square() / num_real
        if aux_loss_tokens == "all" or len(seen) > 1:
            sequence = token % num_sequences
            num_counted[sequence] += 1
            score_sum[sequence] = score_sum[sequence].index_add(0, seen, scores)
            assignments[sequence, seen[scores.topk(min(topk, len(seen))).indices]] += 1
    share = assignments.sum(dim=0) / assignments.sum().clamp(min=1)
    load_balancing_loss = num_experts * (share * sum(score_sum)).sum() / max(sum(num_counted), 1)
    # Each sequence is weighted by the square of its number of tokens.
    shares = assignments / assignments.sum(dim=1, keepdim=True).clamp(min=1)
    mean_counted = max(sum(num_counted) / num_sequences, 1e-12)
    of_sequences = [
        num_experts * (share * scores).sum() * number / mean_counted**2
        for share, scores, number in zip(shares, score_sum, num_counted, strict=True)
    ]
    return ReferenceRouting(probs, routing_map, load_balancing_loss, sum(of_sequences) / num_sequences, z_loss)


def reference_groups(
    seen: Tensor, preference: Tensor, num_experts: int, topk: int, num_groups: int, group_topk: int
) -> Tensor:
    """Return which of the visible experts `seen` are in the chosen groups, as indices into `seen`."""
    group_of_seen = (seen // (num_experts // num_groups)).tolist()
    places, smallest, score = topk // group_topk, preference.detach().min().item(), {}
    for group in set(group_of_seen):
        best = sorted(preference[[g == group for g in group_of_seen]].tolist(), reverse=True)[:places]
        score[group] = sum(best) + smallest * (places - len(best))
    chosen = sorted(score, key=score.get, reverse=True)[:group_topk]
    return torch.tensor([i for i, group in enumerate(group_of_seen) if group in chosen], device=seen.device)
