"""The table of settings that can be combined with a routing mask.

A row names training runs whose losses equal the losses of one process, or tests.
"""

from dataclasses import dataclass

# Names in `RUNS`: for each run on one process, the runs whose losses are compared with the losses of that run. The
# compared runs continue from a checkpoint of the run on one process, or start like that run.
COMPARED = {
    "reference": [
        "expert parallel 2",
        "expert parallel 4",
        "expert parallel 2, distributed optimizer",
        "pipeline 2",
        "interleaved pipeline",
        "tensor 2 with sequence parallel",
        "context parallel 2",
        "data parallel 2, distributed optimizer",
        "tensor 2, expert parallel 2",
        "tensor 2, experts in 2 parts, data parallel 2",
        "all-gather, expert parallel 2",
        "all-gather, tensor 2, expert parallel 2",
        "full recompute",
        "selective recompute",
    ],
    "rich": [
        "rich, tensor 2, expert parallel 2",
        "rich, pipeline 2",
        "rich, interleaved pipeline",
        "rich, prediction before the last rank",
        "rich, context parallel 2, expert parallel 2",
        "rich, context parallel 2, tensor 2, expert parallel 2",
        "rich, context parallel 2, pipeline 2",
        "rich, overlapped shared experts",
        "rich, tensor 2, expert parallel 2, pipeline 2",
        "rich, full recompute, tensor 2, pipeline 2",
        "rich, selective recompute",
        "rich hybrid, tensor 2, expert parallel 2",
        "rich hybrid, context parallel 2, expert parallel 2",
        "rich hybrid, interleaved pipeline",
        "rich hybrid, full recompute, tensor 2, pipeline 2",
    ],
    "repeated prediction": [
        "repeated prediction, tensor 2",
        "repeated prediction, pipeline 2",
        "repeated prediction, hybrid, tensor 2",
    ],
    "data parallel rich": ["data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2"],
    "experts of one rank": [
        "experts of one rank, expert parallel 2",
        "experts of one rank, tensor 2, expert parallel 2",
        "experts of one rank, context parallel 2, expert parallel 2",
        "experts of one rank, selective recompute",
        "experts of one rank, full recompute, expert parallel 2, pipeline 2",
        "experts of one rank, expert parallel 2, interleaved pipeline",
        "experts of one rank, hybrid, full recompute, expert parallel 2, pipeline 2",
    ],
    "biases": ["biases, expert parallel 2", "biases, tensor 2, expert parallel 2"],
    "dense layers below experts of one rank": ["dense layers below experts of one rank, expert parallel 2, pipeline 2"],
    "groups": ["groups, tensor 2, expert parallel 2", "groups, expert parallel 2"],
    "groups, experts of one rank": ["groups, experts of one rank, expert parallel 2"],
    "norms over all heads": ["norms over all heads, tensor 2"],
    "latent": [
        "latent, tensor 2, expert parallel 2",
        "latent, pipeline 2",
        "latent, all-gather, expert parallel 2",
        "latent, recomputed parts, tensor 2, expert parallel 2",
        "latent, recomputed parts, tensor 2, experts in 2 parts, pipeline 2",
        "latent, tensor 2, expert parallel 2, pipeline 2",
        "latent, context parallel 2, tensor 2, expert parallel 2, pipeline 2",
        "latent hybrid, tensor 2, expert parallel 2",
    ],
    "whole queries": ["whole queries, tensor 2"],
    "capacity": ["capacity, expert parallel 2", "capacity, pipeline 2"],
    "padded capacity": ["padded capacity, expert parallel 2", "padded capacity, pipeline 2"],
    "packed documents": [
        "packed documents, pipeline 2",
        "packed documents, interleaved pipeline",
        "packed documents, tensor 2, expert parallel 2",
        "packed documents, selective recompute",
        "packed documents, full recompute, tensor 2, pipeline 2",
        "packed documents, hybrid, pipeline 2",
    ],
    "packed documents, single samples": ["packed documents, single samples, tensor 2, pipeline 2"],
    "packed documents, experts of one rank": ["packed documents, experts of one rank, expert parallel 2"],
    "reset masks": ["reset masks, pipeline 2", "reset masks, tensor 2"],
    "filled-in middle": ["filled-in middle, pipeline 2"],
    "global loss": ["global loss, expert parallel 2", "global loss, tensor 2, data parallel 2"],
    "muon": ["muon, expert parallel 2", "muon, tensor 2, expert parallel 2", "muon, hybrid, expert parallel 2"],
    "hybrid": ["hybrid, pipeline 2", "hybrid, tensor 2, expert parallel 2"],
    "gated delta net": [
        "gated delta net, pipeline 2",
        "gated delta net, tensor 2, expert parallel 2",
        "gated delta net, context parallel 2, expert parallel 2",
    ],
}
BF16 = "bf16, distributed optimizer"
# The same for runs in bf16, whose losses agree to the precision of bf16.
COMPARED_IN_BF16 = {
    "muon in shares": ["muon in shares, expert parallel 2", "muon in shares, data parallel 2"],
}


@dataclass(frozen=True)
class Works:
    """A row of settings that work with a routing mask.

    Attributes:
        evidence: Describes the comparison in words.
        flags: Words of the command line that all runs of the row have, each in one piece.
        runs: Names of compared runs of `RUNS`; each has a description.
        tests: Further tests as `FILE::FUNCTION`, below `tests/`.
        varied_flag: A flag that some of the runs have and some have not.
    """

    evidence: str
    flags: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    varied_flag: str | None = None


RICH = tuple(COMPARED["rich"])
ROUTER = "transformer/test_router.py::"
EQUALS_STOCK = f"{ROUTER}test_all_visible_equals_stock_in_every_setting"
PACKED = "transformer/test_packed_documents.py::"
FOLLOWS = f"{ROUTER}test_follows_the_method"

TABLE: dict[str, Works] = {
    # The name of a row says in words what is combined with a routing mask.
    "tensor parallel with sequence parallel": Works(
        "2 ranks",
        ("--tensor-model-parallel-size 2",),
        ("tensor 2 with sequence parallel", "rich, tensor 2, expert parallel 2"),
    ),
    "pipeline parallel": Works(
        "2 ranks, 4 micro-batches a step", ("--pipeline-model-parallel-size 2",), ("pipeline 2", "rich, pipeline 2")
    ),
    "interleaved pipeline": Works(
        "2 ranks, 4 chunks",
        ("--num-layers-per-virtual-pipeline-stage 1",),
        ("interleaved pipeline", "rich, interleaved pipeline"),
    ),
    "expert parallel": Works(
        "2 and 4 ranks", ("--expert-model-parallel-size",), ("expert parallel 2", "expert parallel 4")
    ),
    "expert tensor parallel": Works(
        "`--expert-tensor-parallel-size` 1 and 2 on 2 and 4 ranks",
        ("--expert-tensor-parallel-size",),
        ("tensor 2, expert parallel 2", "tensor 2, experts in 2 parts, data parallel 2"),
    ),
    "context parallel": Works(
        "2 and 4 ranks",
        ("--context-parallel-size 2",),
        (
            "context parallel 2",
            "rich, context parallel 2, expert parallel 2",
            "rich, context parallel 2, tensor 2, expert parallel 2",
            "rich, context parallel 2, pipeline 2",
            "experts of one rank, context parallel 2, expert parallel 2",
        ),
    ),
    "data parallel, gradient accumulation": Works(
        "2 ranks, 2 or 4 micro-batches a step",
        ("--micro-batch-size 2", "--global-batch-size 8"),
        ("expert parallel 2",),
    ),
    "distributed optimizer, overlapped gradients and parameters": Works(
        "2 ranks",
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
        ("data parallel 2, distributed optimizer",),
    ),
    "Muon": Works(
        "2 ranks; bit-equal to Megatron-Core's model if all experts are visible",
        ("--optimizer muon",),
        tuple(COMPARED["muon"]),
        ("transformer/test_muon.py::test_all_visible_equals_stock",),
    ),
    "Muon, with matrices divided among data-parallel ranks": Works(
        "2 ranks, losses to 5e-4 of one rank's",
        ("--optimizer muon", "--use-distributed-optimizer"),
        tuple(COMPARED_IN_BF16["muon in shares"]),
    ),
    "tensor 2 × expert 2 × pipeline 2": Works(
        "4 ranks",
        ("--tensor-model-parallel-size 2", "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"),
        ("rich, tensor 2, expert parallel 2, pipeline 2",),
    ),
    "tensor 2 × pipeline 2 × data 2, expert 4": Works(
        "8 ranks",
        ("--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--expert-model-parallel-size 4"),
        ("data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2",),
    ),
    "full recomputation": Works(
        "bit-equal to none on one rank; on 4 ranks",
        ("--recompute-granularity full",),
        ("full recompute", "rich, full recompute, tensor 2, pipeline 2"),
    ),
    "selective recomputation of `moe`, `shared_experts`, `mlp`, `core_attn`": Works(
        "that of `moe` bit-equal to none; 2 ranks",
        ("--recompute-modules moe",),
        ("selective recompute", "rich, selective recompute"),
    ),
    "selective recomputation of norms, activation functions, and up-projections of latent attention": Works(
        "2, 4 and 8 ranks; on one rank bit-equal to none, with LayerNorm",
        ("--recompute-modules layernorm moe_act mla_up_proj",),
        (
            "latent, recomputed parts, tensor 2, expert parallel 2",
            "latent, recomputed parts, tensor 2, experts in 2 parts, pipeline 2",
            "latent, context parallel 2, tensor 2, expert parallel 2, pipeline 2",
        ),
        ("transformer/test_recomputation.py::test_recomputation_is_bit_equal_and_keeps_less",),
    ),
    "bf16": Works("2 ranks, losses to 5e-4 of fp32's", ("--bf16",), (BF16,)),
    "tied and untied embeddings": Works(
        "2 ranks",
        runs=("pipeline 2", "rich, tensor 2, expert parallel 2", "rich, pipeline 2"),
        varied_flag="--untie-embeddings-and-output-weights",
    ),
    "multi-token prediction": Works("2 and 4 ranks", ("--mtp-num-layers 1",), RICH),
    "multi-token prediction by one repeated layer": Works(
        "2 ranks", ("--mtp-use-repeated-layer",), tuple(COMPARED["repeated prediction"])
    ),
    "multi-token prediction on another pipeline rank than the last": Works(
        "3 ranks", ("--pipeline-model-parallel-layout",), ("rich, prediction before the last rank",)
    ),
    "multi-latent attention": Works(
        "2, 4 and 8 ranks, also with context parallel; one layer against transformers' DeepSeek-V3",
        ("--multi-latent-attention",),
        (*COMPARED["latent"], *COMPARED["whole queries"]),
        ("transformer/test_latent_attention.py::test_equals_attention_of_transformers",),
    ),
    "grouped-query attention": Works("2 and 4 ranks", ("--group-query-attention",), RICH),
    "norms of queries and keys over all heads": Works(
        "2 ranks", ("--qk-layernorm-all-heads",), tuple(COMPARED["norms over all heads"])
    ),
    "biases of linear layers and experts": Works(
        "2 ranks, without `--disable-bias-linear`",
        ("--expert-model-parallel-size 2",),
        tuple(COMPARED["biases"]),
    ),
    "MoE layer frequency": Works("2 and 4 ranks", ("--moe-layer-freq",), RICH),
    "shared experts, with a gate": Works("2 and 4 ranks", ("--moe-shared-expert-gate",), RICH),
    "overlapped shared experts": Works(
        "2 ranks", ("--moe-shared-expert-overlap",), ("rich, overlapped shared experts",)
    ),
    "latent experts": Works("2, 4 and 8 ranks", ("--moe-latent-size 24",), tuple(COMPARED["latent"])),
    "load-balancing loss of micro-batches, of sequences, and lists of them": Works(
        "2, 4 and 8 ranks",
        ("--moe-router-load-balancing-type aux_loss seq_aux_loss",),
        (*RICH, "data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2"),
    ),
    "global load-balancing loss": Works(
        "2 and 4 ranks; data parallel, too, if a step has one micro-batch",
        ("--moe-router-load-balancing-type", "global_aux_loss"),
        (*RICH, *COMPARED["global loss"]),
    ),
    "load-balancing losses over the routable tokens": Works("against plain torch", tests=(FOLLOWS,)),
    "z-loss": Works("2 and 4 ranks", ("--moe-z-loss-coeff",), RICH),
    "softmax before or after top-k, sigmoid": Works("against Megatron-Core's router", tests=(EQUALS_STOCK, FOLLOWS)),
    "square root of softplus": Works(
        "2 ranks", ("--moe-router-score-function sqrtsoftplus",), tuple(COMPARED["groups"])
    ),
    "expert bias": Works("2 ranks", ("--moe-router-enable-expert-bias",), tuple(COMPARED["groups"])),
    "group-limited routing": Works(
        "2 ranks; only groups with a visible expert",
        ("--moe-router-group-topk 2",),
        (*COMPARED["groups"], *COMPARED["groups, experts of one rank"]),
    ),
    "capacity factor, dropping by weight": Works(
        "2 ranks; of each rank's tokens, as Megatron-Core has it",
        ("--moe-expert-capacity-factor",),
        tuple(COMPARED["capacity"]),
    ),
    "capacity factor, dropping by position, padding to capacity": Works(
        "2 ranks; padding has weight 0",
        ("--moe-pad-expert-input-to-capacity", "--moe-token-drop-policy position"),
        tuple(COMPARED["padded capacity"]),
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
        (*COMPARED["experts of one rank"], *COMPARED["dense layers below experts of one rank"]),
    ),
    "all-gather dispatcher": Works(
        "2 ranks",
        ("--moe-token-dispatcher-type allgather",),
        ("all-gather, expert parallel 2", "all-gather, tensor 2, expert parallel 2"),
    ),
    "flex dispatcher with DeepEP, HybridEP or NCCL-EP": Works(
        "2 ranks, with stand-ins for the libraries: the real libraries have not been run",
        tests=("transformer/test_flex_dispatch.py::test_equals_other_ways_to_dispatch",),
    ),
    "packed documents": Works(
        "2 and 4 ranks, with and without pipeline; each document by itself",
        ("--dataloader-inter-document-masking",),
        (
            *COMPARED["packed documents"],
            *COMPARED["packed documents, single samples"],
            *COMPARED["packed documents, experts of one rank"],
        ),
        (f"{PACKED}test_equals_documents_one_by_one", f"{PACKED}test_multi_token_prediction_keeps_to_documents"),
    ),
    "packed documents with multi-token prediction": Works(
        "2 and 4 ranks",
        ("--dataloader-inter-document-masking", "--mtp-num-layers 2"),
        tuple(COMPARED["packed documents"]),
    ),
    "packed documents with the load-balancing loss of sequences": Works(
        "4 ranks, one sample in a micro-batch",
        ("--dataloader-inter-document-masking", "--moe-router-load-balancing-type aux_loss seq_aux_loss"),
        tuple(COMPARED["packed documents, single samples"]),
    ),
    "attention masks and positions reset after a document, documents' ends without a loss": Works(
        "2 ranks; each document by itself",
        ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"),
        tuple(COMPARED["reset masks"]),
        (f"{PACKED}test_masks_of_a_dataset_equal_documents_one_by_one",),
    ),
    "documents rearranged to fill in the middle": Works(
        "2 ranks; samples depend on their index only",
        ("--fim-data",),
        tuple(COMPARED["filled-in middle"]),
        ("training/test_fill_in_middle.py::test_samples_depend_on_their_index_only",),
    ),
    "CUDA graphs of attention and of dense MLPs": Works(
        "bit-equal to none, with eager calls in place of graphs: real graphs have not been captured",
        tests=("transformer/test_cuda_graphs.py::test_routing_is_as_without_graphs",),
    ),
    "hybrid models": Works(
        "1, 2 and 4 ranks, from the checkpoint of a GPT model; one model bit-equal to its twin",
        ("--hybrid-layer-pattern",),
        (
            "rich hybrid, tensor 2, expert parallel 2",
            "rich hybrid, context parallel 2, expert parallel 2",
            "rich hybrid, interleaved pipeline",
            "rich hybrid, full recompute, tensor 2, pipeline 2",
            "repeated prediction, hybrid, tensor 2",
            "experts of one rank, hybrid, full recompute, expert parallel 2, pipeline 2",
            "latent hybrid, tensor 2, expert parallel 2",
            "packed documents, hybrid, pipeline 2",
            "muon, hybrid, expert parallel 2",
            *COMPARED["hybrid"],
        ),
        ("transformer/test_hybrid_model.py::test_twins_compute_the_same_bits",),
    ),
    "gated delta net in hybrid models": Works(
        "2 ranks; one layer against transformers' Qwen3-Next",
        ("--hybrid-layer-pattern", "--linear-num-key-heads 2"),
        tuple(COMPARED["gated delta net"]),
        ("transformer/test_gated_delta_net.py::test_equals_the_layer_of_transformers",),
    ),
}
