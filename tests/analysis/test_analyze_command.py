"""`maskmoe analyze`, as a user runs it."""

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.command_lines import Outcome, run_command, writing_nothing
from support.datasets import frequency_of, write_documents
from support.small_series import ITERATIONS, NUM_EXPERTS, SPLIT
from support.tiny_maskmoe import make_model, random_mask

from maskmoe.analysis.model_series import find_models
from maskmoe.analysis.routing_report import PLOT_NAMES, TABLE_NAMES
from maskmoe.analysis.routing_statistics import AnalysisSettings, RoutingTrace, measure
from maskmoe.conversion.convert import Settings, megatron_to_huggingface
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

FILES = {*TABLE_NAMES, *PLOT_NAMES}
BANDS = ("top 40 %", "next 50 %", "last 10 %")
SERIES = ("--load", "checkpoints", "--data-path", "data", "--split", SPLIT)
LAYERS = (1, 3)


def analyze(folder: Path, *words: object) -> Outcome:
    """Run `maskmoe analyze WORDS…` in a folder."""
    return run_command("analyze", *words, folder=folder)


def read_table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def analysed_series(workplace, checkpoints) -> Path:
    """The folder with the results of the checkpoints of a run."""
    flags = ("--token-frequency", "counts.safetensors", "--tokens", 1500, "--save-traces")
    outcome = analyze(workplace, *SERIES, *flags, "--output-dir", "series")
    assert outcome.code == 0, outcome.errors
    assert "routing the probe: 100%" in outcome.errors
    table, _, written = outcome.output.partition("\n\n")
    folder = workplace / "series"
    assert {Path(line.split()[1]).name for line in written.splitlines()} == {path.name for path in folder.iterdir()}
    # The means over the layers, rounded, are those of the files.
    layers = read_table(folder, "layers.csv")
    for line, iteration in zip(table.splitlines()[2:], ITERATIONS, strict=True):
        shown, rows = line.split(), [row for row in layers if row["iteration"] == str(iteration)]
        assert shown[:2] == ["iteration", str(iteration)]
        for number, column in enumerate(("load_max_over_mean", "entropy", "entropy_bound"), 2):
            assert float(shown[number]) == pytest.approx(np.mean([float(row[column]) for row in rows]), abs=0.006)
    return folder


def test_tables_have_the_statistics_of_the_traces(analysed_series, workplace):
    """tests/analysis/test_routing_statistics.py proves the statistics; the tables have them in the right places."""
    mask = RoutingMask.load(workplace / "mask.safetensors")
    bands = FrequencyBands(TokenFrequency.load(workplace / "counts.safetensors").occurrences)
    tables = {name: read_table(analysed_series, name) for name in TABLE_NAMES}
    before = None
    for number, iteration in enumerate(ITERATIONS, 1):
        trace = RoutingTrace(**load_file(analysed_series / f"trace_{number}.safetensors"), num_experts=NUM_EXPERTS)
        measured = measure(trace, before, bands, AnalysisSettings())
        ids = trace.token_ids
        for index, layer in enumerate(LAYERS):
            place = {"checkpoint": f"iteration {iteration}", "iteration": str(iteration), "layer": str(layer)}
            rows = {name: [row for row in table if place.items() <= row.items()] for name, table in tables.items()}
            assert np.array_equal(trace.num_visible[index], mask.visible_sets(layer - 1)[ids].sum(axis=1))
            load = {(row["band"], int(row["expert"])): int(row["assignments"]) for row in rows["load.csv"]}
            assert load == {(BANDS[band], n): count for (band, n), count in np.ndenumerate(measured.load[index])}
            (of_layer,) = rows["layers.csv"]
            of_experts = measured.load[index].sum(axis=0)
            assert float(of_layer["load_max_over_mean"]) == pytest.approx(
                of_experts.max() / of_experts.mean(), rel=1e-5
            )
            for name in ("entropy", "entropy_bound", "first_weight", "single_expert_share"):
                assert float(of_layer[name]) == pytest.approx(getattr(measured, name)[index], rel=1e-5)
            shares = {(row["experts"], row["tokens"]): row["explained"] for row in rows["explained.csv"]}
            assert [*shares] == [("first", "all"), ("first", "routable"), ("all", "all"), ("all", "routable")]
            assert [*map(float, shares.values())] == pytest.approx(measured.explained[..., index].ravel(), rel=1e-5)
            listed = np.flatnonzero(np.bincount(ids) >= 8).tolist()
            assert [int(row["id"]) for row in rows["ids.csv"]] == listed
            assert [int(row["occurrences"]) for row in rows["ids.csv"]] == np.bincount(ids)[listed].tolist()
            assert [int(row["distinct"]) for row in rows["ids.csv"]] == measured.distinct[index].tolist()
            effective = [float(row["effective"]) for row in rows["ids.csv"]]
            assert effective == pytest.approx(measured.effective[index].tolist(), rel=1e-5)
            assert all(row["band"] == BANDS[bands.band_of_id[int(row["id"])]] for row in rows["ids.csv"])
            ranked = {(int(row["expert"]), int(row["rank"]) - 1): int(row["id"]) for row in rows["top_ids.csv"]}
            assert ranked
            assert ranked == {
                place: measured.top_ids[index][place]
                for place in zip(*measured.top_counts[index].nonzero(), strict=True)
            }
            for row in rows["top_ids.csv"]:
                token_id, expert = int(row["id"]), int(row["expert"])
                assert int(row["tokens"]) == (trace.experts[index][ids == token_id] == expert).sum()
                assert row["piece"]
                share = int(row["tokens"]) / measured.load[index, :, expert].sum()
                assert float(row["share"]) == pytest.approx(share, rel=1e-5)
                assert float(row["lift"]) == pytest.approx(share / (ids == token_id).mean(), rel=1e-4)
            changes = [float(row["changed"]) for row in rows["fluctuation.csv"]]
            groups = [row["tokens"] for row in rows["fluctuation.csv"]]
            assert groups == ([] if before is None else ["all", "routable", *BANDS])
            if measured.changed is not None:
                assert changes == pytest.approx(measured.changed[:, index].tolist(), abs=1e-5)
        before = trace


def test_an_exported_model(workplace, checkpoints):
    tokenizer = str(workplace / "tokenizer.model")
    megatron_to_huggingface(Settings(load=checkpoints, save=workplace / "exported", tokenizer_model=tokenizer))
    (exported,) = find_models([workplace / "exported"])
    of_checkpoint, of_exported = (model.open().args for model in (find_models([checkpoints])[0], exported))
    assert of_exported.tokenizer_sha256 == of_checkpoint.tokenizer_sha256
    flags = ("--load", "exported", "--data-path", "data", "--seq-length", 16, "--tokens", 700, "--batch-size", 5)
    assert analyze(workplace, *flags, "--output-dir", "of_exported").code == 0
    folder = workplace / "of_exported"
    assert {path.name for path in folder.iterdir()} == FILES - {"fluctuation.png"}
    assert {(row["checkpoint"], row["iteration"]) for row in read_table(folder, "layers.csv")} == {("exported", "")}
    assert sum(int(row["assignments"]) for row in read_table(folder, "load.csv") if row["layer"] == "1") > 700
    assert read_table(folder, "fluctuation.csv") == []
    assert all(row["piece"] for row in read_table(folder, "ids.csv"))


def test_a_model_against_itself(tmp_path):
    """With one layer with experts and no token with a choice, cells without a value are empty."""
    settings = {"mlp_layer_types": ["dense", "sparse", "dense"], "num_experts_per_tok": 1}
    make_model(random_mask(1), **settings).save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "tiny", [np.arange(600) % 60])
    outcome = analyze(tmp_path, "--load", "model", "model", "--data-path", "tiny", "--output-dir", "out")
    changed = {row["tokens"]: row["changed"] for row in read_table(tmp_path / "out", "fluctuation.csv")}
    assert changed["all"] == "0"
    assert changed["routable"] == ""
    row = read_table(tmp_path / "out", "layers.csv")[0]
    assert (row["layer"], row["entropy"], row["single_expert_share"]) == ("2", "", "1")
    assert {row["distinct"] for row in read_table(tmp_path / "out", "ids.csv")} == {"1"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "Warning" not in outcome.errors


def test_a_model_of_long_context_reads_several_windows(tmp_path):
    """The model takes 64 tokens, as many as the probe has."""
    make_model().save_pretrained(tmp_path / "model")
    write_documents(tmp_path / "data", [np.arange(6000) // 100])
    words = ("--load", "model", "--data-path", "data", "--tokens", 64, "--output-dir", "out")
    assert analyze(tmp_path, *words).code == 0
    ids = sorted({int(row["id"]) for row in read_table(tmp_path / "out", "ids.csv")})
    assert ids == [0, 8, 17, 25, 34, 42, 51, 59]


@pytest.mark.parametrize(
    ("vocab_size", "error"),
    [(60, "--token-frequency counts 60 ids"), (500, "--token-frequency was made with another tokenizer")],
)
def test_counts_of_another_vocabulary_are_refused(workplace, checkpoints, vocab_size, error):
    other = TokenizerRecord("SentencePieceTokenizer", "other.model", "b" * 64, vocab_size, eod_id=0)
    frequency_of([600] * vocab_size, other).save(workplace / f"{vocab_size}.safetensors")
    with writing_nothing(workplace):
        outcome = analyze(workplace, *SERIES, "--output-dir", "bad", "--token-frequency", f"{vocab_size}.safetensors")
    outcome.assert_refused(error)
    assert outcome.output == ""
