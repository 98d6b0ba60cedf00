"""The options for Slurm on the command line of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from maskmoe.errors import UserError

_WITH_VALUE = {"--train-nodes", "--max-requeues", "--container", "--image", "--mount", "--port", "--address"}
_DECIDED = {
    *("--run-dir", "--chain", "--dry-run", "--array", "--dependency", "--output", "--open-mode", "--chdir", "--wrap"),
    *("--parsable", "--kill-on-invalid-dep", "-a", "-d", "-o", "-D"),
}
# These options say where a job may run and for how long, but not which resources the job needs.
_FOR_ANY_JOB = (
    *("--account=", "--partition=", "--qos=", "--reservation=", "--clusters=", "--export=", "--time="),
    *("-A", "-p", "-q", "-M", "-t"),
)


@dataclass(frozen=True)
class SlurmOptions:
    """The options after `--` on the command line: options of launch/slurm/submit.sh and of sbatch.

    Attributes:
        words: all options.
        sbatch: options of sbatch only.
        container: what starts the container in which jobs run: `none`, `pyxis` or `apptainer`.
        image: image of the container.
        mounts: `PATH` or `PATH:MODE`; every path is mounted at the same path in the container.
    """

    words: tuple[str, ...]
    sbatch: tuple[str, ...]
    container: str
    image: str
    mounts: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> "SlurmOptions":
        """Read the options.

        Raises:
            UserError: an option is not written as submit.sh requires, or the comparison decides the option.
        """
        sbatch: list[str] = []
        values: dict[str, list[str]] = {"--container": ["none"], "--image": [""], "--mount": []}
        remaining = iter(words)
        for word in remaining:
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if name in _DECIDED:
                raise UserError(f"after `--`: {word} is decided by the comparison; leave the option out")
            if word in _WITH_VALUE:
                if (value := next(remaining, None)) is None:
                    raise UserError(f"after `--`: {word} needs a value")
                values.setdefault(word, []).append(value)
            elif not word.startswith("-"):
                raise UserError(f"after `--`: {word} stands alone: write sbatch's options as --option=value")
            elif word != "--no-node-check":
                sbatch.append(word)
        container, image = values["--container"][-1] or "none", values["--image"][-1]
        if container not in ("none", "pyxis", "apptainer"):
            raise UserError(f"after `--`: --container is none, pyxis or apptainer, not {container}")
        if container != "none" and not image:
            raise UserError(f"after `--`: --container {container} needs an --image")
        return cls(tuple(words), tuple(sbatch), container, image, tuple(values["--mount"]))

    @property
    def for_any_job(self) -> tuple[str, ...]:
        """The options of sbatch that do not ask for nodes, GPUs or memory."""
        return tuple(word for word in self.sbatch if word.startswith(_FOR_ANY_JOB))
