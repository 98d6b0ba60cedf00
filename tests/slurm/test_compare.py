"""The runs of a comparison as the elements of a job array, on a real cluster of two nodes."""

import json

import pytest
from support.paths import ROOT
from support.suites import SUITE, write_texts

pytestmark = pytest.mark.slurm


@pytest.fixture
def compare(cluster, tmp_path):
    """Run launch/compare.sh on the controller, and return its output."""
    text, _ = write_texts(tmp_path)
    suite = SUITE.replace("train-iters: 40", "train-iters: 6").replace("eval-interval: 10", "eval-interval: 2")
    (tmp_path / "suite.yaml").write_text(suite)
    command = (ROOT / "launch" / "compare.sh", tmp_path / "suite.yaml", "--run-dir", tmp_path / "run")

    def compare(*arguments: str, expect: int = 0) -> str:
        data = ("--input", text)
        return cluster.run(*command, *data, *arguments, expect=expect, timeout=600)

    yield compare
    cluster.run("scancel", "--user=root", expect=None)


def test_an_array_trains_and_evaluates_all_runs(cluster, compare, tmp_path):
    """As docs/comparing.md says: data first, then an element for each run, then the page."""
    run, titles = tmp_path / "run", tmp_path / "runs.txt"
    cluster.wait_for_nodes()
    compare("--prepare")
    listed = [line for line in compare("--list").splitlines() if line.startswith("to do")]
    titles.write_text("".join(f"{line.split()[-1]}\n" for line in listed))
    line = f"{ROOT}/launch/compare.sh {tmp_path}/suite.yaml --run-dir {run} --input {tmp_path}/text.jsonl --only"
    element = f'{line} "$(sed -n ${{SLURM_ARRAY_TASK_ID}}p {titles})"'
    cluster.run("sbatch", "--array=1-3", "--exclusive", f"--output={run}/%a.log", f"--wrap={element}")
    cluster.wait_for_queue(1500)
    logs = {log.relative_to(run): log.read_text() for log in run.glob("**/*.log")}
    assert "report:" in compare("--report"), logs
    assert "3 of 3 runs" in (run / "report" / "README.md").read_text(), logs
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert sorted(result["variant"] for result in results) == ["all-visible", "dense", "smoe"]
    assert all([step for step, _ in result["validation"]] == [2, 4, 6] for result in results)
    assert all(result["seconds"] > 0 for result in results)
    listed = [line for line in compare("--list").splitlines() if not line.startswith("setup: ")]
    assert all(line.startswith("finished") for line in listed)
    assert len(listed) == 3
