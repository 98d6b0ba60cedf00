"""Measures trained runs of a block: their loss without each token's best expert, and when tokens keep their expert.

    python tools/studies/choice_or_damping/measures.py SUITE.yaml --run-dir DIR --table runs/study/results.jsonl

takes the options of `maskmoe compare`. Each finished run of the suite whose checkpoints exist gets a line in
`measures.jsonl` beside the table, unless the line is there already.
"""

import asyncio
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from safetensors.numpy import load_file

from maskmoe.command_line.compare import open_comparison, parse_arguments
from maskmoe.comparison.run import Run
from maskmoe.comparison.steps import Step, maskmoe_command, run_steps
from maskmoe.comparison.table import ALL_TOKENS, HeldOutLoss
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json
from maskmoe.files.outputs import write_text
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency

_FREQUENT = 0  # the band of the ids that see several experts in MaskMoE


class Measures(BaseModel, frozen=True, extra="forbid"):
    """The measures of a run: a line of the table.

    Attributes:
        suite: Name of the suite.
        variant: Name of the variant.
        seed: Seed of the run.
        losses: Losses on the further held-out texts if no token may use its best expert.
        changing: For each checkpoint, its iteration, and the share of held-out tokens whose expert changes afterwards:
            of all tokens, and of the tokens of frequent ids. Empty if the run kept one checkpoint.
    """

    suite: str
    variant: str
    seed: int
    losses: list[HeldOutLoss]
    changing: list[tuple[int, float, float]]


def read_measures(path: Path) -> list[Measures]:
    """Read a table of measures; an absent file is an empty table.

    Raises:
        UserError: A line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [Measures.model_validate_json(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it, and measure again") from error


@dataclass(frozen=True)
class SecondChoiceRun(Run):
    """A trained run that is evaluated without each token's best expert."""

    @classmethod
    def of(cls, run: Run) -> "SecondChoiceRun":
        """Return a run with the same checkpoints and another program."""
        if run.variant.program:
            raise UserError(f"{run.title} has a program of its own, which second_choice.py would replace; use --only")
        program = str(Path(__file__).resolve().with_name("second_choice.py"))
        variant = run.variant.model_copy(update={"program": program})
        return cls(run.name, variant, run.seed, run.folder, run.data, run.devices)

    def evaluation(self, text: str) -> Path:
        """Return the result of the evaluation on a held-out text."""
        return work_folder(self) / f"evaluation-{text}.json"

    def losses(self) -> Iterator[HeldOutLoss]:
        """Yield the losses on the further held-out texts after their evaluation."""
        for text in self.data.held_out:
            content = read_json(self.evaluation(text))
            for band in ({**content, "name": ALL_TOKENS}, *content["bands"]):
                yield HeldOutLoss(text=text, band=band["name"], tokens=band["tokens"], loss=band["loss"])


def work_folder(run: Run) -> Path:
    """Return the folder in which a run is measured."""
    return run.folder / "measures"


def routing_step(run: Run) -> Step:
    """Record which experts 16,384 held-out tokens choose at each checkpoint of a run."""
    output = work_folder(run) / "routing"
    command = maskmoe_command(
        *("analyze", "--load", run.checkpoints, "--data-path", run.data.prefix, "--split", *run.data.flags["split"]),
        *("--output-dir", output, "--save-traces", "--force"),
    )
    return Step("routing", command, output / "trace_1.safetensors")


def shares_changing(experts: np.ndarray) -> np.ndarray:
    """Return the share of tokens whose expert changes after each checkpoint, over all layers; float64 [checkpoints].

    StableMoE (Dai et al., 2022) calls the last change of a token its last fluctuation.

    Args:
        experts: The best expert of each token, int16 [checkpoints, layers, tokens].
    """
    differs = experts != experts[-1]
    # A token changes after a checkpoint if its expert there, or at a later checkpoint, is not its final expert.
    return np.logical_or.accumulate(differs[::-1])[::-1].mean(axis=(1, 2))


def changing(run: Run, iterations: Sequence[int]) -> list[tuple[int, float, float]]:
    """Return `Measures.changing` from the traces of a run.

    Args:
        run: The run.
        iterations: Iterations of the checkpoints, ascending.
    """
    numbers = range(1, len(iterations) + 1)
    traces = [load_file(work_folder(run) / "routing" / f"trace_{number}.safetensors") for number in numbers]
    experts = np.stack([trace["experts"][..., 0] for trace in traces])
    bands = FrequencyBands(TokenFrequency.load(run.data.token_frequency).occurrences)
    is_frequent = bands.band_of_id[traces[0]["token_ids"]] == _FREQUENT
    shares = zip(shares_changing(experts), shares_changing(experts[..., is_frequent]), strict=True)
    return [(iteration, float(a), float(b)) for iteration, (a, b) in zip(iterations, shares, strict=True)]


def measure(suite: str, run: Run) -> Measures:
    """Measure one run; its files are removed afterwards.

    Raises:
        UserError: A command refused its input. RunFailure: a command failed.
    """
    second_choice, folder = SecondChoiceRun.of(run), work_folder(run)
    steps = [second_choice.evaluation_step(text) for text in run.data.held_out]
    iterations = sorted(int(path.name.removeprefix("iter_")) for path in run.checkpoints.glob("iter_*"))
    has_series = len(iterations) > 1
    asyncio.run(run_steps(folder, run.identity, (*steps, routing_step(run)) if has_series else steps))
    shares = changing(run, iterations) if has_series else []
    found = Measures(suite=suite, variant=run.name, seed=run.seed, losses=list(second_choice.losses()), changing=shares)
    shutil.rmtree(folder)
    return found


def write_measures(path: Path, measures: Iterable[Measures]) -> None:
    """Replace the file of a table."""
    write_text(path, "".join(f"{each.model_dump_json()}\n" for each in measures))


def main() -> None:
    """Measure the runs that the command line selects."""
    options = parse_arguments(sys.argv[1:])
    comparison = open_comparison(options)
    table = comparison.table.with_name("measures.jsonl")
    measured = read_measures(table)
    known = {(each.suite, each.variant, each.seed) for each in measured}
    finished = comparison.results()
    for run in comparison.selected(options.only):
        if (comparison.name, run.name, run.seed) in known or run.title not in finished:
            continue
        if not run.last_checkpoint.exists():
            print(f"{run.title} has no checkpoint any more", flush=True)
            continue
        measured.append(measure(comparison.name, run))
        write_measures(table, measured)
        print(f"{run.title} measured", flush=True)


if __name__ == "__main__":
    run_tool(main)
