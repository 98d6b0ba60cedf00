"""A run reaches W&B and MLflow: their own libraries, without a server."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runs import read_scalars
from support.training import Run, Workplace

pytestmark = pytest.mark.tracking


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run with W&B that stopped after iteration 9, and was resumed from iteration 7."""
    workplace = Workplace(tmp_path_factory.mktemp("tracking"))
    folder = workplace.folder / "run"
    places = f"--save {folder}/checkpoints --load {folder}/checkpoints --tensorboard-dir {folder}/tensorboard"
    for name, flags in (("first", "--exit-interval 9"), ("second", "--exit-interval 12 --ckpt-step 7")):
        run = Run(f"{places} {flags} --wandb-project project", logs_scalars=False)
        with workplace.start(run, workplace.folder / name, environment={"WANDB_MODE": "offline"}) as processes:
            processes.wait()
            outcome = processes.outcome()
        assert not any(outcome.exit_codes), outcome.report()
    return folder


def records_of(path: Path) -> Iterator:
    """Yield the records of a W&B file, which has the format of LevelDB's logs behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is empty
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_gets_all_scalars_and_one_run(run_folder):
    files = sorted((run_folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    logged: list[dict[int, dict[str, float]]] = []
    ids, names = set(), set()
    for path in files:
        logged.append({})
        for record in records_of(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                names.add(record.run.display_name)
            if record.HasField("history"):
                values = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                logged[-1].setdefault(values["_step"], {}).update(values)
    assert ids == {(run_folder / "wandb_run_id").read_text().strip()}
    assert names == {"run"}
    assert [list(steps) for steps in logged] == [list(range(1, 10)), list(range(8, 13))]
    # The values are those of TensorBoard, which has the later value of iterations 8 and 9.
    scalars = read_scalars(run_folder)
    for tag in ("lm loss", "learning-rate", "grad-norm", "load_balancing_loss", "moe/routing_entropy_layer_3"):
        steps = {step: values[tag] for steps in logged for step, values in steps.items()}
        assert steps == {event.step: pytest.approx(event.value, rel=1e-6) for event in scalars[tag]}, tag
    held_out = {
        step: values["lm loss validation"] for step, values in logged[0].items() if "lm loss validation" in values
    }
    assert list(held_out) == [5]


def test_mlflow_gets_all_scalars(run_folder, tmp_path, monkeypatch):
    """The program in docs/tracking.md copies the event files of a run."""
    import mlflow

    page = (ROOT / "docs" / "tracking.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    exec(program.replace("runs/laptop", str(run_folder)))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("my-experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    # Iterations that the resumed run repeated are there twice.
    for tag, events in read_scalars(run_folder, keep_repeated=True).items():
        history = client.get_metric_history(run.info.run_id, re.sub(r"[^\w\-. /:]", "_", tag))
        logged = sorted((metric.step, metric.value) for metric in history)
        assert logged == sorted((event.step, event.value) for event in events), tag
