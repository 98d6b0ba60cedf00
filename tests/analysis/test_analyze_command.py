"""`maskmoe analyze`, as a user runs it."""

import contextlib
import csv
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.command_lines import Outcome, run_command, writing_nothing
from support.small_series import ITERATIONS, NUM_EXPERTS, SPLIT, TRAINING
from support.tiny_maskmoe import make_model, random_mask

from maskmoe.analysis.model_series import find_models
from maskmoe.analysis.routing_report import PLOT_NAMES, TABLE_NAMES
from maskmoe.conversion.convert import Settings, megatron_to_huggingface
from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

FILES = {*TABLE_NAMES, *PLOT_NAMES}
BANDS = ("top 40 %", "next 50 %", "last 10 %")
SERIES = ("--load", "checkpoints", "--data-path", "data", "--split", SPLIT)
LAYERS = (1, 3)


def analyze(folder: Path, *words: object) -> Outcome:
    """Run `maskmoe analyze WORDS…` in a folder."""
    with contextlib.chdir(folder):
        return run_command("analyze", *words)


def read_table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def analysed_series(workplace, checkpoints) -> Path:
    """The folder with the results of the checkpoints of a run."""
    flags = ("--token-frequency", "counts.safetensors", "--tokens", 1500, "--save-traces")
    outcome = analyze(workplace.folder, *SERIES, *flags, "--output-dir", "series")
    assert outcome.code == 0, outcome.errors
    assert "routing the probe: 100%" in outcome.errors
    table, _, written = outcome.output.partition("\n\n")
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [["iteration", str(it)] for it in ITERATIONS]
    folder = workplace.folder / "series"
    assert {Path(line.split()[1]).name for line in written.splitlines()} == {path.name for path in folder.iterdir()}
    return folder


def test_files(analysed_series):
    traces = {f"trace_{number}.safetensors" for number in (1, 2, 3)}
    assert {path.name for path in analysed_series.iterdir()} == FILES | traces
    for name in PLOT_NAMES:
        assert (analysed_series / name).read_bytes().startswith(b"\x89PNG")


def test_tables_follow_from_the_traces(analysed_series, workplace):
    """The tables have the right statistics in the right places."""
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    frequency = TokenFrequency.load(workplace.folder / "counts.safetensors")
    band_of_id = FrequencyBands(frequency.occurrences).band_of_id
    tables = {name: read_table(analysed_series, name) for name in TABLE_NAMES}
    for rows in tables.values():
        assert {(row["checkpoint"], row["layer"]) for row in rows} <= {
            (f"iteration {iteration}", str(layer)) for iteration in ITERATIONS for layer in LAYERS
        }
        assert all(row["checkpoint"] == f"iteration {row['iteration']}" for row in rows)
    traces = [load_file(analysed_series / f"trace_{number}.safetensors") for number in (1, 2, 3)]
    before = None
    for iteration, trace in zip(ITERATIONS, traces, strict=True):
        for index, layer in enumerate(LAYERS):
            rows = {
                name: [row for row in of_all if (row["iteration"], row["layer"]) == (str(iteration), str(layer))]
                for name, of_all in tables.items()
            }
            experts, ids = trace["experts"][index], trace["token_ids"]
            assert np.array_equal(trace["num_visible"][index], mask.visible_sets(layer - 1)[ids].sum(axis=1))
            check_layer(rows, experts, ids, trace["num_visible"][index], trace["entropy"][index], band_of_id)
            changes = {row["tokens"]: float(row["changed"]) for row in rows["fluctuation.csv"]}
            assert set(changes) == (set() if before is None else {"all", "routable", *BANDS})
            if before is not None:
                pairs = zip(before["experts"][index].tolist(), experts.tolist(), strict=True)
                sets = [(set(old) - {-1}, set(new) - {-1}) for old, new in pairs]
                changed = np.array([1 - len(old & new) / max(len(old), len(new)) for old, new in sets])
                assert changes["all"] == pytest.approx(changed.mean(), abs=1e-5)
                assert changes["routable"] == pytest.approx(changed[trace["num_visible"][index] > 1].mean(), abs=1e-5)
                assert changes["top 40 %"] == pytest.approx(changed[band_of_id[ids] == 0].mean(), abs=1e-5)
                assert changes["routable"] > changes["all"] > 0
        before = trace


def check_layer(
    rows: dict[str, list[dict[str, str]]],
    experts: np.ndarray,
    ids: np.ndarray,
    num_visible: np.ndarray,
    entropy: np.ndarray,
    band_of_id: np.ndarray,
) -> None:
    """Compare the rows of a checkpoint and a layer with the trace of the layer."""
    load = {(row["band"], int(row["expert"])): int(row["assignments"]) for row in rows["load.csv"]}
    for band, name in enumerate(BANDS):
        of_band = experts[band_of_id[ids] == band]
        assert [load[name, expert] for expert in range(NUM_EXPERTS)] == [
            (of_band == expert).sum() for expert in range(NUM_EXPERTS)
        ]
    total = np.bincount(experts[experts >= 0], minlength=NUM_EXPERTS)
    (layer_row,) = rows["layers.csv"]
    assert float(layer_row["load_max_over_mean"]) == pytest.approx(total.max() / total.mean(), rel=1e-5)
    assert float(layer_row["entropy"]) == pytest.approx(entropy[num_visible > 1].mean(), rel=1e-5)
    assert float(layer_row["entropy"]) < float(layer_row["entropy_bound"]) <= math.log(3) + 1e-5
    assert float(layer_row["single_expert_share"]) == pytest.approx((num_visible == 1).mean(), abs=1e-6)
    assert 0 < float(layer_row["id_information"]) <= math.log(NUM_EXPERTS)
    occurrences = np.bincount(ids)
    assert [int(row["id"]) for row in rows["ids.csv"]] == np.flatnonzero(occurrences >= 8).tolist()
    for row in rows["ids.csv"]:
        token_id = int(row["id"])
        assert int(row["occurrences"]) == occurrences[token_id]
        assert row["band"] == BANDS[band_of_id[token_id]]
        assert int(row["distinct"]) == len(set(experts[ids == token_id, 0].tolist())) >= float(row["effective"]) - 1e-5
    for row in rows["top_ids.csv"]:
        token_id, expert = int(row["id"]), int(row["expert"])
        tokens = (experts[ids == token_id] == expert).sum()
        assert row["piece"]
        assert int(row["tokens"]) == tokens
        assert float(row["share"]) == pytest.approx(tokens / total[expert], rel=1e-5)
        lift = tokens / total[expert] / (occurrences[token_id] / len(ids))
        assert float(row["lift"]) == pytest.approx(lift, rel=1e-4)


@pytest.mark.slow
def test_checkpoints_of_a_hybrid_run(workplace):
    """The numbers of layers are those of a GPT model with the same layers."""
    flags = TRAINING.replace("--num-layers 3 --moe-layer-freq [1,0,1]", "--hybrid-layer-pattern *E*-*E")
    process = workplace.run_python("-m", "maskmoe.training.pretrain", *shlex.split(flags), "--save", "hybrid")
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    load = ("--load", "hybrid", *SERIES[2:], "--ckpt-step", ITERATIONS[-1])
    flags = ("--tokens", 500, "--save-traces", "--output-dir", "analysis_of_hybrid")
    assert analyze(workplace.folder, *load, *flags).code == 0
    folder = workplace.folder / "analysis_of_hybrid"
    assert {int(row["layer"]) for row in read_table(folder, "load.csv")} == set(LAYERS)
    trace = load_file(folder / "trace_1.safetensors")
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    for index, layer in enumerate(LAYERS):
        visible = mask.visible_sets(layer - 1)[trace["token_ids"]]
        assert np.array_equal(trace["num_visible"][index], visible.sum(axis=1))


def test_an_exported_model_and_a_text(workplace, checkpoints):
    tokenizer = str(workplace.folder / "tokenizer.model")
    megatron_to_huggingface(Settings(load=checkpoints, save=workplace.folder / "exported", tokenizer_model=tokenizer))
    (exported,) = find_models([workplace.folder / "exported"])
    of_checkpoint, of_exported = (model.open().args for model in (find_models([checkpoints])[0], exported))
    assert of_exported.tokenizer_sha256 == of_checkpoint.tokenizer_sha256
    flags = ("--load", "exported", "--input", "text.txt", "--seq-length", 16, "--tokens", 700, "--batch-size", 5)
    assert analyze(workplace.folder, *flags, "--output-dir", "of_text").code == 0
    folder = workplace.folder / "of_text"
    assert {path.name for path in folder.iterdir()} == FILES - {"fluctuation.png"}
    assert {(row["checkpoint"], row["iteration"]) for row in read_table(folder, "layers.csv")} == {("exported", "")}
    assert sum(int(row["assignments"]) for row in read_table(folder, "load.csv") if row["layer"] == "1") > 700
    assert read_table(folder, "fluctuation.csv") == []
    assert all(row["piece"] for row in read_table(folder, "ids.csv"))


def test_a_model_against_itself(tmp_path):
    """With one layer with experts and no token with a choice, cells without a value are empty."""
    settings = {"mlp_layer_types": ["dense", "sparse", "dense"], "num_experts_per_tok": 1}
    make_model(random_mask(1), **settings).save_pretrained(tmp_path / "model")
    outcome = analyze(tmp_path, "--load", "model", "model", "--data-path", write_data(tmp_path), "--output-dir", "out")
    changed = {row["tokens"]: row["changed"] for row in read_table(tmp_path / "out", "fluctuation.csv")}
    assert changed["all"] == "0"
    assert changed["routable"] == ""
    row = read_table(tmp_path / "out", "layers.csv")[0]
    assert (row["layer"], row["entropy"], row["single_expert_share"]) == ("2", "", "1")
    assert {row["distinct"] for row in read_table(tmp_path / "out", "ids.csv")} == {"1"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "Warning" not in outcome.errors


def write_data(folder: Path) -> str:
    """Write a dataset with the ids of the tiny model; return its prefix."""
    with IndexedDatasetWriter(folder / "tiny", np.uint16) as dataset:
        dataset.add_document(np.arange(600) % 60)
    return str(folder / "tiny")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--load", "nowhere"), "--load nowhere does not exist"),
        (("--seq-length", 33), "--seq-length is 33, but the model takes at most 32 tokens"),
        (("--token-frequency", "text.txt"), "text.txt"),
        (("--token-frequency", "few.safetensors"), "--token-frequency counts 60 ids, the model has 500"),
        (("--tokenizer-model", "nowhere.model"), "the tokenizer nowhere.model of"),
        (("--output-dir", "no/folder"), "cannot write to --output-dir no/folder: No such file or directory"),
    ],
)
def test_bad_input(workplace, checkpoints, flags, words):
    counts = np.array([[600, *[0] * 59]])
    datasets = ({"name": "d", "num_tokens": 600, "idx_sha256": "0" * 64, "bin_bytes": 1200},)
    TokenFrequency(counts, (None,), datasets, None).save(workplace.folder / "few.safetensors")
    series = SERIES[2:] if flags[0] == "--load" else SERIES  # the flag may be given only once
    with writing_nothing(workplace.folder):
        outcome = analyze(workplace.folder, *series, "--output-dir", "bad", *flags)
    outcome.assert_refused(words)
    assert outcome.output == ""


def test_split_of_files(workplace):
    outcome = analyze(
        workplace.folder, "--load", "nowhere", "--input", "text.txt", "--split", "1,1,1", "--output-dir", "bad"
    )
    outcome.assert_refused("--split is for --data-path")
