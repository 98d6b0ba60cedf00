"""Evaluation of a checkpoint by real processes, in several layouts."""

import json
import math
import re
import shlex

import numpy as np
import pytest

from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.routing_mask import RoutingMask

SETTINGS = """
    --use-checkpoint-args --data-path data --split 60,40,0 --tokenizer-type NullTokenizer --vocab-size 510
    --token-frequency counts.safetensors --eval-output evaluation.json
"""
LAYOUTS = {
    "one rank": ("", 1),
    # Neither 3 samples (a batch) nor 6 samples (the batches of two ranks) divide the number of samples.
    "expert parallel": ("--expert-model-parallel-size 2 --micro-batch-size 3", 2),
    "pipeline": ("--pipeline-model-parallel-size 2", 2),
}


@pytest.fixture(scope="module")
def evaluate(workplace, start_by_name):
    """Evaluate the checkpoint of a run; return the results and the output."""

    def evaluate(name: str, flags: str, ranks: int, run: str = "start") -> tuple[dict, str]:
        checkpoints = start_by_name(run).result().checkpoints
        folder = workplace.folder / "evaluations" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        output = folder / "evaluation.json"
        settings = shlex.split(SETTINGS.replace("evaluation.json", str(output)) + flags)
        program = ["-m", "maskmoe.training.evaluate", "--load", str(checkpoints), *settings]
        program += ["--data-cache-path", str(folder / "cache")]
        outcome = workplace.execute(program, folder, ranks)
        assert not any(outcome.exit_codes), outcome.report()
        return json.loads(output.read_text()), (folder / "out0.log").read_text()

    return evaluate


@pytest.fixture(scope="module")
def results(evaluate):
    return {name: evaluate(name, *layout) for name, layout in LAYOUTS.items()}


def samples_of_validation_split(workplace) -> int:
    """Return the number of sequences of 32 tokens, with their labels, in the last 40 % of the documents."""
    lengths = read_index(workplace.folder / "data").sequence_lengths
    return (int(lengths[round(0.6 * len(lengths)) :].sum()) - 1) // 32


def tokens_of_validation_split(workplace) -> np.ndarray:
    """Return all token ids in the last 40 % of the documents."""
    lengths = read_index(workplace.folder / "data").sequence_lengths
    return np.asarray(open_tokens(workplace.folder / "data"))[lengths[: round(0.6 * len(lengths))].sum() :]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_counts_once(results, workplace, name):
    evaluation, _ = results[name]

    assert evaluation["tokens"] == 32 * samples_of_validation_split(workplace)
    assert sum(band["tokens"] for band in evaluation["bands"]) == evaluation["tokens"]
    assert math.isclose(sum(band["share"] for band in evaluation["bands"]), 1)


def assert_agree(evaluation: dict, reference: dict) -> None:
    """Compare evaluations in two layouts. Losses are fp32 sums, whose order depends on the layout."""
    assert math.isclose(evaluation["loss"], reference["loss"], rel_tol=1e-6)
    for band, expected in zip(evaluation["bands"], reference["bands"], strict=True):
        assert band["tokens"] == expected["tokens"]
        assert math.isclose(band["loss"], expected["loss"], rel_tol=1e-6)
    assert evaluation["expert_load"] == reference["expert_load"]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_layouts_agree(results, name):
    assert_agree(results[name][0], results["one rank"][0])


@pytest.mark.slow
def test_context_parallel_ranks_agree_with_one_rank(evaluate, results):
    """Each rank holds two chunks of every sequence, and the last micro-batch is filled up."""
    evaluation, _ = evaluate("context parallel", "--context-parallel-size 2 --micro-batch-size 3", 2)
    assert_agree(evaluation, results["one rank"][0])


def test_bands_make_up_the_whole(results):
    evaluation, _ = results["one rank"]
    bands = evaluation["bands"]

    weighted = sum(band["loss"] * band["tokens"] for band in bands) / evaluation["tokens"]

    assert [band["name"] for band in bands] == ["top 40 %", "next 50 %", "last 10 %"]
    assert math.isclose(weighted, evaluation["loss"], rel_tol=1e-9)
    assert math.isclose(evaluation["perplexity"], math.exp(evaluation["loss"]))


def test_expert_load_is_what_the_mask_allows(results, workplace):
    """Tokens with one visible expert go to that expert; all other tokens go to at most two visible experts."""
    evaluation, _ = results["one rank"]
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    tokens = tokens_of_validation_split(workplace)
    left_out = len(tokens) - evaluation["tokens"]  # too few for a sample

    assert [load["layer"] for load in evaluation["expert_load"]] == [1, 2, 3, 4]
    for load in evaluation["expert_load"]:
        visible = mask.visible_sets(load["layer"] - 1)[tokens]  # [tokens, experts]
        counts = np.array(load["tokens_per_expert"])
        assert 0 <= np.minimum(visible.sum(axis=1), 2).sum() - counts.sum() <= 2 * left_out
        assert (counts >= visible[visible.sum(axis=1) == 1].sum(axis=0) - left_out).all()
        assert (counts <= visible.sum(axis=0)).all()
        assert math.isclose(load["max_over_mean"], counts.max() / counts.mean())


def test_tokens_of_multi_token_prediction_count_in_a_layer_of_their_own(evaluate, workplace):
    """The second of four layers is dense. The layer of multi-token prediction follows as layer 5."""
    evaluation, _ = evaluate("multi-token prediction", "", 1, run="rich")

    assert [load["layer"] for load in evaluation["expert_load"]] == [1, 3, 4, 5]
    mask = RoutingMask.load(workplace.folder / "five_layers.safetensors")
    for load in evaluation["expert_load"]:
        num_visible = mask.visible_sets(load["layer"] - 1)[tokens_of_validation_split(workplace)].sum(axis=1)
        # Multi-token prediction shifts the ids of a sample by one, and appends id 0.
        num_appended = samples_of_validation_split(workplace) if load["layer"] == 5 else 0
        assert 0 < sum(load["tokens_per_expert"]) <= np.minimum(num_visible, 2).sum() + 2 * num_appended


@pytest.mark.slow
def test_uneven_batches_on_one_rank(evaluate, results, workplace):
    evaluation, _ = evaluate("uneven batches", "--micro-batch-size 3", 1)

    assert evaluation["tokens"] == 32 * samples_of_validation_split(workplace)
    assert math.isclose(evaluation["loss"], results["one rank"][0]["loss"], rel_tol=1e-6)
    assert evaluation["expert_load"] == results["one rank"][0]["expert_load"]


@pytest.mark.slow
def test_each_rank_counts_its_part_of_the_sequence(evaluate, results):
    """Under sequence parallelism, each tensor-parallel rank routes other tokens."""
    evaluation, _ = evaluate("sequence parallel", "--tensor-model-parallel-size 2 --sequence-parallel", 2)
    loads, expected = (of_run["expert_load"] for of_run in (evaluation, results["one rank"][0]))
    assert [sum(load["tokens_per_expert"]) for load in loads] == [sum(load["tokens_per_expert"]) for load in expected]


@pytest.mark.slow
def test_documents_are_kept_apart_if_the_flag_is_given(evaluate):
    """The data loader's masks say the same; the documents end with the id that the masks look for."""
    packed, masked, whole = (
        evaluate(f"documents {flag}", f"--data-path ended {flag}", 1, run="rich")[0]
        for flag in ("--dataloader-inter-document-masking", "--reset-attention-mask", "")
    )
    assert packed["tokens"] == masked["tokens"] == whole["tokens"]
    assert math.isclose(packed["loss"], masked["loss"], rel_tol=1e-6)
    assert not math.isclose(packed["loss"], whole["loss"], rel_tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "ranks"),
    [
        ("hybrid", "--hybrid-layer-pattern *E*E*E*E", 1),
        ("hybrid pipeline", "--hybrid-layer-pattern *E*E|*E*E --pipeline-model-parallel-size 2", 2),
    ],
)
def test_hybrid_twin_has_the_losses_and_loads_of_its_gpt_model(evaluate, results, name, flags, ranks):
    twin, gpt = evaluate(name, f" {flags}", ranks)[0], results["one rank"][0]
    assert math.isclose(twin["loss"], gpt["loss"], rel_tol=1e-6)
    assert twin["expert_load"] == gpt["expert_load"]


def test_loss_is_megatrons_validation_loss(results, workplace, start_by_name):
    """Compare with `pretrain --skip-train`, which evaluates exactly the samples of the split."""
    checkpoints = start_by_name("start").result().checkpoints
    folder = workplace.folder / "evaluations" / "megatron"
    folder.mkdir(parents=True)
    flags = [*shlex.split(SETTINGS.split("--token-frequency")[0]), "--load", str(checkpoints), "--skip-train"]
    flags += shlex.split(f"--micro-batch-size 1 --eval-iters {samples_of_validation_split(workplace)} --num-workers 0")
    flags += ["--data-cache-path", str(folder / "cache"), "--global-batch-size", "1", "--train-iters", "1"]

    outcome = workplace.execute(["-m", "maskmoe.training.pretrain", *flags], folder, 1)

    assert not any(outcome.exit_codes), outcome.report()
    printed = re.search(r"on validation set \| lm loss value: ([\d.E+-]+)", (folder / "out0.log").read_text())
    assert math.isclose(float(printed[1]), results["one rank"][0]["loss"], rel_tol=1e-6)


def test_table_shows_the_results(results):
    evaluation, printed = results["one rank"]

    assert re.search(rf"all +100.0% +{evaluation['tokens']:,} +{evaluation['loss']:.4f}", printed)
    assert f"1: {evaluation['expert_load'][0]['max_over_mean']:.2f}" in printed


@pytest.mark.slow
def test_limited_number_of_batches(evaluate, workplace):
    """A global batch is 3 samples here."""
    evaluation, _ = evaluate("limited", "--micro-batch-size 3 --eval-iters 2", 1)
    assert evaluation["tokens"] == 2 * 3 * 32 < 32 * samples_of_validation_split(workplace)
