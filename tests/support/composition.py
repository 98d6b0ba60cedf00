"""The table of settings that can be combined with a routing mask.

A setting is shown by training runs in layouts whose losses equal the losses of one process, or by tests.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Works:
    """A row of settings that work with a routing mask.

    Attributes:
        evidence: Describes the comparison in words.
        flags: Words of the command line that at least one of the compared runs has, each in one piece.
        tests: Further tests as `FILE::FUNCTION`, below `tests/`.
        varied_flag: A flag that some of these runs have and some have not.
    """

    evidence: str
    flags: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    varied_flag: str | None = None


ROUTER = "transformer/test_router.py::"
EQUALS_STOCK = f"{ROUTER}test_all_visible_equals_stock_in_every_setting"
PACKED = "transformer/test_packed_documents.py::"
FOLLOWS = f"{ROUTER}test_follows_the_method"

TABLE: dict[str, Works] = {
    # The name of a row says in words what is combined with a routing mask.
    "tensor parallel with sequence parallel": Works("2 ranks", ("--tensor-model-parallel-size 2",)),
    "pipeline parallel": Works("2 ranks, 4 micro-batches a step", ("--pipeline-model-parallel-size 2",)),
    "interleaved pipeline": Works("2 ranks, 4 chunks", ("--num-layers-per-virtual-pipeline-stage 1",)),
    "expert parallel": Works("2 and 4 ranks", ("--expert-model-parallel-size",)),
    "expert tensor parallel": Works(
        "`--expert-tensor-parallel-size` 1 and 2 on 2 and 4 ranks", ("--expert-tensor-parallel-size",)
    ),
    "context parallel": Works("2 and 8 ranks", ("--context-parallel-size 2",)),
    "data parallel, gradient accumulation": Works(
        "2 ranks, 2 or 4 micro-batches a step", ("--micro-batch-size 2", "--global-batch-size 8")
    ),
    "distributed optimizer, overlapped gradients and parameters": Works(
        "2 ranks", ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    ),
    "Muon": Works(
        "2 ranks; bit-equal to Megatron-Core's model if all experts are visible",
        ("--optimizer muon",),
        tests=("transformer/test_muon.py::test_all_visible_equals_stock",),
    ),
    "Muon, with matrices divided among data-parallel ranks": Works(
        "2 ranks, losses to 5e-4 of one rank's", ("--optimizer muon", "--use-distributed-optimizer")
    ),
    "tensor 2 × expert 2 × pipeline 2": Works(
        "4 ranks",
        ("--tensor-model-parallel-size 2", "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"),
    ),
    "tensor 2 × pipeline 2 × data 2, expert 4": Works(
        "8 ranks",
        ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--expert-model-parallel-size 4"),
    ),
    "full recomputation": Works("bit-equal to none on one rank; on 4 ranks", ("--recompute-granularity full",)),
    "selective recomputation of `moe`, `shared_experts`, `mlp`, `core_attn`": Works(
        "that of `moe` bit-equal to none; 2 ranks", ("--recompute-modules moe",)
    ),
    "selective recomputation of norms, activation functions, and up-projections of latent attention": Works(
        "4 and 8 ranks; on one rank bit-equal to none, with LayerNorm",
        ("--recompute-modules layernorm moe_act mla_up_proj",),
        tests=("transformer/test_recomputation.py::test_recomputation_is_bit_equal_and_keeps_less",),
    ),
    "bf16": Works(
        "2 ranks, losses to 5e-4 of fp32's",
        tests=("training/test_composition.py::test_bf16_with_distributed_optimizer_agrees_roughly",),
    ),
    "tied and untied embeddings": Works("2 ranks", varied_flag="--untie-embeddings-and-output-weights"),
    "multi-token prediction": Works("2 and 4 ranks", ("--mtp-num-layers 1",)),
    "multi-token prediction by one repeated layer": Works("2 ranks", ("--mtp-use-repeated-layer",)),
    "multi-token prediction on another pipeline rank than the last": Works(
        "3 ranks", ("--pipeline-model-parallel-layout",)
    ),
    "multi-latent attention": Works(
        "2, 4 and 8 ranks, also with context parallel; whole models against transformers' DeepSeek-V3",
        ("--multi-latent-attention",),
        tests=("conversion/test_families_in_megatron.py::test_logits_equal_the_originals",),
    ),
    "grouped-query attention": Works("2 and 4 ranks", ("--group-query-attention",)),
    "norms of queries and keys over all heads": Works(
        "2 ranks, against transformers' OLMoE",
        tests=("transformer/test_norms.py::test_divided_heads_have_the_norm_of_olmoe",),
    ),
    "biases of linear layers and experts": Works(
        "2 ranks, without `--disable-bias-linear`",
        ("--expert-model-parallel-size 2",),
        varied_flag="--disable-bias-linear",
    ),
    "MoE layer frequency": Works("2 and 4 ranks", ("--moe-layer-freq",)),
    "shared experts, with a gate": Works("2 and 4 ranks", ("--moe-shared-expert-gate",)),
    "overlapped shared experts": Works("2 ranks", ("--moe-shared-expert-overlap",)),
    "latent experts": Works("2, 4 and 8 ranks", ("--moe-latent-size 24",)),
    "load-balancing loss of micro-batches, of sequences, and lists of them": Works(
        "2, 4 and 8 ranks", ("--moe-router-load-balancing-type aux_loss seq_aux_loss",)
    ),
    "global load-balancing loss": Works(
        "2 and 4 ranks; data parallel, too, if a step has one micro-batch",
        ("--moe-router-load-balancing-type", "global_aux_loss"),
    ),
    "load-balancing losses over the routable tokens": Works("against plain torch", tests=(FOLLOWS,)),
    "z-loss": Works("2 and 4 ranks", ("--moe-z-loss-coeff",)),
    "softmax before or after top-k, sigmoid": Works("against Megatron-Core's router", tests=(EQUALS_STOCK, FOLLOWS)),
    "square root of softplus": Works("2 ranks", ("--moe-router-score-function sqrtsoftplus",)),
    "expert bias": Works("2 ranks", ("--moe-router-enable-expert-bias",)),
    "group-limited routing": Works("2 ranks; only groups with a visible expert", ("--moe-router-group-topk 2",)),
    "capacity factor, dropping by weight": Works(
        "2 ranks; of each rank's tokens, as Megatron-Core has it", ("--moe-expert-capacity-factor",)
    ),
    "capacity factor, dropping by position, padding to capacity": Works(
        "2 ranks; padding has weight 0", ("--moe-pad-expert-input-to-capacity", "--moe-token-drop-policy position")
    ),
    "padding masks (`MaskMoEGPTModel`'s argument)": Works(
        "against Megatron-Core's router",
        tests=(
            f"{ROUTER}test_all_visible_equals_stock_with_padding",
            "transformer/test_ids_of_routers.py::test_padding_reaches_every_router",
        ),
    ),
    "replay of routing": Works(
        "against Megatron-Core's router; a recorded choice that the mask does not allow is refused with its token",
        tests=(
            "transformer/test_routing_replay.py::test_all_visible_equals_stock",
            "transformer/test_routing_replay.py::test_choice_that_the_mask_does_not_allow_is_refused",
        ),
    ),
    "dispatch planned from the token ids (rank-local masks)": Works(
        "2 and 4 ranks",
        ("--expert-model-parallel-size 2",),
        ("training/test_composition.py::test_dispatch_is_planned_where_it_can_be",),
    ),
    "all-gather dispatcher": Works("2 ranks", ("--moe-token-dispatcher-type allgather",)),
    "flex dispatcher with DeepEP, HybridEP or NCCL-EP": Works(
        "2 ranks, with stand-ins for the libraries: the real libraries have not been run",
        tests=("transformer/test_flex_dispatch.py::test_equals_other_ways_to_dispatch",),
    ),
    "packed documents": Works(
        "2 and 4 ranks, with and without pipeline; each document by itself",
        ("--dataloader-inter-document-masking",),
        tests=(f"{PACKED}test_equals_documents_one_by_one", f"{PACKED}test_multi_token_prediction_keeps_to_documents"),
    ),
    "packed documents with multi-token prediction": Works(
        "2 ranks", ("--dataloader-inter-document-masking", "--mtp-num-layers 2")
    ),
    "packed documents with the load-balancing loss of sequences": Works(
        "4 ranks, one sample in a micro-batch",
        ("--dataloader-inter-document-masking", "--moe-router-load-balancing-type aux_loss seq_aux_loss"),
    ),
    "attention masks and positions reset after a document, documents' ends without a loss": Works(
        "2 ranks; as packed documents",
        ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"),
        tests=("training/test_composition.py::test_packed_documents_equal_reset_masks",),
    ),
    "documents rearranged to fill in the middle": Works(
        "2 ranks; samples depend on their index only",
        ("--fim-data",),
        tests=("training/loop/test_batch.py::test_samples_depend_on_their_index_only",),
    ),
    "CUDA graphs of attention and of dense MLPs": Works(
        "bit-equal to none, with eager calls in place of graphs: real graphs have not been captured",
        tests=("transformer/test_transformer_layer.py::test_routing_is_as_without_graphs",),
    ),
    "hybrid models": Works(
        "1, 2 and 4 ranks, from the checkpoint of a GPT model; one model bit-equal to its twin",
        ("--hybrid-layer-pattern",),
        tests=("transformer/test_models.py::test_twins_compute_the_same_bits",),
    ),
    "gated delta net in hybrid models": Works(
        "2 ranks; one layer against transformers' Qwen3-Next",
        ("--hybrid-layer-pattern", "--linear-num-key-heads 4"),
        tests=("transformer/test_gated_delta_net.py::test_equals_the_layer_of_transformers",),
    ),
}
