"""Measure what docs/measurements.md and docs/dispatch.md show, and write the tables and the plot from the results.

Each command of these pages that writes `--json runs/measurements/NAME.json` is run as printed, and the quickstart with
its defaults. The medians go to docs/measurements.json, from which this program writes the tables, the plot of dispatch
and figures in README.md, so all of them show the same run. Measure on an idle machine.

    python tools/benchmarks/pages.py --measure               all measurements, in a quarter of an hour on two cores
    python tools/benchmarks/pages.py --measure dispatcher    this measurement only
    python tools/benchmarks/pages.py                         write tables and plot again
    python tools/benchmarks/pages.py --check                 exit with code 1 if a table or the plot is stale
"""

import argparse
import hashlib
import io
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import processor
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import entropy

from maskmoe.arguments.parser import OneLineParser
from maskmoe.errors import RunFailure
from maskmoe.files.outputs import write_text
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.frequency import TokenFrequency

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "measurements.json"
PLOT = ROOT / "docs" / "dispatch_benchmarks.png"
PAGES = (ROOT / "docs" / "measurements.md", ROOT / "docs" / "dispatch.md")
README = ROOT / "README.md"
TO_FLOOR = " to the floor"
# A region of a page: names of measurements, and the table of their results.
REGION = re.compile(r"(<!-- results of ([\w, ]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
RANGE = re.compile(r"(?<=take )[\d.]+ to [\d.]+(?= of Megatron-Core's time)")
MINUTES = re.compile(r"(?<=the quickstart takes )\d+(?= minutes)")
QUICKSTART = "quickstart"
COLORS = {"Megatron-Core": "#b0b0b0", "MaskMoE": "#2f6fb0", "floor": "#e0a030"}

Results = dict[str, dict[str, Any]]
"""The processor and the results of each measurement by name."""


def commands() -> dict[str, str]:
    """Return the commands of the pages by the name of their measurement, in the order of the pages."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    return {Path(path).stem: line for line, path in re.findall(r"^(.* --json (runs/measurements/\S+))$", text, re.M)}


def measure(name: str, command: str) -> dict[str, Any]:
    """Run a command in the environment of this program; return the processor and the medians of its results.

    Raises:
        RunFailure: the command failed.
    """
    print(f"$ {command}", flush=True)
    path = ROOT / "runs" / "measurements" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = command.replace("python ", f"{sys.executable} ", 1) if command.startswith("python ") else command
    words = re.sub(r"^torchrun ", f"{sys.executable} -m torch.distributed.run ", words)
    completed = subprocess.run(words, shell=True, cwd=ROOT, check=False)
    if completed.returncode:
        raise RunFailure(f"exit code {completed.returncode} of: {command}")
    written = json.loads(path.read_text())
    return {"processor": written["processor"], "results": [medians(result) for result in written["results"]]}


def measure_quickstart() -> dict[str, Any]:
    """Run the quickstart with its defaults in a new folder; return its time, and its perplexity beside the unigrams'.

    Raises:
        RunFailure: the quickstart failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "launch" / "quickstart.sh", "--run-dir", folder]
        start = time.perf_counter()
        if code := subprocess.run(command, check=False).returncode:
            raise RunFailure(f"exit code {code} of launch/quickstart.sh")
        minutes = (time.perf_counter() - start) / 60
        perplexity = json.loads(Path(folder, "evaluation-held-out.json").read_text())["perplexity"]
        occurrences = TokenFrequency.load(Path(folder, "token_frequency.safetensors")).occurrences
    unigrams = math.exp(entropy(occurrences))
    results = [
        {"case": "quickstart, as a whole", "unit": "min", "ratio": None, "ours": minutes, "baseline": None},
        {
            "case": "quickstart, perplexity; baseline: token frequencies",
            "unit": "",
            "ratio": perplexity / unigrams,
            "ours": perplexity,
            "baseline": unigrams,
        },
    ]
    return {"processor": processor(), "results": results}


def medians(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the pages show of a result."""
    kept: dict[str, Any] = {key: result[key] for key in ("case", "unit", "ratio")}
    kept |= {side: statistics.median(result[side]) if result[side] else None for side in ("ours", "baseline")}
    for side in ("ours", "stock"):
        if cost := result["costs"].get(side):
            cost, mebibytes = cost["cost"], cost["cost"]["all_to_all_bytes"] / 2**20
            counts = (f"{cost['all_to_alls']} of {mebibytes:.0f} MiB", cost["other_collectives"], cost["host_waits"])
            kept[f"counts of {side}"] = ", ".join(map(str, counts))
    return kept


def table(measurements: list[dict[str, Any]]) -> str:
    """Return one Markdown table of measurements, below a line that says on which processors they ran."""
    floors = {case: ratio for measurement in measurements for case, ratio in to_floor(measurement).items()}
    head = ["case", "ratio to the baseline", "ours", "baseline"]
    head += ["ratio to the floor", "all-to-alls, other collectives, host waits", "the baseline's"] if floors else []
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for result in (result for measurement in measurements for result in measurement["results"]):
        if result["case"].endswith(TO_FLOOR):
            continue
        ratio = "–" if result["ratio"] is None else f"{result['ratio']:.2f}"
        cells = [result["case"], ratio, *(quantity(result, side) for side in ("ours", "baseline"))]
        if floors:
            cells += [f"{floors[result['case']]:.2f}", *(result[f"counts of {side}"] for side in ("ours", "stock"))]
        rows.append(cells)
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    processors = dict.fromkeys(measurement["processor"] for measurement in measurements)
    return f"Processor: {'; '.join(processors)}.\n\n{lines}\n"


def to_floor(measurement: dict[str, Any]) -> dict[str, float]:
    """Return the ratios to the floor by case."""
    pairs = [(result["case"], result["ratio"]) for result in measurement["results"]]
    return {case.removesuffix(TO_FLOOR): ratio for case, ratio in pairs if case.endswith(TO_FLOOR)}


def quantity(result: dict[str, Any], side: str) -> str:
    """Return the text of a measured number; a dash if it is not known."""
    value, unit = result[side], result["unit"]
    if value is None:
        return "–"
    if unit == "s":
        value, unit = 1000 * value, "ms"
    return f"{value:,.0f} {unit}".rstrip() if value >= 100 else f"{value:.3g} {unit}".rstrip()


def fill(page: str, results: Results) -> str:
    """Return a page with the tables of the results."""

    def region(match: re.Match[str]) -> str:
        measured = [results[name] for name in match[2].split(", ") if name in results]
        return f"{match[1]}\n{table(measured) if measured else 'Not measured yet.\n'}\n{match[3]}"

    ratios = [result["ratio"] for result in results["train_step_ranks"]["results"] if TO_FLOOR not in result["case"]]
    page = RANGE.sub(f"{min(ratios):.2f} to {max(ratios):.2f}", page)
    page = MINUTES.sub(f"{results[QUICKSTART]['results'][0]['ours']:.0f}", page)
    return REGION.sub(region, page)


def digest(results: Results) -> str:
    """Return the digest of the results that the plot shows; the picture carries it."""
    return hashlib.sha256(json.dumps([results[name] for name in ("dispatcher", "moe_layer")]).encode()).hexdigest()


def draw(results: Results) -> bytes:
    """Return the picture of dispatchers and layers: times relative to Megatron-Core's, and the floor."""
    panels = {"dispatch and combine": results["dispatcher"], "whole MoE layer": results["moe_layer"]}
    sizes = [len(to_floor(panel)) for panel in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 1.2 + 0.5 * sum(sizes)), height_ratios=sizes, sharex=True, layout="constrained"
    )
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        floors = to_floor(panel)
        cases = [result for result in panel["results"] if result["case"] in floors]
        for row, result in enumerate(cases):
            ours = result["ratio"]
            bars = {"Megatron-Core": 1.0, "MaskMoE": ours, "floor": ours / floors[result["case"]]}
            for index, (side, value) in enumerate(bars.items()):
                y = row + 0.27 * (index - 1)
                axis.barh(y, value, 0.25, color=COLORS[side], label=side if row == 0 else None)
                axis.text(
                    value + 0.01,
                    y,
                    quantity({"bar": value * result["baseline"], "unit": "s"}, "bar"),
                    va="center",
                    fontsize=8,
                )
        names = [re.sub(r"^(dispatch|MoE layer) (\S+) (.*) ranks \d+$", r"\2, \3", case["case"]) for case in cases]
        axis.set_yticks(range(len(cases)), names)
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_title(f"{title} ({panel['processor']})", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    axes[-1].set_xlabel("time of forward and backward, Megatron-Core = 1")
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    origin = PngInfo()
    origin.add_text("results", digest(results))
    Image.open(drawn).convert("RGB").quantize(32).save(picture, format="png", optimize=True, pnginfo=origin)
    return picture.getvalue()


def main() -> None:
    """Measure if asked to, and write or check tables and plot."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [QUICKSTART, *commands()]
    parser.add_argument("--measure", nargs="*", choices=names, metavar="NAME", help=f"any of {', '.join(names)}")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    results: Results = json.loads(RESULTS.read_text())
    if arguments.measure is not None:
        for name in arguments.measure or names:
            results[name] = measure_quickstart() if name == QUICKSTART else measure(name, commands()[name])
            write_text(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    stale = [page for page in (*PAGES, README) if (text := page.read_text()) != fill(text, results)]
    if digest(results).encode() not in PLOT.read_bytes():
        stale.append(PLOT)
    if arguments.check and stale:
        raise RunFailure(f"{', '.join(path.name for path in stale)}: stale; run python tools/benchmarks/pages.py")
    for path in stale:
        if path == PLOT:
            PLOT.write_bytes(draw(results))
        else:
            write_text(path, fill(path.read_text(), results))


if __name__ == "__main__":
    run_tool(main)
