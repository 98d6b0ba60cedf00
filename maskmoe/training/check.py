"""Entry point `python -m maskmoe.training.check --check RANKS <flags of a run>`: checks the run without starting it.

The check works out on one machine what the run would be, what it would need, and why it would be refused. It needs
neither a process group nor a GPU.
"""

from maskmoe.training.rank_process import prepare_rank, run_rank


def main() -> None:
    """Prepare the process, then check."""
    prepare_rank()
    from maskmoe.training.preflight import inspection

    inspection.main()


if __name__ == "__main__":
    run_rank(main, "check")
