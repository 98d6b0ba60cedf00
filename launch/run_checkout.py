"""Runs a subcommand of `maskmoe`, but not the code of another checkout: `python -P run_checkout.py SUBCOMMAND …`."""

import sys
from pathlib import Path


def main() -> None:
    """Run the subcommand if the installed package is that of this checkout; else exit with code 2."""
    root = Path(__file__).resolve().parents[1]
    try:
        import maskmoe
    except ModuleNotFoundError:
        sys.stderr.write("error: MaskMoE is not installed: run launch/setup.sh first\n")
        sys.exit(2)
    code = Path(maskmoe.__file__).resolve().parents[1]
    # An installed package, as in the container images, belongs to no checkout.
    if code != root and (code / "launch" / "pretrain.sh").exists():
        sys.stderr.write(
            f"error: {sys.executable} runs the MaskMoE of another checkout, {code}, not of {root}: "
            f"run {root}/launch/setup.sh first, or use the scripts in {code}/launch\n"
        )
        sys.exit(2)
    from maskmoe.command_line.main import main as run_subcommand

    run_subcommand()


if __name__ == "__main__":
    main()
