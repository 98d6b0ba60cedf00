"""Write the part of a finished run."""

import hashlib
import itertools
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from maskmoe.comparison.data import Data, dataset_prefixes
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.parts import Origin, Part, settings_of
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.run_results import Curve, Evaluation
from maskmoe.comparison.runs import Run
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.paths import SUBMIT_SCRIPT
from maskmoe.launch.devices import Devices
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.workflow.record import RunRecord, files_digest
from maskmoe.workflow.training_log import TrainingHistory

_CHECKOUT = SUBMIT_SCRIPT.parents[2]
_PACKAGES = ("torch", "megatron-core", "numpy", "maskmoe")
_MAX_EXACT_LOSSES = 500


def make_part(suite: Suite, plan: RunPlan, text: dict[str, str], parameters: Parameters | None) -> Part:
    """Return the part of a finished run.

    Args:
        suite: the suite.
        plan: the stages of the run, all finished.
        text: digests of the text, see `text_digests`.
        parameters: numbers of parameters of the run's variant, if they are known.
    """
    run, files, history = plan.run, plan.files, plan.history()
    assert run.kind != "check"
    routing = files.routing / "routing.json" if run.variant.has_experts else None
    return Part(
        suite=suite.name,
        run=run.name,
        kind=run.kind,
        variant=run.variant.name,
        seed=run.seed,
        learning_rate=run.learning_rate,
        settings=settings_of(suite, run),
        text=text,
        mask_digest=RoutingMask.load(files.routing_mask).digest if run.variant.has_experts else None,
        parameters=parameters,
        origin=_origin(plan.devices),
        seconds=RunRecord(files.record)["train"].seconds,
        tokens_per_second=_tokens_per_second(history, suite.seq_length),
        training=Curve.of(history.iterations).thinned(),
        validation=Curve.of(history.validations),
        exact_losses=_exact_losses(files.tensorboard, num_exact_losses(suite, run)),
        evaluation=Evaluation.read(files.evaluation, plan.further_evaluations, routing) if run.is_analyzed else None,
    )


def text_digests(data: Data) -> dict[str, str]:
    """Return what identifies the text: sha256 (hex) of all files that determine the tokens, and the split.

    The digests are kept in a file beside the data, because reading a large dataset takes minutes.

    Raises:
        UserError: a file is missing, or the suite brings no text.
    """
    flags = data.flags
    prefixes = dataset_prefixes(flags["data-path"])
    known = _KnownDigests(data.files.folder / "digests.json")
    digests = {"split": flags["split"][0]}
    if len(prefixes) < len(flags["data-path"]):
        digests["weights"] = " ".join(word for word in flags["data-path"] if word not in prefixes)
    for name, paths in data.token_files().items():
        names = [name] if len(paths) == 1 else [f"{name}.{number}" for number in range(len(paths))]
        digests |= {each: known.sha256(path) for each, path in zip(names, paths, strict=True)}
    # A tokenizer may be a name without a file. The digests of the dataset cover how the tokenizer encodes.
    return {"tokenizer": Path(flags["tokenizer-model"][0]).name, **digests}


class _KnownDigests:
    """Computes the sha256 of files, each once, and keeps the values in a file.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = read_record(dict[str, tuple[str, str]], path, "delete the file") if path.exists() else {}

    def sha256(self, file: Path) -> str:
        """Return the sha256 (hex) of a file.

        Raises:
            UserError: the file cannot be read.
        """
        status = files_digest([file])
        if self._known.get(str(file), ("", ""))[0] != status:
            try:
                with file.open("rb") as stream:
                    self._known[str(file)] = (status, hashlib.file_digest(stream, "sha256").hexdigest())
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from error
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_record(self._known, self._path)
        return self._known[str(file)][1]


def _tokens_per_second(history: TrainingHistory, seq_length: int) -> float:
    pairs = itertools.pairwise([0, *sorted(history.iterations)])
    samples = sum((number - before) * history.iterations[number].batch for before, number in pairs)
    return samples * seq_length / history.training_seconds if history.training_seconds else 0.0


def num_exact_losses(suite: Suite, run: Run) -> int:
    """Return how many losses of a run the limits need, at most 500: the own losses of a limit, or those it equals."""
    variant = run.variant
    if run.kind != "whole":
        return 0
    limits = [
        limit
        for limit in suite.of_role("limit")
        if variant.name in (limit.name, limit.equals) and run.seed in limit.seeds
    ]
    return max((min(limit.until or _MAX_EXACT_LOSSES, _MAX_EXACT_LOSSES) for limit in limits), default=0)


def _exact_losses(tensorboard: Path, number: int) -> Curve:
    """Return the first training losses with the precision of fp32, which the text log does not have."""
    if number == 0:
        return Curve()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("lm loss") if event.step <= number}
    return Curve(iterations=sorted(losses), losses=[losses[iteration] for iteration in sorted(losses)])


def _origin(devices: Devices) -> Origin:
    commit, is_dirty = _commit()
    return Origin(
        commit=commit,
        is_dirty=is_dirty,
        packages={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        processor=_processor(),
        num_cores=devices.num_cores,
        num_gpus=devices.num_gpus,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _commit() -> tuple[str, bool]:
    """Return the commit of the checkout, and whether the code differs from it; an empty commit without a checkout."""
    if not (_CHECKOUT / ".git").exists():
        return "", False
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*words: str) -> str:
        command = ("git", "-C", str(_CHECKOUT), *words)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "maskmoe"))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
