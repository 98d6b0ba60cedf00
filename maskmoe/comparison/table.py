"""The table of results: JSON lines, one line for each finished run, which many machines append to and merge."""

import math
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ValidationError

from maskmoe import __version__
from maskmoe.comparison.run import OWN_TEXT, Run
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem, read_json
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import TENSORBOARD
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.run_status.events import read_scalars

ALL_TOKENS = "all"
"""Name of the band that contains all tokens."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "megatron-core", "numpy")

Loss = Annotated[float, BeforeValidator(lambda loss: math.nan if loss is None else loss)]


class HeldOutLoss(BaseModel, frozen=True, extra="forbid"):
    """The loss of a trained model on the tokens of one held-out text whose ids belong to one frequency band.

    Attributes:
        text: Name of the text.
        band: Name of the band, or `all`.
        tokens: Number of these tokens.
        loss: Mean loss in nats per token; NaN, in the file null, if the text has no such token.
    """

    text: str
    band: str
    tokens: int
    loss: Loss


class RunResult(BaseModel, frozen=True, extra="allow"):
    """A finished run: one line of the table. Further keys of a line, as of older versions, are kept.

    Attributes:
        suite: Name of the suite.
        variant: Name of the variant.
        seed: Seed of the run.
        settings: See `Run.settings`.
        text: Digests of the text, see `Dataset.digests`.
        mask: Digest of the routing mask; None for a model without experts.
        losses: Losses after training.
        seconds: Duration of the training without interruptions.
        origin: Commit of the code (`+` marks changes), versions of packages, numbers of cores and GPUs.
        program_sha256: See `Variant.program_sha256`.
    """

    suite: str
    variant: str
    seed: int
    settings: dict[str, str]
    text: dict[str, str]
    mask: str | None
    losses: list[HeldOutLoss]
    seconds: float
    origin: dict[str, str]
    program_sha256: str = ""

    @property
    def equality_key(self) -> tuple[object, ...]:
        """A value that equal runs share; see `Run.equality_key`."""
        return (self.seed, self.program_sha256, *sorted(self.settings.items()))

    def loss(self, text: str, band: str = ALL_TOKENS) -> float:
        """Return the loss on a text and a band; NaN if the run was not evaluated on them."""
        return next((each.loss for each in self.losses if (each.text, each.band) == (text, band)), math.nan)

    @classmethod
    def of(cls, suite: str, run: Run) -> Self:
        """Read the result of a run whose steps are all done."""
        evaluations = {text: read_json(run.evaluation(text)) for text in (OWN_TEXT, *run.data.held_out)}
        digests = run.data.digests()
        assert digests is not None  # the data were made before the run
        losses = []
        for text, content in evaluations.items():
            for band in ({**content, "name": ALL_TOKENS}, *content["bands"]):
                losses.append(HeldOutLoss(text=text, band=band["name"], tokens=band["tokens"], loss=band["loss"]))
        return cls(
            suite=suite,
            variant=run.name,
            seed=run.seed,
            settings=run.settings,
            text=digests,
            mask=RoutingMask.load(run.routing_mask).digest if run.variant.has_experts else None,
            losses=losses,
            seconds=round(training_seconds(run.folder / TENSORBOARD), 1),
            origin=_origin(run),
            program_sha256=run.variant.program_sha256,
        )


def scalars(tensorboard: Path, tag: str) -> list[tuple[int, float]]:
    """Return steps and values of a scalar in TensorBoard's event files; of a repeated step, that of the last start."""
    return [(event.step, event.value) for event in read_scalars(tensorboard).get(tag, ())]


def training_seconds(tensorboard: Path) -> float:
    """Return the duration of a training without interruptions: the number of steps times the median step."""
    events = read_scalars(tensorboard).get("lm loss", ())
    steps = [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in pairwise(events)]
    return median(steps) * events[-1].step if steps else 0.0


def read_table(*paths: Path) -> list[RunResult]:
    """Read tables; equal runs are returned once, and an absent file is an empty table.

    Raises:
        UserError: A file cannot be read, a line is damaged, or a run has two results with different losses.
    """
    results: dict[tuple[object, ...], RunResult] = {}
    for path in filter(Path.exists, paths):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                result = RunResult.model_validate_json(line)
            except ValidationError as error:
                raise UserError(f"{path}, line {number} is damaged: {first_problem(error)}") from error
            known = results.setdefault((*result.equality_key, *sorted(result.text.items())), result)
            if str(known.losses) != str(result.losses):  # NaN equals NaN as text
                raise UserError(
                    f"two results of {result.variant} with seed {result.seed} differ ({known.losses[0].loss} and "
                    f"{result.losses[0].loss}): remove one of the lines"
                )
    return list(results.values())


def write_table(path: Path, results: Iterable[RunResult]) -> None:
    """Replace the file of a table."""
    write_text(path, "".join(f"{result.model_dump_json(exclude_defaults=True)}\n" for result in results))


def _origin(run: Run) -> dict[str, str]:
    packages = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    machine = {"cores": str(run.devices.num_cores), "gpus": str(run.devices.num_gpus)}
    return {"commit": _commit(), "maskmoe": __version__, **packages, **machine}


@cache
def _commit() -> str:
    """Return the commit of the checkout, with `+` if its files differ from the commit; empty without a checkout."""
    if not (_CHECKOUT / ".git").exists():
        return ""  # an installed package may lie in an environment inside somebody else's repository
    git = ("git", "-C", str(_CHECKOUT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
