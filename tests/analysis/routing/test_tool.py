"""The command analyze_routing, as a user runs it."""

import csv
import json
import math
import runpy
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT
from support.small_series import ITERATIONS, NUM_EXPERTS, SPLIT, TRAINING, VOCAB_SIZE
from support.tiny_maskmoe import make_model, random_mask

from maskmoe.analysis.routing.analysis import analyze
from maskmoe.analysis.routing.models import find_models
from maskmoe.analysis.routing.plots import PLOT_NAMES
from maskmoe.analysis.routing.probe import DatasetText
from maskmoe.analysis.routing.report import TABLE_NAMES, summarise
from maskmoe.analysis.routing.settings import AnalysisSettings
from maskmoe.analysis.routing.trace import RoutingTrace
from maskmoe.conversion.convert import Settings, megatron_to_huggingface
from maskmoe.data.indexed_dataset import IndexedDatasetWriter
from maskmoe.routing_mask import RoutingMask, TokenFrequency

FILES = {"routing.json", *TABLE_NAMES, *PLOT_NAMES}
BANDS = ("top 40 %", "next 50 %", "last 10 %")
SERIES = ("--load", "checkpoints", "--data-path", "data", "--split", SPLIT)
LAYERS = (1, 3)


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "routing.json").read_text(encoding="utf-8"))


def read_table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def analysed_series(workplace, checkpoints) -> Path:
    """The folder with the results of the checkpoints of a run."""
    flags = ("--token-frequency", "counts.safetensors", "--tokens", 1500, "--capacity-factors", 1, 1.5, "--save-traces")
    process = workplace.analyze(*SERIES, *flags, "--scratch-dir", ".", "--output-dir", "series")
    assert process.returncode == 0, process.stderr
    assert "routing the probe: 100%" in process.stderr
    table, _, written = process.stdout.partition("\n\n")
    assert [line.split()[:2] for line in table.splitlines()[3:]] == [["iteration", str(it)] for it in ITERATIONS]
    folder = workplace.folder / "series"
    assert {Path(line.split()[1]).name for line in written.splitlines()} == {path.name for path in folder.iterdir()}
    assert not list(workplace.folder.glob("analyze_routing_*"))
    return folder


def test_files(analysed_series):
    traces = {f"trace_{number}.safetensors" for number in (1, 2, 3)}
    assert {path.name for path in analysed_series.iterdir()} == FILES | traces
    for name in PLOT_NAMES:
        assert (analysed_series / name).read_bytes().startswith(b"\x89PNG")


def test_summary_follows_from_the_traces(analysed_series, workplace):
    """The summary has the right statistics in the right places."""
    summary = read_summary(analysed_series)
    traces = [RoutingTrace.load(analysed_series / f"trace_{number}.safetensors") for number in (1, 2, 3)]
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    assert (summary["vocab_size"], summary["num_experts"], summary["topk"]) == (VOCAB_SIZE, NUM_EXPERTS, 2)
    assert summary["layers"] == list(LAYERS)
    assert summary["probe"]["tokens"] == 1500
    assert summary["probe"]["seq_length"] == 32
    assert [band["name"] for band in summary["probe"]["bands"]] == list(BANDS)
    assert sum(band["tokens"] for band in summary["probe"]["bands"]) == 1500
    for iteration, trace, checkpoint in zip(ITERATIONS, traces, summary["checkpoints"], strict=True):
        assert (checkpoint["name"], checkpoint["iteration"]) == (f"iteration {iteration}", iteration)
        assert (trace.name, trace.iteration, trace.layers) == (f"iteration {iteration}", iteration, LAYERS)
        for index, layer in enumerate(LAYERS):
            visible = mask.visible_sets(layer - 1)[trace.token_ids]
            assert np.array_equal(trace.num_visible[index], visible.sum(axis=1))
            load = np.bincount(trace.experts[index][trace.experts[index] >= 0], minlength=NUM_EXPERTS)
            assert checkpoint["load"]["assignments"][index] == load.tolist()
            assert checkpoint["load"]["max_over_mean"][index] == pytest.approx(load.max() / load.mean())
            of_bands = [checkpoint["load"]["by_band"][name]["assignments"][index] for name in BANDS]
            assert np.array_equal(np.sum(of_bands, axis=0), load)
            routable = trace.num_visible[index] > 1
            assert checkpoint["entropy"][index] == pytest.approx(trace.entropy[index][routable].mean(), rel=1e-5)
            assert checkpoint["entropy"][index] < checkpoint["entropy_bound"][index] <= math.log(3) + 1e-9
            assert checkpoint["single_expert_token_share"][index] == pytest.approx(1 - routable.mean())
        assert [drop["capacity_factor"] for drop in checkpoint["drops"]] == [1, 1.5]
        assert all(first >= second for first, second in zip(*(d["by_layer"] for d in checkpoint["drops"]), strict=True))
        distinct = checkpoint["distinct_experts"]
        assert distinct["ids"] == sum(distinct["by_band"][name]["ids"] for name in BANDS) > 20
        assert 1 < distinct["effective_by_layer"][0] <= distinct["by_layer"][0] <= 3
        assert 0 < checkpoint["id_expert_information"][0] <= checkpoint["id_expert_information_bound"]
        assert len(checkpoint["next_layer_information"]) == 1
    for before, after, change in zip(traces[:-1], traces[1:], summary["fluctuation"], strict=True):
        assert (change["from"], change["to"]) == (before.name, after.name)
        for index in range(len(LAYERS)):
            pairs = zip(before.experts[index].tolist(), after.experts[index].tolist(), strict=True)
            sets = [(set(old) - {-1}, set(new) - {-1}) for old, new in pairs]
            changed = [1 - len(old & new) / max(len(old), len(new)) for old, new in sets]
            assert change["by_layer"][index] == pytest.approx(np.mean(changed), abs=1e-6)
            routable = before.num_visible[index] > 1
            assert change["routable_by_layer"][index] == pytest.approx(np.mean(np.array(changed)[routable]), abs=1e-6)
            assert change["routable_by_layer"][index] > change["by_layer"][index] > 0


@pytest.mark.slow
def test_checkpoints_of_a_hybrid_run(workplace):
    """The numbers of layers are those of a GPT model with the same layers."""
    flags = TRAINING.replace("--num-layers 3 --moe-layer-freq [1,0,1]", "--hybrid-layer-pattern *E*-*E")
    process = workplace.run_python("-m", "maskmoe.training.pretrain", *shlex.split(flags), "--save", "hybrid")
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    load = ("--load", "hybrid", *SERIES[2:], "--ckpt-step", ITERATIONS[-1])
    process = workplace.analyze(*load, "--tokens", 500, "--save-traces", "--output-dir", "analysis_of_hybrid")
    assert process.returncode == 0, process.stderr
    folder = workplace.folder / "analysis_of_hybrid"
    assert read_summary(folder)["layers"] == list(LAYERS)
    assert {int(row["layer"]) for row in read_table(folder, "load.csv")} == set(LAYERS)
    trace = RoutingTrace.load(folder / "trace_1.safetensors")
    mask = RoutingMask.load(workplace.folder / "mask.safetensors")
    for index, layer in enumerate(LAYERS):
        visible = mask.visible_sets(layer - 1)[trace.token_ids]
        assert np.array_equal(trace.num_visible[index], visible.sum(axis=1))


def test_tables_hold_the_same_numbers(analysed_series):
    summary = read_summary(analysed_series)
    load = defaultdict(int)
    for row in read_table(analysed_series, "load.csv"):
        load[row["checkpoint"], int(row["layer"]), int(row["expert"])] += int(row["assignments"])
    for checkpoint in summary["checkpoints"]:
        for layer, of_layer in zip(LAYERS, checkpoint["load"]["assignments"], strict=True):
            assert [load[checkpoint["name"], layer, expert] for expert in range(NUM_EXPERTS)] == of_layer
    drops = read_table(analysed_series, "drops.csv")
    assert len(drops) == 3 * 2 * 2
    assert {(row["capacity_factor"], row["capacity"]) for row in drops} == {("1", "128"), ("1.5", "192")}
    entropy = read_table(analysed_series, "entropy.csv")
    assert float(entropy[-1]["entropy"]) == pytest.approx(summary["checkpoints"][-1]["entropy"][-1], rel=1e-5)
    assert entropy[-1]["next_layer_information"] == ""
    fluctuation = {
        (row["to"], row["tokens"], row["layer"]): row["share"] for row in read_table(analysed_series, "fluctuation.csv")
    }
    assert len(fluctuation) == 2 * 5 * 2
    share = summary["fluctuation"][1]["by_band"]["top 40 %"][1]
    assert float(fluctuation["iteration 6", "top 40 %", "3"]) == pytest.approx(share, rel=1e-5)
    pairs = read_table(analysed_series, "coactivation.csv")
    between = [row for row in pairs if row["layer"] != row["other_layer"]]
    assert {(row["layer"], row["other_layer"]) for row in between} == {("1", "3")}
    assert sum(float(row["share"]) for row in between) == pytest.approx(1, abs=1e-4)
    assert {row["layer"] for row in pairs if row["layer"] == row["other_layer"]} == {"1", "3"}
    top = read_table(analysed_series, "specialisation.csv")
    assert {row["rank"] for row in top} <= {str(rank) for rank in range(1, 11)}
    assert all(row["piece"] for row in top)
    distinct = read_table(analysed_series, "distinct_experts.csv")
    of_last = [float(row["distinct"]) for row in distinct if row["iteration"] == "6" and row["layer"] == "3"]
    assert np.mean(of_last) == pytest.approx(summary["checkpoints"][-1]["distinct_experts"]["by_layer"][1])


def test_function_gives_the_same(analysed_series, workplace, checkpoints):
    """The function `analyze` gives the same results as the command, for one checkpoint."""
    analysis = analyze(
        find_models([checkpoints], [4]),
        DatasetText(str(workplace.folder / "data"), SPLIT),
        AnalysisSettings(tokens=1500, capacity_factors=(1.0, 1.5), tokenizer_type="NullTokenizer"),
        TokenFrequency.load(workplace.folder / "counts.safetensors"),
    )
    summary = summarise(analysis)
    assert summary["checkpoints"] == [read_summary(analysed_series)["checkpoints"][1]]
    assert summary["fluctuation"] == []


def test_an_exported_model_and_a_text(workplace, checkpoints):
    tokenizer = str(workplace.folder / "tokenizer.model")
    megatron_to_huggingface(Settings(load=checkpoints, save=workplace.folder / "exported", tokenizer_model=tokenizer))
    (exported,) = find_models([workplace.folder / "exported"])
    of_checkpoint, of_exported = (model.open().args for model in (find_models([checkpoints])[0], exported))
    assert of_exported.tokenizer_sha256 == of_checkpoint.tokenizer_sha256
    flags = ("--load", "exported", "--input", "text.txt", "--seq-length", 16, "--tokens", 700, "--batch-size", 5)
    process = workplace.analyze(*flags, "--output-dir", "of_text")
    assert process.returncode == 0, process.stderr
    folder = workplace.folder / "of_text"
    assert {path.name for path in folder.iterdir()} == FILES - {"fluctuation.png"}
    summary = read_summary(folder)
    assert [(model["name"], model["iteration"]) for model in summary["checkpoints"]] == [("exported", None)]
    assert (summary["probe"]["tokens"], summary["probe"]["micro_batch_tokens"]) == (700, 80)
    assert read_table(folder, "fluctuation.csv") == []
    assert all(row["piece"] for row in read_table(folder, "distinct_experts.csv"))


def test_a_model_against_itself(tmp_path, workplace, monkeypatch, capsys):
    """With one layer with experts and no token with a choice, numbers without a value are None."""
    settings = {"mlp_layer_types": ["dense", "sparse", "dense"], "num_experts_per_tok": 1}
    make_model(random_mask(1), **settings).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    run("--load", "model", "model", "--data-path", write_data(tmp_path), "--output-dir", "out")
    summary = read_summary(tmp_path / "out")
    (change,) = summary["fluctuation"]
    assert change["by_layer"] == [0]
    assert change["routable_by_layer"] == [None]
    checkpoint = summary["checkpoints"][0]
    assert checkpoint["entropy"] == [None]
    assert checkpoint["single_expert_token_share"] == [1]
    assert checkpoint["distinct_experts"]["by_layer"] == [1]
    assert checkpoint["next_layer_information"] == []
    left_out = {"fluctuation.png", "entropy.png", "coactivation.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - left_out
    output, errors = capsys.readouterr()
    assert "\nno coactivation.png: only one layer has experts\n" in output
    assert "Warning" not in errors


def write_data(folder: Path) -> str:
    """Write a dataset with the ids of the tiny model; return its prefix."""
    with IndexedDatasetWriter(folder / "tiny", np.uint16) as dataset:
        dataset.add_document(np.arange(600) % 60)
    return str(folder / "tiny")


def run(*arguments: object) -> None:
    """Run the command in this process."""
    tool = ROOT / "tools/analyze_routing.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        runpy.run_path(str(tool), run_name="__main__")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--load", "nowhere"), "--load nowhere does not exist"),
        (("--load", "empty"), "--load empty holds neither Megatron checkpoints nor a model"),
        (("--ckpt-step", 3), "iter_0000003 does not exist"),
        (("--data-path", "nowhere"), "nowhere.idx does not exist"),
        (("--split", "100,0,0"), "leaves nothing for --eval-split valid"),
        (("--tokens", 0), "--tokens must be at least 1, not 0"),
        (("--seq-length", 33), "--seq-length is 33, but the model takes at most 32 tokens"),
        (("--capacity-factors", 1, "nan"), "--capacity-factors must be a finite number, not nan"),
        (("--token-frequency", "text.txt"), "text.txt"),
        (("--token-frequency", "few.safetensors"), "--token-frequency counts 60 ids, the model has 500"),
        (("--tokenizer-model", "nowhere.model"), "the tokenizer nowhere.model of"),
        (("--scratch-dir", "nowhere"), "choose another --scratch-dir"),
        (("--output-dir", "no/folder"), "cannot write to --output-dir no/folder: No such file or directory"),
    ],
)
def test_bad_input(workplace, checkpoints, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(workplace.folder)
    counts = np.array([[600, *[0] * 59]])
    datasets = ({"name": "d", "num_tokens": 600, "idx_sha256": "0" * 64, "bin_bytes": 1200},)
    TokenFrequency(counts, (None,), datasets, None).save("few.safetensors")
    Path("empty").mkdir(exist_ok=True)
    before = set(workplace.folder.rglob("*"))
    series = SERIES[2:] if flags[0] == "--load" else SERIES  # the flag may be given only once
    with pytest.raises(SystemExit) as end:
        run(*series, "--output-dir", "bad", *flags)
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in message
    assert "Traceback" not in errors
    assert set(workplace.folder.rglob("*")) == before


def test_results_stay_as_they_were(analysed_series, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    before = {path: path.read_bytes() for path in analysed_series.iterdir()}
    with pytest.raises(SystemExit):
        run(*SERIES, "--output-dir", "series", "--force", "--seq-length", 33)
    assert {path: path.read_bytes() for path in analysed_series.iterdir()} == before
    assert "--seq-length is 33" in capsys.readouterr().err


def test_text_that_cannot_be_read(workplace, checkpoints, monkeypatch, capsys):
    """The advice must hold for this command, whose flags of the text differ from those of preprocess."""
    monkeypatch.chdir(workplace.folder)
    Path("body.jsonl").write_text('{"body": "a"}\n')
    pq.write_table(pa.table({"body": ["a"]}), "body.parquet")
    Path("saved").mkdir(exist_ok=True)
    Path("saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, advice in (
        ("body.jsonl", "choose the keys of the text with --json-keys or --json-key"),
        ("body.parquet", "choose with --json-keys or --json-key"),
        ("saved", "or, if the command lacks this flag, name the files of one split"),
    ):
        with pytest.raises(SystemExit) as end:
            run("--load", "checkpoints", "--ckpt-step", ITERATIONS[0], "--input", name, "--output-dir", "bad")
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(advice)


def test_split_of_files(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(SystemExit) as end:
        run("--load", "nowhere", "--input", "text.txt", "--split", "1,1,1", "--output-dir", "bad")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --split is for --data-path")


@pytest.mark.parametrize("command", ["analyze_routing", "prune_checkpoints"])
def test_help_needs_neither_torch_nor_megatron(command, workplace):
    blocked = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'megatron'))"
    code = f"{blocked}; from maskmoe.command_line.{command} import main; main()"
    process = workplace.run_python("-c", code, "--help")
    assert process.returncode == 0, process.stderr
    assert "example" in process.stdout
