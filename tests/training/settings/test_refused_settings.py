"""Each check of the list of refused settings: a command line that it refuses, and neighbours that it does not."""

import argparse
import re
from functools import cache
from pathlib import Path

import pytest
from megatron.core.transformer.moe import fused_a2a
from megatron.training.arguments import add_megatron_arguments

from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.pretraining_arguments import add_pretraining_arguments
from maskmoe.training.settings.refused_settings import (
    BROKEN_IN_MEGATRON,
    MEANINGLESS_WITH_A_MASK,
    NOT_BUILT,
    Check,
    missing_libraries,
    missing_transformer_engine,
    refused_settings,
)

MODEL = "--num-experts 8 --routing-mask mask.safetensors --disable-bias-linear --transformer-impl local"
FLEX = "--moe-token-dispatcher-type flex"
GRAPHS = "--cuda-graph-impl transformer_engine"
PACKED = "--dataloader-inter-document-masking"
SCHEDULE = "--step-batch-size-schedule 0:4"
# Command lines that each check refuses, in the order of the list; `~` leaves the flags of `MODEL` out.
REFUSED = {
    MEANINGLESS_WITH_A_MASK: (
        ["~ --routing-mask mask.safetensors"],
        ["~ --hybrid-layer-pattern *E*E", "--hybrid-layer-pattern *-*-"],
        ["~ --num-experts 8 --change-routing-mask"],
        ["--moe-router-topk 9"],
        [
            "--moe-router-load-balancing-type sinkhorn",
            "--moe-router-load-balancing-type aux_loss sinkhorn",
            "--moe-router-load-balancing-type quantile_balancing",
        ],
        ["--moe-router-fusion", "--transformer-impl inference_optimized"],
        [
            "--spec a b",
            "--experimental-attention-variant dsa",
            "--linear-attention-freq 4",
            "--heterogeneous-layers-config-path F",
            "--heterogeneous-layers-config-encoded-json {}",
        ],
        ["--moe-routing-trace-path D"],
        ["--moe-use-upcycling"],
        ["--sft"],
    ),
    BROKEN_IN_MEGATRON: (
        [
            "--moe-router-group-topk 3 --moe-router-num-groups 4 --moe-router-topk 2",
            "--moe-router-group-topk 1 --moe-router-num-groups 4 --moe-router-topk 3",
        ],
        ["--bf16 --moe-input-jitter-eps 3.9e-3", "--fp16 --moe-input-jitter-eps 4e-4"],
        ["--mlp-chunks-for-training 2"],
        ["--moe-pad-expert-input-to-capacity --moe-router-enable-expert-bias"],
        [FLEX],
        ["~ --num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel"],
        ["--tensor-model-parallel-size 2"],
        [
            "--overlap-dispatch-backward-with-experts-wgrad --overlap-grad-reduce",
            "--overlap-dispatch-backward-with-experts-wgrad --no-gradient-accumulation-fusion",
        ],
        ["--use-megatron-fsdp", "--use-torch-fsdp2"],
        ["--cross-entropy-loss-fusion"],
        ["--hybrid-layer-pattern *E*E --multi-latent-attention", "--hybrid-layer-pattern *E*E --mtp-num-layers 1"],
        ["--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|ttt|m|L"],
        [
            "--reset-attention-mask --no-create-attention-mask-in-dataloader",
            "--reset-attention-mask --transformer-impl transformer_engine",
        ],
        ["--fim-data"],
        ["--rampup-batch-size 4 4 64"],
        [
            SCHEDULE,
            f"{SCHEDULE} --train-samples 8 --override-ckpt-iteration 3",
            f"{SCHEDULE} --train-samples 8 --decrease-batch-size-if-needed",
            f"{SCHEDULE} --train-samples 8 {GRAPHS} --cuda-graph-modules attn",
        ],
        ["--hybrid-override-pattern M*", "--mtp-hybrid-override-pattern M*", "--is-hybrid-model"],
        ["--hybrid-context-parallel"],
        [
            "--full-validation",
            "--full-validation --multiple-validation-sets --pipeline-model-parallel-size 2 --micro-batch-size 2",
        ],
        ["--optimizer soap", "--optimizer adaptive_muon"],
    ),
    NOT_BUILT: (
        ["--qk-layernorm-all-heads", "--qk-layernorm-all-heads --qk-layernorm"],
        ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute", "--ep-overlap-early-attn-memory-release"],
        [
            "--moe-paged-stash",
            "--moe-pad-experts-for-cuda-graph-inference",
            "--moe-ncclep-static-shape",
            "--moe-ncclep-zero-copy",
        ],
        [
            "--cuda-graph-impl local",
            "--cuda-graph-impl full_iteration",
            "--enable-cuda-graph",
            GRAPHS,
            f"{GRAPHS} --cuda-graph-modules attn moe_router",
            "--external-cuda-graph --cuda-graph-scope full",
        ],
        ["--fp8-format hybrid", "--fp4-format e2m1"],
        [
            "--moe-mlp-glu-interleave-size 32",
            "--moe-shared-expert-glu-interleave-size 32",
            "--moe-single-grouped-weight",
            "--moe-single-grouped-bias",
            "--tensor-parallel-num-weight-shards 2",
            "--expert-tensor-parallel-num-weight-shards 2",
        ],
        [
            f"{PACKED} --context-parallel-size 2",
            f"{PACKED} {GRAPHS} --cuda-graph-modules attn",
            f"{PACKED} --fim-data --tokenizer-type HuggingFaceTokenizer",
            f"{PACKED} --micro-batch-size 2 --moe-router-load-balancing-type aux_loss seq_aux_loss",
        ],
        ["--hybrid-layer-pattern DE"],
        ["--ckpt-format torch", "--ckpt-format torch_dcp", "--ckpt-format fsdp_dtensor"],
        [
            "--non-persistent-save-interval 5",
            "--non-persistent-global-ckpt-dir D",
            "--non-persistent-ckpt-type local",
        ],
        ["--inprocess-restart"],
        ["--yaml-cfg F"],
        [
            "--perform-rl-step",
            "--logits-save-dir D",
            "--logits-load-dir D",
            "--freeze-all-layers",
            "--dataloader-type external",
            "--position-embedding-type mrope",
        ],
        ["--spike-action skip --qk-clip", "--spike-action skip --optimizer-cuda-graph"],
    ),
}
CASES = [
    (check, flags)
    for group, cases in REFUSED.items()
    for check, lines in zip(group, cases, strict=True)
    for flags in lines
]
# Settings beside the refused ones.
SUPPORTED = (
    "",
    "--moe-router-topk 8",
    "--moe-router-group-topk 2 --moe-router-num-groups 4 --moe-router-topk 2",
    "--bf16 --moe-input-jitter-eps 4e-3",
    "--fp16 --moe-input-jitter-eps 1e-3",
    f"{FLEX} --bf16 --expert-model-parallel-size 2",
    "--overlap-dispatch-backward-with-experts-wgrad",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tmL",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|tt|mL",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etm|t|tt|L",
    "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Et*3|tm|L",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E?|mL",  # left to Megatron
    "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    f"{PACKED} --micro-batch-size 2",
    f"{PACKED} --micro-batch-size 1 --moe-router-load-balancing-type seq_aux_loss",
    f"{PACKED} --reset-attention-mask --no-create-attention-mask-in-dataloader",
    "--fim-data --tokenizer-type HuggingFaceTokenizer",
    f"{SCHEDULE} --train-samples 8",
    "--full-validation --multiple-validation-sets",
    "--full-validation --multiple-validation-sets --pipeline-model-parallel-size 2 --eval-micro-batch-size 1",
    f"{GRAPHS} --cuda-graph-modules attn mlp",
    "--external-cuda-graph --cuda-graph-scope attn",
    "--non-persistent-ckpt-type global --non-persistent-save-interval 5",
    "--qk-layernorm-all-heads --qk-layernorm --normalization RMSNorm",
)


@cache
def parser() -> argparse.ArgumentParser:
    complete = add_maskmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    add_pretraining_arguments(complete)
    complete.set_defaults(gradient_accumulation_fusion=True)  # as on a GPU
    return complete


def parse(flags: str) -> argparse.Namespace:
    model = "" if flags.startswith("~") else MODEL
    return parser().parse_args([*model.split(), *flags.removeprefix("~").split()])


@pytest.mark.parametrize(("check", "flags"), CASES, ids=[flags for _, flags in CASES])
def test_setting_is_refused(check: Check, flags: str) -> None:
    assert check.message in refused_settings(parse(flags))
    assert check.message.startswith(f"{check.name} is not supported. ")


@pytest.mark.parametrize("flags", SUPPORTED)
def test_neighbouring_setting_is_not_refused(flags: str) -> None:
    assert not list(refused_settings(parse(flags)))


def test_every_flag_of_megatron_near_routing_is_reviewed() -> None:
    """A flag that the file lacks is new in this release of Megatron-Core; a surplus flag is gone.

    Review whether a new flag is wrong beside a routing mask, and refuse it if so, before it is added to the file.
    """
    near = re.compile("moe|rout|expert|dispatch|token|mask|graph|chunk|overlap|hybrid|layers|recompute|shard")
    megatron = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = [action.option_strings[0] for action in megatron._actions]
    reviewed = Path(__file__).with_name("reviewed_flags.txt").read_text().split()
    assert sorted(flag for flag in flags if near.search(flag)) == reviewed


@pytest.mark.parametrize(
    ("flags", "backend", "library"),
    [
        ("", "deepep", "DeepEP 1"),
        ("--moe-flex-dispatcher-backend hybridep", "hybridep", "HybridEP"),
        ("--moe-flex-dispatcher-backend hybridep --moe-enable-deepep", "deepep", "DeepEP 1"),
        ("--moe-flex-dispatcher-backend ncclep", "ncclep", "NCCL-EP"),
    ],
)
def test_missing_library_of_the_flex_dispatcher(monkeypatch, flags: str, backend: str, library: str) -> None:
    for flag in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
        monkeypatch.setattr(fused_a2a, flag, False)
    (error,) = missing_libraries(parse(f"{FLEX} {flags}"))
    assert f"--moe-flex-dispatcher-backend {backend} needs {library} (the Python package " in error


@pytest.mark.parametrize(
    ("flags", "packages", "errors"),
    [
        ("--transformer-impl transformer_engine", GpuPackages(transformer_engine=False), 1),
        ("--transformer-impl transformer_engine", GpuPackages(), 0),
        ("--moe-permute-fusion", GpuPackages(permutation=False), 1),
        ("", GpuPackages(transformer_engine=False, permutation=False), 0),
    ],
)
def test_missing_transformer_engine(flags: str, packages: GpuPackages, errors: int) -> None:
    assert len(list(missing_transformer_engine(parse(flags), packages))) == errors
