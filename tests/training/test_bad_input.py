"""Bad input ends a training process before it trains or writes, with exit code 2 and one line that names the input."""

import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.transformer.moe import fused_a2a
from megatron.training.arguments import parse_args
from megatron.training.global_vars import destroy_global_vars
from support.datasets import write_documents
from support.masks import build_mask, count_ids
from support.training import Run
from support.training_runs import IN_ITERATIONS

from maskmoe.command_line.parser import refuse_unknown_flags
from maskmoe.command_line.run_tool import run_tool
from maskmoe.data.tokenizer import SentencePieceTokenizer
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.mask import build_routing_mask
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.pretraining_arguments import add_pretraining_arguments
from maskmoe.training.settings.refusals import check_supported, missing_libraries, unsupported_settings
from maskmoe.training.settings.setup import parse_and_check_args

SENTENCE_PIECE = "--tokenizer-type SentencePieceTokenizer --tokenizer-model"

MASK = "mask.safetensors"

# Flags, routing mask and parts of the error line of each case, by its name. `bad_files` makes the files in `bad/`.
CASES = {
    "id beyond the vocabulary": ("--data-path bad/large_ids", MASK, ["bad/large_ids", "id 599 at position 57", "510"]),
    "altered mask": ("", "bad/altered.safetensors", ["bad/altered.safetensors"]),
    "setting that Megatron refuses without a word": ("--num-attention-heads 3", MASK, ["num_attention_heads"]),
}
# The code that reports these cases is the same, so the default test run starts no process for them.
MORE_CASES = {
    "missing dataset": ("--data-path nowhere", MASK, ["nowhere", "does not exist"]),
    "no mask": ("", None, ["--routing-mask"]),
    "N not divisible": ("--expert-model-parallel-size 3", MASK, ["--num-experts 8", "--expert-model-parallel-size 3"]),
    "truncated bin": ("--data-path bad/short_bin", MASK, ["short_bin.bin", "truncated"]),
    "truncated idx": ("--data-path bad/short_idx", MASK, ["short_idx.idx", "truncated"]),
    "mask for another vocabulary": ("--vocab-size 500", MASK, ["vocabulary", "510", "500"]),
    "dataset of another tokenizer": (
        f"{SENTENCE_PIECE} bad/ours.model --data-path bad/theirs",
        "bad/without_counts.safetensors",
        ["dataset bad/theirs", "theirs.model", "bad/ours.model"],
    ),
    "no dataset": ("--data-path", MASK, ["--data-path"]),
    "negative id": ("--data-path bad/negative_ids", MASK, ["negative_ids", "id -1 at position 57"]),
    "blend weight below 0": ("--data-path -1 data", MASK, ["--data-path", "-1"]),
    "too few documents for the split": ("--data-path bad/one_document", MASK, ["one_document", "--split 90,10,0"]),
    "no training data": ("--split 0,100,0", MASK, ["no training data", "--split"]),
    "no validation data": ("--split 100,0,0", MASK, ["no validation data", "--eval-iters 0"]),
    "missing mask": ("", "nowhere.safetensors", ["nowhere.safetensors"]),
    "mask with a flipped bit": ("", "bad/flipped.safetensors", ["bad/flipped.safetensors"]),
    "truncated mask": ("", "bad/truncated.safetensors", ["bad/truncated.safetensors"]),
    "counts as mask": ("", "counts.safetensors", ["counts.safetensors"]),
    "mask for another N": ("--num-experts 4", MASK, ["number of experts is 8", "4"]),
    "mask for another layer count": ("--num-layers 3", MASK, ["it is for 4 MoE layers, the model has 3"]),
    "counts of another tokenizer": (
        f"{SENTENCE_PIECE} bad/ours.model --data-path bad/unknown",
        "bad/of_their_counts.safetensors",
        ["counts", "theirs.model", "bad/ours.model"],
    ),
    "missing tokenizer model": (f"{SENTENCE_PIECE} nowhere.model", MASK, ["nowhere.model"]),
    "tokenizer model in another format": (f"{SENTENCE_PIECE} bad/short_bin.bin", MASK, ["short_bin.bin"]),
    "tokenizer model that is a folder": (f"{SENTENCE_PIECE} bad", MASK, ["--tokenizer-model bad is not a file"]),
    "missing tokenizer folder": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model nowhere",
        MASK,
        ["--tokenizer-model nowhere does not exist"],
    ),
    "setting without support": ("--moe-router-fusion", MASK, ["--moe-router-fusion"]),
    "setting that Megatron refuses": ("--pipeline-model-parallel-size 2", MASK, ["world size (1)"]),
    "layers that stages do not divide": ("--pipeline-model-parallel-size 3", MASK, ["--num-layers 4 is not divisible"]),
    "heads that query groups do not divide": (
        "--num-attention-heads 4 --group-query-attention --num-query-groups 3",
        MASK,
        ["--num-attention-heads 4 is not divisible by --num-query-groups 3: 1, 2, 4 would fit"],
    ),
    "more optimizers than ranks": (
        "--num-distributed-optimizer-instances 2",
        MASK,
        ["--num-distributed-optimizer-instances 2 must divide"],
    ),
    "two kinds of attention": (
        "--hybrid-layer-pattern *E*E/+E",
        MASK,
        ["attention (*) and multi-latent attention (+)"],
    ),
    "stages of one rank": ("--hybrid-layer-pattern *E|*E", MASK, ["--pipeline-model-parallel-size is 1: leave | out"]),
    "lost checkpoint": ("--load bad/checkpoint", MASK, ["bad/checkpoint/iter_0000007"]),
    "save into a file": ("--save bad/ours.model/save", MASK, ["--save", "ours.model is not a folder"]),
}
ALL_CASES = CASES | MORE_CASES


@pytest.fixture(scope="module")
def bad_files(workplace) -> Path:
    """Make the damaged and unfitting files of the cases."""
    folder = workplace.folder / "bad"
    folder.mkdir()
    for name in ("short_bin", "short_idx"):
        for suffix in (".bin", ".idx"):
            content = (workplace.folder / "data").with_suffix(suffix).read_bytes()
            cut = len(content) - 2 if name.endswith(suffix[1:]) else None
            (folder / name).with_suffix(suffix).write_bytes(content[:cut])
    ids = np.full(120, 3)
    for name, bad_id in (("large_ids", 599), ("negative_ids", -1)):
        write_documents(folder / name, [np.where(np.arange(120) == 57, bad_id, ids)] * 10, np.int32)
    write_documents(folder / "one_document", [ids], np.int32)
    write_bad_masks(workplace.folder, folder)
    write_tokenizers(folder)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def write_bad_masks(source: Path, folder: Path) -> None:
    mask = (source / "mask.safetensors").read_bytes()
    (folder / "flipped.safetensors").write_bytes(mask[:-5] + bytes([mask[-5] ^ 1]) + mask[-4:])
    assert mask.count(b'\\"seed\\": 1') == 1 or mask.count(b'\\"seed\\":1') == 1
    altered = mask.replace(b'\\"seed\\": 1', b'\\"seed\\": 2').replace(b'\\"seed\\":1', b'\\"seed\\":2')
    (folder / "altered.safetensors").write_bytes(altered)
    (folder / "truncated.safetensors").write_bytes(mask[: len(mask) // 2])


def write_tokenizers(folder: Path) -> None:
    """Write two SentencePiece models of one size, datasets with and without a record of one model, and masks."""
    documents = [np.full(120, 3)] * 10
    for name, letters in (("ours", "abcdefgh"), ("theirs", "klmnopqr")):
        random = np.random.default_rng(0)
        words = ["".join(random.choice(list(letters), 5)) for _ in range(400)]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=model, vocab_size=40, minloglevel=2
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(folder / "theirs.model")
    write_documents(folder / "theirs", documents, np.int32, tokenizer.record())
    write_documents(folder / "unknown", documents, np.int32)
    recipe = MaskRecipe(8, 4, "uniform", 0.0)
    counts = count_ids(folder / "theirs", tokenizer.vocab_size)
    build_mask(counts, 8, 4, "uniform", frequent_mass=0.0, frequent_visible_experts=None).save(
        folder / "of_their_counts.safetensors"
    )
    build_routing_mask(recipe, vocab_size=tokenizer.vocab_size).save(folder / "without_counts.safetensors")


@pytest.fixture(scope="module")
def refusals(request, start, refusal, bad_files) -> dict[str, Future]:
    """Queue the runs of all selected cases at once."""
    selected = [item.callspec.params["case"] for item in request.session.items if "refusals" in item.fixturenames]
    return {
        case: start(f"refuse {case}", replace(refusal.run, flags=flags, mask=mask))
        for case, (flags, mask, _) in ALL_CASES.items()
        if case in selected
    }


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)])
def test_bad_input_ends_the_process(case, refusals, refusal):
    message = refusal(refusals[case])
    for part in ALL_CASES[case][-1]:
        assert part in message


@pytest.fixture
def error_of(workplace, tmp_path, monkeypatch) -> Callable[[Run], str]:
    """Check a run in this process, and return its error."""

    def error_of(run: Run) -> str:
        monkeypatch.chdir(workplace.folder)
        monkeypatch.setattr(sys, "argv", ["pretrain", *workplace.flags(run, tmp_path)])
        try:
            with pytest.raises(UserError) as error:
                parse_and_check_args(add_pretraining_arguments)
        finally:
            destroy_global_vars()
            unset_num_microbatches_calculator()
        assert "\n" not in str(error.value)
        return str(error.value)

    return error_of


@pytest.mark.parametrize("case", ALL_CASES)
def test_bad_input_is_found_by_the_checks(case, bad_files, refusal, error_of):
    flags, mask, parts = ALL_CASES[case]
    message = error_of(replace(refusal.run, flags=flags, mask=mask, saves="--save" not in flags))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty; give PREFIX… or WEIGHT PREFIX …"),
        (b"\xff\xfe", "is not a text file in UTF-8"),
        (b"-1 data", ": blend weight -1 is not a positive number"),
        (b"1 data data ended", " has weights for some datasets, but 'data' stands where a weight is expected"),
    ],
)
def test_bad_file_of_data_paths(content, message, refusal, error_of, tmp_path):
    path = tmp_path / "paths.txt"
    if content is not None:
        path.write_bytes(content)
    error = error_of(replace(refusal.run, omits="--data-path", flags=f"--data-args-path {path}"))
    assert error.startswith(f"--data-args-path {path}")
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "is damaged (Invalid JSON"),
        ("{'train': 1}", "is damaged (Invalid JSON"),
        ('["data"]', "has no entry 'train'; add a list of PREFIX… or WEIGHT PREFIX …, or null"),
        ('{"train": ["data"], "valid": null}', "has no entry 'test'"),
        ('{"train": 5, "valid": null, "test": null}', ": train must be a list of PREFIX… or WEIGHT PREFIX …, or null"),
        ('{"train": "data", "valid": [], "test": null}', ": valid is empty"),
        ('{"train": [0.5, "data", 0.5, 7], "valid": null, "test": null}', ": train holds 7 where a prefix is expected"),
        ('{"train": [1, "data", "ended", "data"], "valid": null, "test": null}', "train has weights for some datasets"),
        ('{"train": [0.5, "data", 0.5, "ended"], "valid": null, "test": null}', "there are no validation data"),
    ],
)
def test_bad_file_of_data_paths_per_split(content, message, refusal, error_of, tmp_path):
    path = tmp_path / "paths.json"
    if content is not None:
        path.write_text(content)
    error = error_of(replace(refusal.run, omits="--data-path", flags=f"--per-split-data-args-path {path}"))
    assert error.startswith(f"--per-split-data-args-path {path}") or message.startswith("there are no")
    assert message in error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lr", "no learning rate: pass --lr"),
        ("--train-iters", "no length of training: pass --train-iters or --train-samples"),
        ("--micro-batch-size", "no micro-batch size: pass --micro-batch-size"),
        ("--seq-length", "no sequence length: pass --seq-length"),
        ("--save-interval", "no interval between checkpoints: --save needs --save-interval"),
        ("--num-layers", "no number of layers: pass --num-layers, or --hybrid-layer-pattern"),
    ],
)
def test_missing_flag_is_named(flag, message, refusal, error_of):
    assert error_of(replace(refusal.run, omits=flag)) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-samples 7", "--train-samples 7 is less than the 8 samples of one step"),
        (
            "--train-samples 16 --lr-warmup-iters 3",
            "--lr-warmup-iters 3 with --train-samples: pass --lr-warmup-samples",
        ),
        ("--train-samples 16 --rampup-batch-size 2 2 8", "--rampup-batch-size is not supported. "),
    ],
)
def test_length_in_samples_that_cannot_be_trained(flags, message, refusal, error_of):
    assert error_of(replace(refusal.run, flags=flags, omits=IN_ITERATIONS)).startswith(message)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("--data-path nowhere", "nowhere"),  # every rank finds the error
        # Only the first rank reads the ids. The other rank waits for it until torchrun kills the rank.
        pytest.param("--data-path bad/large_ids", "large_ids", marks=pytest.mark.slow),
    ],
)
def test_one_line_from_many_ranks(flags, culprit, start, refusal, bad_files):
    run = replace(refusal.run, flags=flags, ranks=2, torchrun=True)
    assert culprit in refusal(start(f"refuse {culprit} on 2 ranks", run), exit_code=1)


def test_rank_that_alone_finds_bad_input_reports_it(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")

    def fail():
        raise UserError("only here")

    with pytest.raises(SystemExit) as end:
        run_tool(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: only here\n"
    assert len(waits) == 1


@pytest.fixture
def supported_args(monkeypatch):
    """Return a function that parses flags as the entry points do."""

    def parse(*flags: str):
        monkeypatch.setattr(sys, "argv", ["pretrain", "--num-experts", "8", "--transformer-impl", "local", *flags])
        return parse_args(add_maskmoe_arguments)

    return parse


def test_defaults_are_supported(supported_args):
    check_supported(supported_args())


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-router-load-balancing-type aux_loss sinkhorn",
        "--moe-router-topk 9",
        "--moe-router-group-topk 3 --moe-router-num-groups 4 --moe-router-topk 2",
        "--expert-model-parallel-size 3",
        "--heterogeneous-layers-config-path layers.json",
        "--sft",
        "--reset-attention-mask --no-create-attention-mask-in-dataloader",
        "--reset-attention-mask --transformer-impl transformer_engine",
        "--dataloader-inter-document-masking --context-parallel-size 2",
        "--dataloader-inter-document-masking --cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        "--dataloader-inter-document-masking --micro-batch-size 2 --moe-router-load-balancing-type seq_aux_loss",
        "--cross-entropy-loss-fusion",
    ],
)
def test_unsupported_setting(supported_args, flags):
    flags = flags.split()
    with pytest.raises(UserError) as refusal:
        check_supported(supported_args(*flags))
    assert flags[0] in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--reset-attention-mask --reset-position-ids --eod-mask-loss",
        "--dataloader-inter-document-masking --micro-batch-size 2",
        "--dataloader-inter-document-masking --micro-batch-size 1 --moe-router-load-balancing-type seq_aux_loss",
        "--dataloader-inter-document-masking --reset-attention-mask --no-create-attention-mask-in-dataloader",
    ],
)
def test_settings_that_keep_attention_to_documents(supported_args, flags):
    check_supported(supported_args(*flags.split()))


FLEX = "--moe-token-dispatcher-type flex --bf16 --expert-model-parallel-size 2"
NCCL_EP = f"{FLEX} --moe-flex-dispatcher-backend ncclep"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--moe-token-dispatcher-type flex --expert-model-parallel-size 2", "flex without --bf16"),
        ("--moe-token-dispatcher-type flex --bf16", "flex without --expert-model-parallel-size above 1"),
        (f"{FLEX} --moe-pad-expert-input-to-capacity", "flex with --moe-pad-expert-input-to-capacity"),
        (
            f"{NCCL_EP} --moe-expert-rank-capacity-factor 2 --use-transformer-engine-op-fuser",
            "ncclep with --use-transformer-engine-op-fuser",
        ),
        (f"{FLEX} --moe-expert-rank-capacity-factor 2", "factor without --moe-flex-dispatcher-backend ncclep"),
        (NCCL_EP, "ncclep without --moe-expert-rank-capacity-factor"),
        (f"{NCCL_EP} --moe-expert-rank-capacity-factor 2 --moe-ncclep-zero-copy", "--moe-ncclep-zero-copy"),
    ],
)
def test_unsupported_setting_of_the_flex_dispatcher(supported_args, flags, reason):
    with pytest.raises(UserError) as refusal:
        check_supported(supported_args(*flags.split()))
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "backend", "library"),
    [
        (FLEX, "deepep", "DeepEP 1"),
        (f"{FLEX} --moe-flex-dispatcher-backend hybridep", "hybridep", "HybridEP"),
        (f"{FLEX} --moe-flex-dispatcher-backend hybridep --moe-enable-deepep", "deepep", "DeepEP 1"),
        (f"{NCCL_EP} --moe-expert-rank-capacity-factor 2", "ncclep", "NCCL-EP"),
    ],
)
def test_missing_library_of_the_flex_dispatcher(supported_args, monkeypatch, flags, backend, library):
    """A run is refused; `--check`, whose machine need not be the machine of the run, only notes what is missing."""
    args = supported_args(*flags.split())
    for flag in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
        monkeypatch.setattr(fused_a2a, flag, False)
    with pytest.raises(UserError) as refusal:
        check_supported(args)
    assert f"--moe-flex-dispatcher-backend {backend} needs {library} (the Python package " in str(refusal.value)
    assert not list(unsupported_settings(args))
    assert list(missing_libraries(args)) == [str(refusal.value)]


def test_mask_of_a_model_without_experts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--routing-mask", "mask.safetensors"])
    with pytest.raises(UserError, match="--routing-mask without --num-experts is not supported"):
        check_supported(parse_args(add_maskmoe_arguments))


def test_unknown_flags_are_named_with_those_nearest(monkeypatch):
    arguments = ["--moe-router-topp", "2", "--num_layers=3", "--lr", "1e-3", "--qqq"]
    monkeypatch.setattr(sys, "argv", ["pretrain", "--lr", "1e-3"])
    with pytest.raises(UserError) as refusal:
        parse_args(lambda parser: refuse_unknown_flags(add_maskmoe_arguments(parser), arguments))
    assert str(refusal.value) == (
        "unknown flags --moe-router-topp (nearest: --moe-router-topk), --num_layers (nearest: --num-layers), --qqq; "
        "--help lists all"
    )
