"""Writes maskmoe/training/settings/proven.txt: the flags of Megatron that a run has trained with beside a routing mask.

python docs/generators/proven.py                       the column cpu, from the training runs that the tests declare
python docs/generators/proven.py --gpu RUN_FOLDER...   adds finished runs on GPUs to the column gpu

A run starts with a note about all given flags that its column lacks.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROVEN = ROOT / "maskmoe" / "training" / "settings" / "proven.txt"


def commands_of_tests() -> Iterator[list[str]]:
    """Yield the flags of each declared run with a routing mask that trains by MaskMoE's own program."""
    from support.training import PRETRAIN, Workplace
    from support.training_runs import RUNS

    for run in RUNS.values():
        if run.program == PRETRAIN and (run.mask or run.continues):
            yield Workplace.flags(run, Path("run"), Path("load") if run.continues else None)


def command_of(run_folder: Path) -> list[str]:
    """Return the flags of a run, which the first line of its args.yaml has."""
    with (run_folder / "args.yaml").open(encoding="utf-8") as file:
        return shlex.split(file.readline().partition(": ")[2])


def table(on_gpus: list[Path]) -> str:
    """Return the file: a flag in each line, and after a tab the columns in which it is proven."""
    from megatron.training.arguments import add_megatron_arguments

    from maskmoe.training.settings.support import flags_of, proven

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    columns = {"cpu": set(), "gpu": set(proven()["gpu"])}
    for words in commands_of_tests():
        columns["cpu"].update(flags_of(parser, words))
    for folder in on_gpus:
        columns["gpu"].update(flags_of(parser, command_of(folder)))
    return "".join(
        f"{flag}\t{' '.join(column for column, flags in columns.items() if flag in flags)}\n"
        for flag in sorted(columns["cpu"] | columns["gpu"])
    )


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="RUN_FOLDER", type=Path, nargs="+", default=[], help="folders of runs on GPUs")
    on_gpus = parser.parse_args().gpu
    sys.path.insert(0, str(ROOT / "tests"))
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    PROVEN.write_text(table(on_gpus), encoding="utf-8")


if __name__ == "__main__":
    main()
