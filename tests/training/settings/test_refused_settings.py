"""Each check of the list of refused settings: a command line that it refuses, and neighbours that it does not."""

import argparse
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.arguments import add_megatron_arguments
from support.command_lines import parse_training

from maskmoe.errors import UserError
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.training.settings import refused_settings as module
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments
from maskmoe.training.settings.refused_settings import (
    REFUSED_SETTINGS,
    missing_flags,
    missing_libraries,
    missing_transformer_engine,
    refused_settings,
    value_errors,
)
from maskmoe.transformer.token_ids import takes_token_ids

MODEL = "--num-experts 8 --routing-mask mask.safetensors --disable-bias-linear --transformer-impl local"
MUON = "--tensor-model-parallel-size 2 --sequence-parallel --optimizer muon --bf16 --use-distributed-optimizer"
INSTANCES = "--use-distributed-optimizer --overlap-grad-reduce --num-distributed-optimizer-instances 2"
FLEX = "--moe-token-dispatcher-type flex"
GRAPHS = "--transformer-impl transformer_engine --cuda-graph-impl transformer_engine"
ENGINE = "--transformer-impl transformer_engine --moe-grouped-gemm"
QUANTIZED = f"{ENGINE} --fp8-format hybrid --fp8-recipe tensorwise"
PACKED = "--dataloader-inter-document-masking"
PADDED = "--moe-pad-expert-input-to-capacity --moe-expert-capacity-factor"
TE_STATES = "--transformer-impl transformer_engine --te-rng-tracker"
SCHEDULE = "--step-batch-size-schedule 0:4"
# Command lines that are refused, and the beginning of the check's name; `~` leaves the flags of `MODEL` out. Checks of
# flags that are refused in every combination have one case, since all of them have one predicate.
REFUSED = {
    "~ --routing-mask mask.safetensors": "--routing-mask without",
    "~ --hybrid-layer-pattern *E*E": "--hybrid-layer-pattern with E without",
    "--hybrid-layer-pattern *-*-": "--hybrid-layer-pattern with E without",
    "--moe-router-topk 9": "--moe-router-topk above",
    "--moe-router-load-balancing-type aux_loss sinkhorn": "--moe-router-load-balancing-type",
    "--moe-router-load-balancing-type quantile_balancing": "--moe-router-load-balancing-type",
    "--moe-router-fusion": "--moe-router-fusion",
    "--transformer-impl inference_optimized": "--moe-router-fusion",
    "--moe-use-upcycling": "--moe-use-upcycling",
    "--moe-router-group-topk 3 --moe-router-num-groups 4 --moe-router-topk 2": "--moe-router-group-topk",
    "--moe-router-group-topk 1 --moe-router-num-groups 4 --moe-router-topk 3": "--moe-router-group-topk",
    "--mlp-chunks-for-training 2": "--mlp-chunks",
    FLEX: f"{FLEX} without --bf16",
    "--moe-apply-probs-on-input --moe-router-topk 2": "--moe-apply-probs-on-input with",
    f"~--num-experts 8 --moe-router-topk 1 --moe-apply-probs-on-input {PADDED} 4": (
        "--moe-apply-probs-on-input with --moe-pad"
    ),
    **{
        f"--moe-shared-expert-overlap {flags}": "--moe-shared-expert-overlap with"
        for flags in ("--activation-func-clamp-value 7", "--glu-linear-offset -1", "--moe-latent-size 16")
    },
    f"{PADDED} 4.01 --moe-router-topk 2": "--moe-pad-expert-input-to-capacity with --moe-expert",
    f"{PADDED} 1 --bf16 {FLEX}": "--moe-pad-expert-input-to-capacity with --moe-token",
    "--tensor-model-parallel-size 2": "--tensor-model-parallel-size above 1 without",
    "--overlap-dispatch-backward-with-experts-wgrad --overlap-grad-reduce": "--overlap-dispatch-backward",
    "--overlap-dispatch-backward-with-experts-wgrad --no-gradient-accumulation-fusion": "--overlap-dispatch-backward",
    "--cross-entropy-loss-fusion": "--cross-entropy-loss-fusion without",
    **{
        f"--hybrid-layer-pattern {flags}": "--hybrid-layer-pattern with another"
        for flags in (
            *("*E*E --num-layers 2", "*-*E --moe-layer-freq ([0]+[1]*1)"),
            *("*E*E --multi-latent-attention", "*E*E --mtp-num-layers 1"),
            *("*E*E/*E --mtp-num-layers 2", "*E*E/*E --mtp-num-layers 0"),
        )
    },
    **{
        f"--recompute-granularity full --recompute-method uniform --recompute-num-layers 2 {prediction}": (
            "--recompute-num-layers above 1 with"
        )
        for prediction in ("--hybrid-layer-pattern *E*E/*E", "--mtp-num-layers 1")
    },
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|ttt|m|L": "--pipeline-model-parallel-layout",
    "--reset-attention-mask --no-create-attention-mask-in-dataloader": "--reset-attention-mask",
    "--reset-attention-mask --transformer-impl transformer_engine": "--reset-attention-mask",
    "--fim-data": "--fim-data without",
    SCHEDULE: "--step-batch-size-schedule",
    f"{SCHEDULE} --train-samples 8 {GRAPHS} --cuda-graph-modules attn": "--step-batch-size-schedule",
    "--full-validation": "--full-validation",
    "--iterations-to-skip 3 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1": (
        "--iterations-to-skip"
    ),
    "--iterations-to-skip 3 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|tL": (
        "--iterations-to-skip"
    ),
    "--iterations-to-skip 3 --hybrid-layer-pattern *E|*E": "--iterations-to-skip",
    "--result-rejected-tracker-filename F --hybrid-layer-pattern *E|*E": "--iterations-to-skip",
    f"{TE_STATES} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    "--attention-dropout 0": "--te-rng-tracker",
    f"{TE_STATES} --recompute-activations --hidden-dropout 0": "--te-rng-tracker",
    f"{GRAPHS} --cuda-graph-modules attn --recompute-granularity selective --recompute-modules moe "
    "--moe-input-jitter-eps 0.01": "--te-rng-tracker",
    "--optimizer soap": "--optimizer sgd, soap",
    "--optimizer muon --use-distributed-optimizer": "--optimizer muon",
    "--optimizer lion --use-distributed-optimizer": "--optimizer muon",
    "--optimizer dist_muon": "--optimizer muon",
    "--optimizer lion": "--optimizer lion with another",
    f"{MUON} --group-query-attention --num-query-groups 1": "--optimizer muon with --num-query-groups",
    "--optimizer lion --fp16": "--optimizer muon",
    "--fp16": "--fp16",
    "--context-parallel-size 2 --mtp-num-layers 1": "--context-parallel-size",
    "--optimizer muon --bf16 --use-distributed-optimizer --num-distributed-optimizer-instances 2": "--optimizer muon",
    "--optimizer muon --bf16 --use-distributed-optimizer --use-precision-aware-optimizer": "--optimizer muon",
    f"~ --num-experts 8 {MUON} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2": (
        "--optimizer muon or lion with --use-"
    ),
    f"{MUON} --expert-tensor-parallel-size 1": "--optimizer muon or lion with --use-",
    "--optimizer-cpu-offload": "--optimizer-cpu-offload",
    "--optimizer sgd": "--optimizer sgd",
    f"{INSTANCES} --pipeline-model-parallel-size 2": "--num-distributed-optimizer-instances",
    "--use-distributed-optimizer --overlap-grad-reduce --pipeline-model-parallel-size 2 --save-wgrads-interval 5": (
        "--save-wgrads-interval"
    ),
    f"{QUANTIZED} --use-precision-aware-optimizer --exp-avg-sq-dtype fp16": "--exp-avg-dtype",
    "--use-te-activation-func --swiglu --activation-func-clamp-value 7": "--use-transformer-engine-op-fuser",
    "~ --multi-latent-attention --tensor-model-parallel-size 2": "--tensor-model-parallel-size",
    "--fine-grained-activation-offloading": "--fine-grained-activation-offloading",
    "--qk-clip": "--qk-clip",
    "--use-transformer-engine-op-fuser --quick-geglu": "--use-transformer-engine-op-fuser",
    "--use-transformer-engine-op-fuser --swiglu --activation-func-clamp-value 7": "--use-transformer-engine-op-fuser",
    "--use-transformer-engine-op-fuser --swiglu --glu-linear-offset 1": "--use-transformer-engine-op-fuser",
    "--async-save --async-strategy nvrx": "--async-strategy",
    "~ --hybrid-layer-pattern G-*- --tensor-model-parallel-size 2": "--tensor-model-parallel-size",
    "--moe-router-topk-scaling-factor 0": "--moe-router-topk-scaling-factor",
    "--moe-router-topk-scaling-factor -1": "--moe-router-topk-scaling-factor",
    "--exit-signal-handler-for-training": "--exit-signal-handler-for-training",
    "--ckpt-convert-format torch": "--ckpt-convert-format",
    "--tokenizer-special-tokens <a>": "--tokenizer-special-tokens",
    "--hybrid-context-parallel": "--hybrid-context-parallel",
    "--qk-layernorm-all-heads --qk-layernorm": "--qk-layernorm-all-heads without",
    "--cuda-graph-impl local": "--cuda-graph-impl",
    GRAPHS: "--cuda-graph-impl",
    f"{GRAPHS} --cuda-graph-modules attn moe_router": "--cuda-graph-impl",
    f"{GRAPHS} --cuda-graph-modules attn --transformer-impl local": "--cuda-graph-impl",
    f"{QUANTIZED} --transformer-impl local": "--fp8-format, --fp4-format, --te-precision",
    f"{QUANTIZED} --no-moe-grouped-gemm": "--fp8-format, --fp4-format, --te-precision",
    f"{QUANTIZED} --fp8-recipe delayed": "--fp8-recipe",
    f"{QUANTIZED} --fp8-recipe custom": "--fp8-recipe",
    f"{ENGINE} --fp4-format e2m1 --fp4-recipe custom": "--fp8-recipe",
    "--te-precision-config-file F": "--fp8-format, --fp4-format, --te-precision",
    f"{ENGINE} --no-moe-grouped-gemm --save-tokens-per-expert-interval 5": "--fp8-format, --fp4-format, --te-precision",
    "--position-embedding-type mrope": "--position-embedding-type",
    "--multi-latent-attention --yarn-beta-fast 16": "--yarn-original-max-position-embeddings",
    "--hybrid-layer-pattern +E+E --no-yarn-correction-range-round-to-int": "--yarn-original-max-position-embeddings",
    "--hybrid-layer-pattern *E*E --cpu-offloading-num-layers 1": "--cpu-offloading-num-layers",
    "--log-max-attention-logit --bf16": "--log-max",
    "--transformer-impl transformer_engine --log-max-attention-logit": "--log-max",
    "--transformer-impl transformer_engine --bf16 --log-max-attention-logit --hybrid-layer-pattern ME": "--log-max",
    "--dataloader-type external": "--dataloader-type external",
    "--defer-embedding-wgrad-compute": "--defer-embedding",
    f"{ENGINE} --defer-embedding-wgrad-compute --hybrid-layer-pattern *E": "--defer-embedding",
    "--phase-transition-iterations 5": "--phase-transition-iterations",
    "--rerun-mode report_stats": "--rerun-mode report_stats",
    "--multi-latent-attention --mla-down-proj-fusion": "--mla-down-proj-fusion",
    "--transformer-impl transformer_engine --mla-down-proj-fusion --hybrid-layer-pattern +E": "--mla-down-proj-fusion",
    "--moe-router-padding-for-quantization": "--moe-router-padding",
    f"{PACKED} --context-parallel-size 2": PACKED,
    f"{PACKED} {GRAPHS} --cuda-graph-modules attn": PACKED,
    f"{PACKED} --fim-data --tokenizer-type HuggingFaceTokenizer": PACKED,
    f"{PACKED} --micro-batch-size 2 --moe-router-load-balancing-type aux_loss seq_aux_loss": PACKED,
    "--context-parallel-size 2 --cp-comm-type p2p a2a": "--cp-comm-type",
    "--hybrid-layer-pattern DE": "--hybrid-layer-pattern with D",
    "--ckpt-format torch": "--ckpt-format",
    "--non-persistent-save-interval 5": "--non-persistent-save-interval",
    "--non-persistent-ckpt-type local": "--non-persistent-save-interval",
    "--override-ckpt-iteration 0": "--override-ckpt-iteration",
    "--yaml-cfg F": "--yaml-cfg",
    "--tensor-parallel-num-weight-shards 2": "--tensor-parallel-num-weight-shards",
    "--expert-tensor-parallel-num-weight-shards 2": "--tensor-parallel-num-weight-shards",
}
# Settings beside the refused ones.
SUPPORTED = (
    "",
    "--moe-router-topk 8",
    "--moe-router-group-topk 2 --moe-router-num-groups 4 --moe-router-topk 2",
    f"{FLEX} --bf16 --expert-model-parallel-size 2",
    "--moe-apply-probs-on-input --moe-router-topk 1",
    f"--moe-apply-probs-on-input --moe-router-topk 1 {PADDED} 4",
    "--moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8",
    "--activation-func-clamp-value 7 --glu-linear-offset 1 --moe-latent-size 16",
    f"{PADDED} 4 --moe-router-topk 2",
    "--moe-expert-capacity-factor 9 --moe-router-topk 2",
    "--overlap-dispatch-backward-with-experts-wgrad",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tmL",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|tt|mL",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etm|t|tt|L",
    "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Et*3|tm|L",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E?|mL",  # left to Megatron
    "--hybrid-layer-pattern *E|*E/*E --num-layers 4 --mtp-num-layers 1",
    "--hybrid-layer-pattern *E*E --mtp-num-layers 0",
    "--hybrid-layer-pattern *E*E/*E --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    f"{PACKED} --micro-batch-size 2",
    f"{PACKED} --micro-batch-size 1 --moe-router-load-balancing-type seq_aux_loss",
    f"{PACKED} --reset-attention-mask --no-create-attention-mask-in-dataloader",
    "--fim-data --tokenizer-type HuggingFaceTokenizer",
    f"{SCHEDULE} --train-samples 8",
    f"{TE_STATES} --recompute-granularity selective --recompute-modules moe",
    "--recompute-activations",
    "--iterations-to-skip 3 --pipeline-model-parallel-size 2 --hybrid-layer-pattern *E|*E",
    "--num-layers-per-virtual-pipeline-stage 1",
    *(() if takes_token_ids(TransformerLayer) else (f"{GRAPHS} --cuda-graph-modules attn mlp",)),
    QUANTIZED,
    "~ --transformer-impl transformer_engine --fp8-format e4m3 --fp8-recipe mxfp8",
    f"{ENGINE} --te-precision-config-file F --save-tokens-per-expert-interval 5",
    "--save-activations-interval 5 --save-dgrads-interval 5 --save-params-interval 5 --save-wgrads-interval 5",
    "--multi-latent-attention --rotary-scaling-factor 4 --mscale 1",
    "--position-embedding-type yarn --yarn-beta-fast 16",
    "--cpu-offloading-num-layers 1",
    f"{ENGINE} --defer-embedding-wgrad-compute",
    "--phase-transition-iterations 5 --train-samples 80",
    "--optimizer lion --adam-beta1 0.95 --adam-beta2 0.98",
    f"{MUON} --group-query-attention --num-query-groups 2",
    f"{MUON} --group-query-attention --num-query-groups 1 --muon-no-split-qkv",
    "--optimizer muon --bf16 --use-distributed-optimizer",
    MUON,
    f"{MUON} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
    "--transformer-impl transformer_engine --bf16 --log-max-attention-logit",
    "--transformer-impl transformer_engine --multi-latent-attention --mla-down-proj-fusion",
    "--use-transformer-engine-op-fuser --swiglu",
    "--use-te-activation-func --quick-geglu",
    INSTANCES,
    f"{INSTANCES} --pipeline-model-parallel-size 2 --no-align-grad-reduce",
    f"{QUANTIZED} --use-precision-aware-optimizer --exp-avg-dtype bf16",
    f"{PACKED} --position-embedding-type yarn",
    "~ --hybrid-layer-pattern *-*- --tensor-model-parallel-size 2",
    "--async-save",
    f"{ENGINE} --fp4-format e2m1",
    "--context-parallel-size 2 --cp-comm-type p2p all_gather",
    "--transformer-impl transformer_engine --context-parallel-size 2 --cp-comm-type a2a",
    "--qk-layernorm-all-heads --qk-layernorm --normalization RMSNorm",
    "--tensor-parallel-num-weight-shards 1 --expert-tensor-parallel-num-weight-shards 1",  # as after validation
)
# Values that would train something else without a word, or that cannot be read.
BAD_VALUES = {
    "--train-iters": "0 -1 abc",
    "--hidden-size": "0 -32 1e3",
    "--eval-iters": "-1 x",
    "--keep-last-checkpoints": "0 1.5",
    "--spike-window": "1",
    "--spike-deviations": "0 nan",
    "--clip-grad": "nan -1 inf",
    "--lr": "nan -1 1e400",
    "--lr-decay-style": "cosinus",
    "--moe-router-topk": "0",
    "--num-experts": "-1 1.5",
    "--moe-aux-loss-coeff": "-1 nan",
    "--moe-layer-freq": "abc 0.5 0 -1 [1]**9 [1]*99999999 [1 [2] [[1]] ([1],[0])",
    "--moe-router-load-balancing-type": "none_such",
    "--tensor-model-parallel-size": "0 x",
    "--seed": "0 -1 5000000000",
    "--split": "abc -1,2,3 0,0,0 1,2,3,4 nan,1,1",
    "--window-size": "a,b",
    "--num-layer": "2",
    "--adam-beta2": "95 -1",
    "--adam-eps": "-1",
    "--hidden-dropout": "10 -0.1",
    "--kv-channels": "0",
    "--moe-ffn-hidden-size": "0 -1",
    "--mtp-num-layers": "-1",
}


# The tests also run with the next Megatron-Core, see docs/megatron.md.
OF_OTHER_VERSIONS = {
    *("--moe-n-hash-layers", "--moe-use-grouped-tensor", "--enable-hyper-connections", "--enable-mhc-connections"),
    *("--moe-dispatch-fwd-dtype", "--moe-combine-bwd-dtype", "--moe-ncclep-static-shape", "--mhc-recompute-layer-num"),
    *("--gdp-num-chunk-states-to-recompute", "--gtp-expert-remat-nccl-ub", "--no-save-tokenizer-assets"),
    "--use-gigatoken",
}


@cache
def parser() -> argparse.ArgumentParser:
    complete = add_maskmoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    add_pretraining_arguments(complete)
    complete.set_defaults(gradient_accumulation_fusion=True, apply_rope_fusion=False)  # as on a GPU without the latter
    return complete


def parse(flags: str) -> argparse.Namespace:
    model = "" if flags.startswith("~") else MODEL
    return parser().parse_args([*model.split(), *flags.removeprefix("~").split()])


@pytest.mark.parametrize("flags", REFUSED)
def test_setting_is_refused(flags: str) -> None:
    (error,) = (error for error in refused_settings(parse(flags)) if error.startswith(REFUSED[flags]))
    assert " is not supported. " in error


@pytest.mark.parametrize("latent", ["--multi-latent-attention", "--hybrid-layer-pattern +E"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_fused_rotary_embedding_of_latent_attention_is_refused(latent: str, implementation: str) -> None:
    args = parse(f"{latent} --transformer-impl {implementation}")
    assert not list(refused_settings(args))
    args.apply_rope_fusion = True  # the default on GPUs with Transformer Engine
    assert "--no-rope-fusion" in "".join(refused_settings(args))


@pytest.mark.parametrize("flags", SUPPORTED)
def test_neighbouring_setting_is_not_refused(flags: str) -> None:
    assert not list(refused_settings(parse(flags)))


def test_every_check_has_a_case_or_refuses_its_flags_in_every_combination() -> None:
    alone = {check for check in REFUSED_SETTINGS if re.fullmatch(r"--[\w-]+((, --[\w-]+)* or --[\w-]+)?", check.name)}
    begins = (*REFUSED.values(), "latent attention")  # has a test of its own
    assert all(check.name.startswith(begins) for check in {*REFUSED_SETTINGS} - alone)


def test_named_flags_exist() -> None:
    named = {flag for check in REFUSED_SETTINGS for flag in re.findall(r"--[\w-]+", check.name)}
    assert named <= parser()._option_string_actions.keys() | OF_OTHER_VERSIONS


def test_every_flag_of_megatron_near_routing_is_reviewed() -> None:
    """A flag that the file lacks is new in this release of Megatron-Core; a surplus flag is of another version.

    Review whether a new flag is wrong beside a routing mask, and refuse it if so, before it is added to the file.
    """
    near = re.compile("moe|rout|expert|dispatch|token|mask|graph|chunk|overlap|hybrid|layers|recompute|shard")
    megatron = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = [action.option_strings[0] for action in megatron._actions]
    reviewed = Path(__file__).with_name("reviewed_flags.txt").read_text().split()
    assert {flag for flag in flags if near.search(flag)} ^ {*reviewed} <= OF_OTHER_VERSIONS & {*reviewed}


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
    te_ep = SimpleNamespace(
        tex=SimpleNamespace(ep_initialize=None),
        ep_bootstrap=lambda ep_group: None,
        ep_dispatch=lambda buffer, tokens, recv_tokens: None,
    )
    monkeypatch.setattr(fused_a2a, "te_ep", te_ep, raising=False)
    for is_installed in (True, False):
        for flag in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
            monkeypatch.setattr(fused_a2a, flag, is_installed)
        error, *_ = [*missing_libraries(parse(f"{FLEX} {flags}")), None]
        assert (error is None) == is_installed
    assert f"--moe-flex-dispatcher-backend {backend} needs {library} (the Python package " in error


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_mamba_layers_need_transformer_engine(monkeypatch, implementation: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)  # mamba_ssm is installed
    errors = list(missing_libraries(parse(f"--hybrid-layer-pattern *-ME --transformer-impl {implementation}")))
    assert len(errors) == (implementation == "local")


@pytest.mark.parametrize("is_installed", [False, True])
@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--log-straggler --distributed-backend nccl", "--log-straggler needs the Python package nvidia-ml-py:"),
        ("--log-straggler --distributed-backend gloo", None),
        (
            "--log-device-memory-used --distributed-backend nccl",
            "--log-device-memory-used needs the Python package nvi",
        ),
        ("--save-dgrads-interval 5", "--save-activations-interval and --save-dgrads-interval need Transformer Engine,"),
        ("--wandb-project p", "--wandb-project needs the Python package wandb"),
        ("--optimizer muon", "--optimizer muon needs the Python package emerging-optimizers"),
    ],
)
def test_flag_that_needs_a_library(monkeypatch, flags: str, error: str | None, is_installed: bool) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name if is_installed else None)
    errors = list(missing_libraries(parse(flags)))
    assert len(errors) == (error is not None and not is_installed)
    assert all(found.startswith(error) for found in errors)


@pytest.mark.parametrize(
    ("flags", "package", "least", "older"),
    [
        ("--hybrid-layer-pattern G-", "flash-linear-attention", "0.5.2", "0.5.1"),
        ("--softmax-type learnable --transformer-impl transformer_engine", "transformer-engine", "2.14", "2.13.0+abc"),
        ("--moe-permute-fusion", "transformer-engine", "2.20.2", "2.20.0.dev0"),
    ],
)
def test_version_that_computes_something_else(monkeypatch, flags: str, package: str, least: str, older: str) -> None:
    for found, errors in ((older, 1), (least, 0)):
        monkeypatch.setattr(module, "version", {package: found}.__getitem__)
        assert len([error for error in missing_libraries(parse(flags)) if f"{package} {least}" in error]) == errors


@pytest.mark.parametrize(
    ("flags", "packages", "errors"),
    [
        ("--transformer-impl transformer_engine", GpuPackages(transformer_engine=False), 1),
        ("--transformer-impl transformer_engine", GpuPackages(), 0),
        ("--moe-permute-fusion", GpuPackages(transformer_engine=False), 1),
        ("--use-precision-aware-optimizer", GpuPackages(transformer_engine=False), 1),
        ("", GpuPackages(transformer_engine=False), 0),
    ],
)
def test_missing_transformer_engine(flags: str, packages: GpuPackages, errors: int) -> None:
    assert len(list(missing_transformer_engine(parse(flags), packages))) == errors


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_bad_value_is_refused_by_name(flag: str) -> None:
    for word in BAD_VALUES[flag].split():
        with pytest.raises(UserError, match=flag) as error:
            parse_training(parser(), [flag, word])
        assert "\n" not in str(error.value)


def test_each_bad_value_is_reported() -> None:
    args = parser().parse_args(["--lr", "nan", "--micro-batch-size", "0", "--moe-aux-loss-coeff", "-1"])
    assert len(list(value_errors(args))) == 3
    assert not list(value_errors(parser().parse_args([])))


@pytest.mark.parametrize("pattern", ["[0]*2", "[0,0]+[0]"])
def test_a_layer_must_have_the_experts(pattern: str) -> None:
    dense = ["--moe-layer-freq", pattern]
    assert not list(value_errors(parser().parse_args(dense)))
    (error,) = value_errors(parser().parse_args([*dense, "--num-experts", "8"]))
    assert error.startswith("--moe-layer-freq must ")


def test_flags_that_megatron_misses_late() -> None:
    """Without a checkpoint, no cure is --use-checkpoint-args, although the launcher always sets --load."""
    errors = [
        "no sequence length: pass --seq-length",
        "no length of training: pass --train-iters or --train-samples",
        "no learning rate: pass --lr",
    ]
    assert list(missing_flags(parse("--load F"), has_checkpoint=False)) == errors
    errors[0] += ", or --use-checkpoint-args for the settings of the checkpoint"
    assert list(missing_flags(parse("--load F"), has_checkpoint=True)) == errors
    assert list(missing_flags(parse("--no-initialization"), has_checkpoint=True)) == errors
    assert "--no-initialization" in next(missing_flags(parse("--no-initialization"), has_checkpoint=False))
    assert list(missing_flags(parse("--use-checkpoint-opt-param-scheduler"), has_checkpoint=True)) == errors[:2]
    evaluation = parse("--skip-train --seq-length 8")
    assert list(missing_flags(evaluation, has_checkpoint=False)) == errors[1:2]  # Megatron multiplies by the length
    evaluation.eval_split = "valid"  # as with the arguments of `maskmoe evaluate`, which trains nothing
    assert not list(missing_flags(evaluation, has_checkpoint=False))
