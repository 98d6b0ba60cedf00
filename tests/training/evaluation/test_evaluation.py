"""Evaluation of a checkpoint by real processes, in several layouts."""

import json
import math
import re
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from support.datasets import count_ids, frequency_of, predictable_ids, write_documents
from support.launchers import Outcome
from support.training import VOCAB_SIZE

from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.evaluation import evaluation

DATA = "--data-path data --split 60,40,0"
MODEL = "--use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 510"
SETTINGS = f"{MODEL} --token-frequency counts.safetensors --output evaluation.json"
PREFIX_FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
FILE_FLAGS = ("data_args_path", "per_split_data_args_path")
OTHER_INPUTS = (
    *("load", "routing_mask", "tokenizer_model", "token_frequency"),
    *("vocab_file", "merge_file", "metadata_path"),
)
LAYOUTS = {
    "one rank": ("", 1),
    # Neither 3 samples (a batch) nor 6 samples (the batches of two ranks) divide the number of samples.
    "expert parallel": ("--expert-model-parallel-size 2 --micro-batch-size 3", 2),
}
# Under context parallelism, each rank holds two chunks of every sequence, and the last micro-batch is filled up.
MORE_LAYOUTS = {
    "pipeline": ("--pipeline-model-parallel-size 2", 2),
    "context parallel": ("--context-parallel-size 2 --micro-batch-size 3", 2),
}


@pytest.fixture(scope="module")
def execute(workplace, start_by_name):
    """Evaluate the checkpoint of a run; return the outcome, in whose folder the results are."""

    def execute(name: str, flags: str, ranks: int, run: str = "start", data: str = DATA) -> Outcome:
        checkpoints = start_by_name(run).result().checkpoints
        folder = workplace.folder / "evaluations" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        settings = shlex.split(f"{SETTINGS} {data} {flags}".replace("evaluation.json", f"{folder}/evaluation.json"))
        program = ["-m", "maskmoe.training.evaluate", "--load", str(checkpoints), *settings]
        program += ["--data-cache-path", str(folder / "cache")]
        return workplace.execute(program, folder, ranks)

    return execute


@pytest.fixture(scope="module")
def evaluate(execute):
    """Evaluate the checkpoint of a run; return the results and the output."""

    def evaluate(*args: object, **options: object) -> tuple[dict, str]:
        outcome = execute(*args, **options)
        assert not any(outcome.exit_codes), outcome.report()
        return json.loads((outcome.folder / "evaluation.json").read_text()), (outcome.folder / "out0.log").read_text()

    return evaluate


@pytest.fixture(scope="module")
def results(evaluate):
    return {name: evaluate(name, *layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("flag", [*PREFIX_FLAGS, *FILE_FLAGS])
def test_results_are_not_written_over_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """A dataset named in a file of arguments is an input, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_args_path").write_text("2 data")
    (tmp_path / "per_split_data_args_path").write_text('{"train": null, "valid": "2 data", "test": null}')
    args = Namespace(**dict.fromkeys((*PREFIX_FLAGS, *FILE_FLAGS, *OTHER_INPUTS)), force=True)
    setattr(args, flag, flag if flag in FILE_FLAGS else ["2", "data"])
    for output in ("data.bin", "data.idx", "data.tokenizer.json", *{flag}.intersection(FILE_FLAGS)):
        args.output = output
        with pytest.raises(UserError, match="it is an input of this command"):
            evaluation.check_output(args)
    args.output = "new"
    evaluation.check_output(args)


@pytest.mark.parametrize("flag", OTHER_INPUTS)
def test_results_are_not_written_over_other_inputs(flag: str) -> None:
    args = Namespace(**dict.fromkeys((*PREFIX_FLAGS, *FILE_FLAGS, *OTHER_INPUTS)), force=True, output="input")
    setattr(args, flag, "input")
    with pytest.raises(UserError, match="it is an input of this command"):
        evaluation.check_output(args)


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


def test_expert_parallel_ranks_agree_with_one_rank(results):
    assert_agree(results["expert parallel"][0], results["one rank"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_more_layouts_agree_with_one_rank(evaluate, results, name):
    assert_agree(evaluate(name, *MORE_LAYOUTS[name])[0], results["one rank"][0])


def test_bands_make_up_the_whole(results):
    evaluation, printed = results["one rank"]
    bands = evaluation["bands"]

    weighted = sum(band["loss"] * band["tokens"] for band in bands) / evaluation["tokens"]

    assert [band["name"] for band in bands] == ["top 40 %", "next 50 %", "last 10 %"]
    assert math.isclose(weighted, evaluation["loss"], rel_tol=1e-9)
    assert math.isclose(evaluation["perplexity"], math.exp(evaluation["loss"]))
    assert re.search(rf"all +100.0% +{evaluation['tokens']:,} +{evaluation['loss']:.4f}", printed)
    assert f"1: {evaluation['expert_load'][0]['max_over_mean']:.2f}" in printed


def test_band_without_tokens_has_no_loss(workplace, execute):
    """The only id of the counts makes up the first band, and no id is left for the second. A batch is 3 samples."""
    write_documents(workplace.folder / "one_id", [np.full(120, 3)], np.int32)
    count_ids(workplace.folder / "one_id", VOCAB_SIZE).save(workplace.folder / "one_id.safetensors")
    outcome = execute(
        "band without tokens", "--token-frequency one_id.safetensors --micro-batch-size 3 --eval-iters 2", 1
    )
    assert outcome.exit_codes == (0,), outcome.report()
    text = (outcome.folder / "evaluation.json").read_text()
    assert not re.search("NaN|Infinity", text)  # JSON has neither
    evaluation = json.loads(text)
    first, second, last = evaluation["bands"]
    assert evaluation["tokens"] == 2 * 3 * 32 < 32 * samples_of_validation_split(workplace)
    assert (second["loss"], second["perplexity"], second["tokens"]) == (None, None, 0)
    assert first["loss"] > 0 < last["loss"]


def test_counts_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    record = TokenizerRecord("SentencePieceTokenizer", "first.model", "a" * 64, 3, eod_id=0)
    frequency_of([5, 4, 3], record).save(tmp_path / "counts")
    args = Namespace(token_frequency=tmp_path / "counts", tokenizer_sha256="a" * 64, tokenizer_model="second.model")
    monkeypatch.setattr(evaluation, "get_tokenizer", lambda: Namespace(vocab_size=3))
    assert evaluation.read_token_frequency(args).tokenizer == record
    args.tokenizer_sha256 = "b" * 64
    with pytest.raises(UserError, match=r"counts was made with another tokenizer \(first.model.* second.model"):
        evaluation.read_token_frequency(args)


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


@pytest.mark.runs("rich")
def test_tokens_of_multi_token_prediction_count_in_a_layer_of_their_own(runs, evaluate, workplace):
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
def test_planned_tokens_of_tensor_parallel_ranks_count_once(evaluate):
    """The mask allows plans. Both ranks hold all tokens, and each routes the tokens of its experts."""
    layout = "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --expert-model-parallel-size 2"
    one_rank, two_ranks = (
        evaluate(f"planned on {ranks}", flags, ranks, run="experts of one rank")[0]
        for ranks, flags in ((1, ""), (2, layout))
    )
    for load, expected in zip(two_ranks["expert_load"], one_rank["expert_load"], strict=True):
        # Two experts of a token may have scores that are equal up to rounding.
        assert load["tokens_per_expert"] == pytest.approx(expected["tokens_per_expert"], abs=2)


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
def test_hybrid_twin_has_the_losses_and_loads_of_its_gpt_model(evaluate, results):
    flags = "--hybrid-layer-pattern *E*E|*E*E --pipeline-model-parallel-size 2"
    twin, gpt = evaluate("hybrid pipeline", flags, 2)[0], results["one rank"][0]
    assert math.isclose(twin["loss"], gpt["loss"], rel_tol=1e-6)
    assert twin["expert_load"] == gpt["expert_load"]


def test_loss_is_megatrons_validation_loss(results, workplace, start_by_name):
    """Compare with `pretrain --skip-train`, which evaluates exactly the samples of the split."""
    checkpoints = start_by_name("start").result().checkpoints
    folder = workplace.folder / "evaluations" / "megatron"
    folder.mkdir(parents=True)
    flags = [*shlex.split(f"{MODEL} {DATA}"), "--load", str(checkpoints), "--skip-train"]
    flags += shlex.split(f"--micro-batch-size 1 --eval-iters {samples_of_validation_split(workplace)} --num-workers 0")
    flags += ["--data-cache-path", str(folder / "cache"), "--global-batch-size", "1", "--train-iters", "1"]

    outcome = workplace.execute(["-m", "maskmoe.training.pretrain", *flags], folder, 1)

    assert not any(outcome.exit_codes), outcome.report()
    printed = re.search(r"on validation set \| lm loss value: ([\d.E+-]+)", (folder / "out0.log").read_text())
    assert math.isclose(float(printed[1]), results["one rank"][0]["loss"], rel_tol=1e-6)


@pytest.fixture(scope="module")
def second(workplace, evaluate) -> dict:
    """Write datasets beside `data`, and return the evaluation of one of them: the others have no sample to evaluate.

    The last 40 % of the documents are no document in `one_document`, and 10 tokens in `short_documents`.
    """
    documents = predictable_ids(np.random.default_rng(1), VOCAB_SIZE, num_documents=12)
    write_documents(workplace.folder / "second", documents)
    write_documents(workplace.folder / "one_document", documents[:1])
    write_documents(workplace.folder / "short_documents", [document[:10] for document in documents[:3]])
    return evaluate("second", "--data-path second", 1)[0]


def assert_sum(evaluation: dict, parts: list[dict]) -> None:
    """Compare the evaluation of several datasets with the evaluations of each."""
    assert evaluation["tokens"] == sum(part["tokens"] for part in parts)
    of_parts = sum(part["loss"] * part["tokens"] for part in parts) / evaluation["tokens"]
    assert math.isclose(evaluation["loss"], of_parts, rel_tol=1e-6)
    for band, *of_band in zip(evaluation["bands"], *(part["bands"] for part in parts), strict=True):
        assert band["tokens"] == sum(part["tokens"] for part in of_band)
    for load, *of_layer in zip(evaluation["expert_load"], *(part["expert_load"] for part in parts), strict=True):
        counts = [part["tokens_per_expert"] for part in of_layer]
        assert load["tokens_per_expert"] == np.sum(counts, axis=0).tolist()


@pytest.mark.parametrize(
    ("name", "flags", "ranks"),
    [
        ("weights", "--data-path 0.7 data 0.1 second 0.1 one_document 0.1 short_documents", 1),
        pytest.param(
            *(
                "no weights",
                "--data-path data one_document second --tensor-model-parallel-size 2 --sequence-parallel",
                2,
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_sample_of_several_datasets_counts_once(execute, results, second, name, flags, ranks):
    """The ranks of the last case share each tensor, so that only the first rank reads data."""
    outcome = execute(name, flags, ranks)
    assert_sum(json.loads((outcome.folder / "evaluation.json").read_text()), [results["one rank"][0], second])
    left_out = [word for word in ("one_document", "short_documents") if word in flags]
    notes = [f"note: dataset {name} has no sample in the valid split" for name in left_out]
    assert [line for line in outcome.errors[0].splitlines() if line.startswith("note: dataset")] == notes


@pytest.mark.slow
def test_datasets_without_samples_are_refused(execute, second):
    outcome = execute("all left out", "--data-path 0.5 one_document 0.5 short_documents", 1)
    assert outcome.exit_codes == (2,), outcome.report()
    assert "no dataset has a sample in the valid split" in outcome.errors[0]


@pytest.mark.slow
def test_datasets_of_one_split(evaluate, second):
    """All documents are evaluated, without a share in `--split`."""
    names = ("data", "second")
    parts = [evaluate(f"all of {name}", "", 1, data=f"--data-path {name} --split 0,1,0")[0] for name in names]
    data = "--train-data-path 0.5 data 0.5 second --valid-data-path 0.3 data 0.7 second"
    evaluation, _ = evaluate("split", "", 1, data=data)
    assert_sum(evaluation, parts)
