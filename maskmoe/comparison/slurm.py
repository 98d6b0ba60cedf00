"""A comparison on Slurm: one job array, each of whose elements trains and evaluates one run."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from itertools import count
from pathlib import Path

from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.run import Run
from maskmoe.errors import UserError
from maskmoe.files.paths import SUBMIT_SCRIPT


def submission(
    comparison: Comparison, runs: Sequence[Run], arguments: Sequence[str], options: Sequence[str], jobs: int | None
) -> tuple[str, ...]:
    """Return the command that submits the job array of runs; makes nothing.

    Each element trains its run by `launch/slurm/submit.sh`, then evaluates it by `launch/compare.sh --run`.

    Args:
        comparison: The comparison.
        runs: The unfinished runs; element N of the array, counted from 1, is the Nth of them.
        arguments: Arguments of `maskmoe compare` with absolute paths, without the arguments for Slurm.
        options: The user's options of submit.sh and sbatch.
        jobs: Number of elements that run at a time; None for no limit.
    """
    links = _links_folder(comparison)
    throttle = f"%{jobs}" if jobs else ""
    # The job reads the suite, which needs the model files and programs of all variants.
    variants = comparison.suite.variants.values()
    named_by_suite = (Path(path) for variant in variants for path in (variant.model, variant.program) if path)
    named = (path for path in map(Path, arguments) if path.is_absolute() and path.is_file())
    files = (*comparison.data.files, *comparison.data.text, *named_by_suite, *named)
    folders = {comparison.data.folder, *(path.parent for path in files)}
    evaluation = shlex.join(["launch/compare.sh", *arguments, "--run"])
    return (
        *(str(SUBMIT_SCRIPT), f"--job-name={_job_name(comparison)}", f"--array=1-{len(runs)}{throttle}", *options),
        *(word for folder in sorted(folders) for word in ("--mount", str(folder))),
        *("--mount", f"{comparison.folder}:rw", "--then", f"{evaluation} {shlex.quote(str(links))}/%a"),
        *("--run-dir", f"{links}/%a", "--", f"{links}/%a/run.yaml"),
    )


def check_queue(comparison: Comparison) -> None:
    """Check that an array may be submitted; call this function before anything is written.

    Raises:
        UserError: There is no Slurm, or an array of this comparison is in the queue, whose jobs use the runs' files.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: sbatch is missing: start the command on a node of a Slurm cluster")
    name = _job_name(comparison)
    if _output("squeue", "--noheader", f"--name={name}", f"--user={os.getuid()}").strip():
        raise UserError(f"jobs of this comparison are in Slurm's queue; to end them: scancel --name={name}")


def submit(comparison: Comparison, runs: Sequence[Run], command: Sequence[str]) -> str:
    """Submit the job array and return what sbatch prints.

    The data, the masks and the model files of the runs must exist. The elements find the folders of their runs by
    links that bear the numbers of the elements.

    Raises:
        UserError: Slurm refuses the array.
    """
    links = _links_folder(comparison)
    links.mkdir(parents=True)
    for element, run in enumerate(runs, 1):
        (links / str(element)).symlink_to(os.path.relpath(run.folder, links))
    return _output(*command)


def _job_name(comparison: Comparison) -> str:
    """Return the name of the jobs. Comparisons of one suite in several folders have different names."""
    return f"{comparison.name}-{sha256(str(comparison.folder.resolve()).encode()).hexdigest()[:8]}"


def _links_folder(comparison: Comparison) -> Path:
    """Return the folder of the next submission. Elements of an earlier array may still be there."""
    folders = (comparison.folder / "slurm" / str(number) for number in count(1))
    return next(folder for folder in folders if not folder.exists())


def _output(*command: str) -> str:
    """Return what a command prints. Raises UserError with its last words if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"{command[0]}: {(result.stderr.strip().splitlines() or ['failed'])[-1]}")
    return result.stdout
