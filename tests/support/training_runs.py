"""The training runs that tests share, by name.

A test names the runs that it looks at with `@pytest.mark.runs(name, …)`. Every name is written out here and in the
test, so that a search for the name finds both.
"""

from dataclasses import replace

import pytest
from support.paths import TESTS
from support.training import Run

DISTRIBUTED = "--use-distributed-optimizer"
# Each parameter is a bucket of its own, and small buckets are padded.
MANY_BUCKETS = f"{DISTRIBUTED} --overlap-grad-reduce --ddp-bucket-size 1"
# A module that reads a parameter too early reads the weights of the step before.
GATHERED = f"{MANY_BUCKETS} --overlap-param-gather"
EXPERT_2 = "--expert-model-parallel-size 2"
PIPELINE_2 = "--pipeline-model-parallel-size 2"
# A run on one rank pads the vocabulary to 512 ids. These runs would pad it to 1,024 ids, but keep a checkpoint's 512.
TENSOR_2 = "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 512"
TENSOR_EXPERT_2 = f"{TENSOR_2} --expert-tensor-parallel-size 1 {EXPERT_2}"
CONTEXT_2 = "--context-parallel-size 2"
INTERLEAVED = f"{PIPELINE_2} --num-layers-per-virtual-pipeline-stage 1"
ALL_GATHER = "--moe-token-dispatcher-type allgather"
TRANSFORMER_ENGINE = "--transformer-impl transformer_engine"
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
# Runs save at iteration 7, see `SETTINGS`, and at their end.
UNTIL_8 = "--exit-interval 8"
UNTIL_12 = "--exit-interval 12"
UNTIL_10 = "--exit-interval 10"
FROM_7 = f"{UNTIL_12} --ckpt-step 7"
BLEND_12 = "--data-path 1 data --train-iters 12"
IN_ITERATIONS = "--train-iters --lr-warmup-iters"
SAMPLES = "--train-samples 80 --lr-warmup-samples 24"
# The first 4 iterations have 4 samples, the remaining 8 iterations have 8 samples. Thresholds are in tokens.
GROWING_BATCHES = f"{SAMPLES} --step-batch-size-schedule '0:4 512:8'"
EIGHT_MICRO_BATCHES = "--micro-batch-size 1 --exit-interval 6"
OTHER_MASK = (str(TESTS / "training" / "pretrain_with_other_mask.py"),)
MEGATRONS_LAYERS = (str(TESTS / "training" / "pretrain_with_megatrons_layers.py"),)
# Scores and losses that Megatron-Core's hash layers compute as a routing mask does.
MEGATRONS_MODEL = "--hybrid-layer-pattern *E*E*E*E --moe-router-score-function sigmoid --moe-aux-loss-coeff 0"
STUB_TRANSFORMER_ENGINE = (str(TESTS / "training" / "pretrain_with_stub_transformer_engine.py"),)

RUNS = {
    # Initial weights depend on the layout. So runs that are compared over layouts start from one checkpoint.
    "start": Run("--exit-interval 1", saves=True),
    "start, distributed optimizer": Run(f"--exit-interval 1 {DISTRIBUTED}", saves=True),
    "reference": Run(),
    # Lengths in samples.
    "length in samples": Run("--train-samples 170 --lr-warmup-samples 24 --lr-decay-samples 168", omits=IN_ITERATIONS),
    "batches before they grow": Run(f"{SAMPLES} --global-batch-size 4 --exit-interval 4", omits=IN_ITERATIONS),
    "growing batches": Run(
        f"{GROWING_BATCHES} --save-interval 4 --async-save", saves=True, omits=f"{IN_ITERATIONS} --global-batch-size"
    ),
    "growing batches, resumed": Run(
        f"{GROWING_BATCHES} --ckpt-step 4", continues="growing batches", omits=f"{IN_ITERATIONS} --global-batch-size"
    ),
    # Layouts.
    "expert parallel 2": Run(EXPERT_2, ranks=2, continues="start", torchrun=True),
    "expert parallel 2, undisturbed": Run(EXPERT_2, ranks=2, saves=True),
    "pipeline 2": Run(f"{PIPELINE_2} --save-interval 21", ranks=2, continues="start", saves=True),
    "interleaved pipeline": Run(INTERLEAVED, ranks=2, continues="start"),
    "data parallel 2, distributed optimizer": Run(
        f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather", ranks=2, continues="start, distributed optimizer"
    ),
    "tensor 2, larger micro-batches in evaluation": Run(
        f"{TENSOR_2} --eval-micro-batch-size 4 --exit-interval 5", ranks=2, continues="start"
    ),
    "tensor 2, experts in 2 parts, data parallel 2": Run(
        f"{TENSOR_2} --expert-tensor-parallel-size 2 {EXPERT_2}", ranks=4, continues="start"
    ),
    # Recomputation.
    "full recompute": Run(FULL_RECOMPUTE),
    "selective recompute": Run("--recompute-granularity selective --recompute-modules moe"),
    "pipeline 2, 8 micro-batches": Run(f"{PIPELINE_2} {EIGHT_MICRO_BATCHES}", ranks=2),
    "pipeline 2, 8 micro-batches, full recompute": Run(f"{PIPELINE_2} {EIGHT_MICRO_BATCHES} {FULL_RECOMPUTE}", ranks=2),
    "hybrid, pipeline 2, 8 micro-batches, full recompute": Run(
        f"{PIPELINE_2} {EIGHT_MICRO_BATCHES} {FULL_RECOMPUTE} --num-layers 8 --hybrid-layer-pattern *E*E|*E*E", ranks=2
    ),
    # Stop and resume.
    "fp32": Run(f"{DROPOUT} {UNTIL_12}", saves=True),
    "another learning rate": Run(
        f"{DROPOUT} {FROM_7} --lr 1e-3 --min-lr 0 --override-opt-param-scheduler", continues="fp32"
    ),
    "shortened": Run(f"{DROPOUT} {FROM_7} --train-iters 18 --override-opt-param-scheduler", continues="fp32"),
    # A blend, even of one dataset, has exactly the requested samples.
    "evaluated often": Run(f"{BLEND_12} --eval-interval 1", saves=True),
    "evaluated often, then seldom": Run(
        f"{BLEND_12} --ckpt-step 7 --eval-interval 4 --eval-iters 2", continues="evaluated often"
    ),
    "bf16, distributed optimizer": Run(f"--bf16 {MANY_BUCKETS} {UNTIL_12}", ranks=2, saves=True),
    "bf16, distributed optimizer, resumed": Run(
        f"--bf16 {MANY_BUCKETS} {FROM_7}", ranks=2, continues="bf16, distributed optimizer"
    ),
    "stage without experts, distributed optimizer": Run(
        f"{PIPELINE_2} --moe-layer-freq [0,0,1,1] {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True
    ),
    "stage without experts, distributed optimizer, resumed on 1": Run(
        f"--moe-layer-freq [0,0,1,1] {DISTRIBUTED} {FROM_7}", continues="stage without experts, distributed optimizer"
    ),
    # Another expert parallel size after a stop.
    "experts on 2, distributed optimizer": Run(f"{EXPERT_2} {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True),
    "experts on 2, distributed optimizer, resumed on 1": Run(
        f"{DISTRIBUTED} {FROM_7}", continues="experts on 2, distributed optimizer"
    ),
    "saved asynchronously": Run(f"{DISTRIBUTED} {DROPOUT} {UNTIL_12} --async-save", ranks=2, saves=True),
    "saved asynchronously, resumed": Run(
        f"{DISTRIBUTED} {DROPOUT} {FROM_7} --async-save --no-save-optim --no-save-rng",
        ranks=2,
        continues="saved asynchronously",
        mask=None,
    ),
    # Another layout after a stop.
    "joint, distributed optimizer": Run(
        f"{TENSOR_2} --expert-tensor-parallel-size 1 --expert-model-parallel-size 4 {DISTRIBUTED} {UNTIL_12}",
        ranks=4,
        saves=True,
    ),
    "joint, distributed optimizer, resumed on 1": Run(
        f"{DISTRIBUTED} {FROM_7}", continues="joint, distributed optimizer"
    ),
    "joint, distributed optimizer, resumed as pipeline 2, expert parallel 2, data parallel 2": Run(
        f"{PIPELINE_2} {EXPERT_2} {DISTRIBUTED} {FROM_7}", ranks=4, continues="joint, distributed optimizer"
    ),
    # Modules of Transformer Engine after a stop, and local modules after another stop.
    "on Transformer Engine": Run(
        f"{DISTRIBUTED} {TRANSFORMER_ENGINE} --moe-grouped-gemm --exit-interval 4",
        continues="start, distributed optimizer",
        program=STUB_TRANSFORMER_ENGINE,
        imports_first=False,
        saves=True,
    ),
    "on Transformer Engine, then local": Run(f"{DISTRIBUTED} {UNTIL_8}", continues="on Transformer Engine"),
    # Other masks.
    "second rank without tokens, on 1": Run(UNTIL_12, mask="starving.safetensors", saves=True),
    "second rank without tokens": Run(
        f"{EXPERT_2} {FROM_7} --collapse-intervals 2",
        ranks=2,
        continues="second rank without tokens, on 1",
        mask="starving.safetensors",
    ),
    # Another mask after a stop.
    "wider mask": Run(
        f"{DROPOUT} --change-routing-mask --ckpt-step 7 --save-interval 8 --exit-interval 10",
        continues="fp32",
        mask="wider.safetensors",
        saves=True,
    ),
    "wider mask, reference": Run(f"{DROPOUT} {UNTIL_10} --ckpt-step 7", continues="fp32", program=OTHER_MASK),
    "Megatron's own model": Run(
        f"{MEGATRONS_MODEL} {EXPERT_2} {UNTIL_12}",
        ranks=2,
        program=MEGATRONS_LAYERS,
        mask="megatrons.safetensors",
        omits="--num-layers",
        saves=True,
    ),
    "Megatron's own model, continued with its mask": Run(
        f"{MEGATRONS_MODEL} {EXPERT_2} {UNTIL_10} --change-routing-mask --ckpt-step 7",
        ranks=2,
        continues="Megatron's own model",
        mask="megatrons.safetensors",
        omits="--num-layers",
        saves=True,
    ),
    "Megatron's own model, continued from ours": Run(
        f"{MEGATRONS_MODEL} {EXPERT_2} {UNTIL_12} --ckpt-step 10",
        ranks=2,
        continues="Megatron's own model, continued with its mask",
        program=MEGATRONS_LAYERS,
        mask="megatrons.safetensors",
        omits="--num-layers",
    ),
    "planned dispatch, distributed optimizer": Run(
        f"{EXPERT_2} {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True, mask="rank_local.safetensors"
    ),
    "planned dispatch, gathered parameters": Run(
        f"{EXPERT_2} {GATHERED} {UNTIL_8}", ranks=2, mask="rank_local.safetensors"
    ),
    "dispatch without plans, on 1": Run(
        f"--change-routing-mask {DISTRIBUTED} {FROM_7}", continues="planned dispatch, distributed optimizer"
    ),
    "dispatch without plans": Run(
        f"--change-routing-mask {EXPERT_2} {DISTRIBUTED} {FROM_7}",
        ranks=2,
        continues="planned dispatch, distributed optimizer",
    ),
    "experts of one rank, expert parallel 2, logged seldom": Run(
        f"{EXPERT_2} --moe-router-topk 3 --moe-z-loss-coeff 1e-3 --moe-per-layer-logging --log-interval 2 "
        "--log-throughput --eval-interval 3 --exit-interval 4",
        ranks=2,
        mask="rank_local.safetensors",
    ),
}


# For each run on one process, the runs in other layouts whose losses are compared with the losses of that run. They
# continue from a checkpoint of the run on one process, or start like that run.
COMPARED = {
    "reference": [
        "expert parallel 2",
        "pipeline 2",
        "interleaved pipeline",
        "data parallel 2, distributed optimizer",
        "tensor 2, experts in 2 parts, data parallel 2",
    ]
}


def add_model(
    name: str,
    flags: str,
    layouts: dict[str, tuple[int, str]],
    *,
    mask: str = "mask.safetensors",
    omits: str | None = None,
) -> None:
    """Add a run of a model on one process, and runs of the model in several layouts, to `RUNS` and `COMPARED`.

    The run on one process saves after 4 of 8 iterations. The runs in other layouts continue from that checkpoint.

    Args:
        name: Name of the run on one process.
        flags: Flags of all runs.
        layouts: Number of ranks and further flags of each layout, by the name of its run. Runs of one rank resume the
            model and are not in `COMPARED`.
        mask: Routing mask of all runs.
        omits: A flag of `SETTINGS` that all runs leave out.
    """
    flags = f"--exit-interval 8 {flags}"
    RUNS[name] = Run(f"{flags} --save-interval 4", saves=True, mask=mask, omits=omits)
    for layout, (ranks, more_flags) in layouts.items():
        RUNS[layout] = Run(f"{flags} {more_flags} --ckpt-step 4", ranks=ranks, continues=name, mask=mask, omits=omits)
    COMPARED[name] = [layout for layout, (ranks, _) in layouts.items() if ranks > 1]


BALANCING_LOSSES = """
    --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 3e-2
"""
MORE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe shared_experts mlp core_attn"
# All optional parts of a model at once: a fault in one part shows in the losses.
RICH = f"""
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --moe-layer-freq [1,0,1,1]
    --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --moe-z-loss-coeff 1e-3 {BALANCING_LOSSES}
"""
# Experts are selected by scores with a bias, from 2 of 4 groups of 2 experts.
GROUPS = """
    --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk 3
    --moe-router-score-function sqrtsoftplus --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1
"""
# As in DeepSeek-V3, and experts of a smaller width.
LATENT_ATTENTION = "--multi-latent-attention --qk-layernorm --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8"
LATENT = f"""
    {LATENT_ATTENTION} --q-lora-rank 24 --v-head-dim 12 --rope-type yarn --rotary-scaling-factor 4 --mscale-all-dim 1
    --moe-latent-size 24 --moe-grouped-gemm --moe-layer-freq [0,1,1,1] --moe-shared-expert-intermediate-size 16
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1
    --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 --mtp-num-layers 1
"""
CAPACITY = "--moe-router-topk 3 --moe-expert-capacity-factor 0.8"
# Most samples of 64 tokens hold the end of a document and the beginning of the next one.
DOCUMENTS = "--data-path ended --seq-length 64 --max-position-embeddings 64"
PACKED = f"{DOCUMENTS} --dataloader-inter-document-masking"
# Rotary embeddings do not depend on `--reset-position-ids`, learned ones do.
RESET = f"""
    {DOCUMENTS} --reset-attention-mask --reset-position-ids --eod-mask-loss --position-embedding-type learned_absolute
"""
FILL_IN_MIDDLE = "--data-path ended --fim-data --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer"
# One micro-batch a step, so that the global loss does not depend on the number of ranks that share the micro-batch.
WHOLE_BATCH = "--moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 2e-2 3e-2"

# Grouped-query attention, one dense layer, gated shared experts, all balancing losses, z-loss and multi-token
# prediction.
add_model(
    "rich",
    f"{RICH} --mtp-num-layers 1",
    {
        "rich, resumed": (1, ""),
        "rich, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "rich, pipeline 2": (2, PIPELINE_2),
        "rich, prediction before the last rank": (
            3,
            "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Et*3|tm|L",
        ),
        "rich, overlapped shared experts": (2, f"{TENSOR_EXPERT_2} --moe-shared-expert-overlap"),
        "rich, full recompute, tensor 2, pipeline 2": (4, f"{TENSOR_2} {PIPELINE_2} {FULL_RECOMPUTE}"),
    },
    mask="five_layers.safetensors",
    omits="--untie-embeddings-and-output-weights",
)
# Two schedules of the same steps, with four micro-batches and Megatron's dispatcher.
SCHEDULED = f"""
    {RICH} --moe-router-topk 1 --moe-router-pre-softmax --bf16 {EXPERT_2} --micro-batch-size 1 --exit-interval 6
"""
RUNS["rich, bf16, expert parallel 2"] = Run(SCHEDULED, ranks=2)
RUNS["rich, bf16, overlapped dispatch"] = Run(f"{SCHEDULED} --overlap-moe-expert-parallel-comm", ranks=2)
PREDICTED = f"{SCHEDULED} --mtp-num-layers 1"
for name, flags in {"one at a time": "", "overlapped": "--overlap-moe-expert-parallel-comm"}.items():
    RUNS[f"rich, bf16, prediction, {name}"] = Run(
        f"{PREDICTED} {flags}",
        ranks=2,
        mask="five_layers.safetensors",
        omits="--untie-embeddings-and-output-weights",
    )
# Multi-token prediction that uses one layer twice.
add_model(
    "repeated prediction",
    f"{RICH} --mtp-num-layers 2 --mtp-use-repeated-layer",
    {"repeated prediction, tensor 2": (2, TENSOR_2), "repeated prediction, pipeline 2": (2, PIPELINE_2)},
    mask="six_layers.safetensors",
    omits="--untie-embeddings-and-output-weights",
)
# Grouped-query attention, one dense layer, gated shared experts, two balancing losses and z-loss.
add_model(
    "data parallel rich",
    f"{RICH} --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1e-2 2e-2 {DISTRIBUTED}",
    {
        "data parallel rich, tensor 2, expert parallel 4, pipeline 2, data parallel 2": (
            8,
            f"{TENSOR_2} --expert-tensor-parallel-size 1 --expert-model-parallel-size 4 {PIPELINE_2}",
        ),
        "data parallel rich, gathered parameters": (2, f"{EXPERT_2} {GATHERED} --moe-shared-expert-overlap"),
    },
)
# All linear layers have biases, those of experts, too.
add_model(
    "biases",
    "--moe-z-loss-coeff 1e-3 --init-method-std 0.1 --weight-decay 0.1",
    {"biases, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2)},
    omits="--disable-bias-linear",
)
# Group-limited routing with an expert bias, scores are the square root of softplus.
add_model(
    "groups",
    GROUPS,
    {
        "groups, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
    },
)
# Multi-latent attention with YaRN, latent experts, a dense layer, a shared expert, an expert bias and multi-token
# prediction.
add_model(
    "latent",
    LATENT,
    {
        "latent, resumed": (1, ""),
        "latent, all-gather, expert parallel 2": (2, f"{ALL_GATHER} {EXPERT_2}"),
        "latent, tensor 2, experts in 2 parts, pipeline 2": (
            4,
            f"{TENSOR_2} --expert-tensor-parallel-size 2 {PIPELINE_2}",
        ),
    },
    mask="five_layers.safetensors",
)
add_model(
    "latent without prediction",
    LATENT.replace("--mtp-num-layers 1", ""),
    {
        "latent without prediction, context parallel 2, tensor 2, expert parallel 2, pipeline 2": (
            8,
            f"{CONTEXT_2} {TENSOR_EXPERT_2} {PIPELINE_2}",
        ),
    },
)
# Experts drop the tokens with the lowest weights beyond their capacity.
add_model("capacity", CAPACITY, {"capacity, expert parallel 2": (2, EXPERT_2)})
# Experts drop the last tokens beyond their capacity and pad to their capacity.
add_model(
    "padded capacity",
    f"{CAPACITY} --moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
    {"padded capacity, expert parallel 2": (2, EXPERT_2)},
)
# The load-balancing loss of the whole batch, with one micro-batch a step.
add_model(
    "global loss",
    f"{WHOLE_BATCH} --micro-batch-size 8",
    {
        "global loss, expert parallel 2": (2, f"{EXPERT_2} --micro-batch-size 4"),
        "global loss, tensor 2, data parallel 2": (4, f"{TENSOR_2} --micro-batch-size 4"),
    },
)
# Muon rounds to bf16 by default, and orthogonalises each tensor-parallel part of a matrix for itself. Layouts can be
# compared without both.
MUON = "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high"
# Matrices are updated by Muon.
add_model(
    "muon",
    MUON,
    {"muon, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2)},
)
# Matrices are updated by Muon, each by one data-parallel rank, in bf16.
add_model(
    "muon in shares",
    f"{MUON} --bf16 {DISTRIBUTED}",
    {
        "muon in shares, expert parallel 2": (2, f"{EXPERT_2} --overlap-grad-reduce --overlap-param-gather"),
        "muon in shares, data parallel 2": (2, ""),
    },
)
RUNS["muon in shares, data parallel 2, saved"] = Run(f"{MUON} --bf16 {DISTRIBUTED} {UNTIL_12}", ranks=2, saves=True)
RUNS["muon in shares, data parallel 2, resumed"] = Run(
    f"{MUON} --bf16 {DISTRIBUTED} {FROM_7}", ranks=2, continues="muon in shares, data parallel 2, saved"
)
# With two expert-parallel ranks, dispatch is planned from the token ids; one process uses Megatron's dispatcher.
# A rank-local mask, whose dispatch is planned from the token ids.
add_model(
    "experts of one rank",
    "--moe-z-loss-coeff 1e-3 --moe-shared-expert-intermediate-size 16 --moe-router-topk 3",
    {
        "experts of one rank, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "experts of one rank, context parallel 2, expert parallel 2": (2, f"{CONTEXT_2} {EXPERT_2}"),
        "experts of one rank, selective recompute": (
            2,
            f"{EXPERT_2} --recompute-granularity selective --recompute-modules moe",
        ),
    },
    mask="rank_local.safetensors",
)
# A rank-local mask, and experts in the upper two layers only.
add_model(
    "dense layers below experts of one rank",
    "--moe-layer-freq [0,0,1,1]",
    {"dense layers below experts of one rank, expert parallel 2, pipeline 2": (4, f"{EXPERT_2} {PIPELINE_2}")},
    mask="rank_local.safetensors",
)
# Samples of several documents, 2 samples in a micro-batch, with multi-token prediction.
add_model(
    "packed documents",
    f"{RICH} --moe-router-load-balancing-type aux_loss global_aux_loss --moe-aux-loss-coeff 1e-2 3e-2 "
    f"--mtp-num-layers 2 {PACKED}",
    {
        "packed documents, pipeline 2": (2, PIPELINE_2),
        "packed documents, selective recompute": (2, f"{TENSOR_EXPERT_2} {MORE_RECOMPUTE}"),
    },
    mask="six_layers.safetensors",
    omits="--untie-embeddings-and-output-weights",
)
# Samples of several documents, with the load-balancing loss of each sample.
add_model(
    "packed documents, single samples",
    f"{RICH} {PACKED} --micro-batch-size 1",
    {"packed documents, single samples, tensor 2, pipeline 2": (4, f"{TENSOR_2} {PIPELINE_2}")},
)
# Samples of several documents and a rank-local mask, whose dispatch is planned from the token ids.
add_model(
    "packed documents, experts of one rank",
    f"--moe-z-loss-coeff 1e-3 {PACKED}",
    {"packed documents, experts of one rank, expert parallel 2": (2, EXPERT_2)},
    mask="rank_local.safetensors",
)


def add_hybrid_twins(gpt: str, layouts: dict[str, tuple[int, str]], *, pattern: str) -> None:
    """Add runs of the hybrid twin of a model, which continue from the checkpoint of the GPT model.

    Args:
        gpt: Name of the run of the GPT model, see `add_model`.
        layouts: As for `add_model`. The flags may set a pattern with the bounds of pipeline stages.
        pattern: The pattern of the twin.
    """
    for name, (ranks, more_flags) in layouts.items():
        layers = f"--num-layers 8 --moe-layer-freq 1 --hybrid-layer-pattern {pattern}"  # override the GPT model's
        flags = f"{RUNS[gpt].flags} {layers} {more_flags} --ckpt-step 4"
        RUNS[name] = replace(RUNS[gpt], flags=flags, ranks=ranks, continues=gpt, saves=False)
    COMPARED[gpt] += [name for name, (ranks, _) in layouts.items() if ranks > 1]


# Two hash layers with V = k = 2 below two layers with all experts.
add_model("hash layers", "", {"hash layers, expert parallel 2": (2, EXPERT_2)}, mask="hash_layers.safetensors")
add_hybrid_twins(
    "rich",
    {
        "rich hybrid": (1, ""),
        "rich hybrid, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2),
        "rich hybrid, interleaved pipeline": (2, f"{PIPELINE_2} --hybrid-layer-pattern *E|*-*|E|*E/*E"),
    },
    pattern="*E*-*E*E/*E",
)
add_hybrid_twins(
    "experts of one rank",
    {
        "experts of one rank, hybrid, full recompute, expert parallel 2, pipeline 2": (
            4,
            f"{EXPERT_2} {PIPELINE_2} {FULL_RECOMPUTE} --hybrid-layer-pattern *E*|E*E*E",
        )
    },
    pattern="*E*E*E*E",
)
add_hybrid_twins("latent", {"latent hybrid, tensor 2, expert parallel 2": (2, TENSOR_EXPERT_2)}, pattern="+-+E+E+E/+E")
add_hybrid_twins(
    "packed documents",
    {"packed documents, hybrid, pipeline 2": (2, f"{PIPELINE_2} --hybrid-layer-pattern *E*-|*E*E/*E/*E")},
    pattern="*E*-*E*E/*E/*E",
)
GATED_DELTA_NET = """
    --num-layers 8 --hybrid-layer-pattern GEGEGE*E --linear-num-key-heads 4 --linear-num-value-heads 8
    --linear-key-head-dim 8 --linear-value-head-dim 8 --linear-conv-kernel-dim 4
"""
# Three layers of gated delta net, one of attention, each with experts.
add_model(
    "gated delta net",
    f"{GATED_DELTA_NET} {DISTRIBUTED}",
    {
        "gated delta net, resumed": (1, ""),
        "gated delta net, pipeline 2": (2, f"{PIPELINE_2} --hybrid-layer-pattern GEGE|GE*E"),
        "gated delta net, gathered parameters": (2, f"{EXPERT_2} {GATHERED}"),
        "gated delta net, tensor 2, context parallel 2": (4, f"{TENSOR_2} {CONTEXT_2}"),
    },
)
# A hybrid model with a mask for its MoE layers only.
add_model(
    "hybrid",
    f"--num-layers 8 --hybrid-layer-pattern *-*-*E*E/*E {DISTRIBUTED}",
    {"hybrid, pipeline 2": (2, f"{PIPELINE_2} --hybrid-layer-pattern *-*-|*E*E/*E")},
    mask="three_layers.safetensors",
)
# The data loader makes attention masks that keep to documents.
add_model("reset masks", RESET, {"reset masks, pipeline 2": (2, PIPELINE_2), "reset masks, tensor 2": (2, TENSOR_2)})
# Documents are rearranged to fill in the middle.
add_model(
    "filled-in middle",
    FILL_IN_MIDDLE,
    {
        "filled-in middle, resumed": (1, "--num-workers 2"),
        "filled-in middle, pipeline 2": (2, f"{PIPELINE_2} --num-workers 2"),
    },
)
RUNS |= {
    "packed documents as with reset masks": Run(
        f"--exit-interval 8 {PACKED} --eod-mask-loss --position-embedding-type learned_absolute"
    ),
    "documents that see each other": Run(
        f"--exit-interval 8 {DOCUMENTS} --eod-mask-loss --position-embedding-type learned_absolute"
    ),
}


def run_pairs(*pairs: tuple[str, str], slow: tuple[tuple[str, str], ...] = ()) -> list:
    """Return parameters for pairs of a reference run and another run, and mark each with the names of its runs."""
    return [
        pytest.param(pair, marks=[pytest.mark.runs(*pair), *([pytest.mark.slow] if pair in slow else [])], id=pair[1])
        for pair in (*pairs, *slow)
    ]
