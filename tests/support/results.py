"""Results of runs that were never trained."""

from maskmoe.comparison.table import HeldOutLoss, RunResult


def result(variant: str, seed: int, loss: float, settings: dict[str, str] | None = None) -> RunResult:
    """Return the result of a run of the suite `small`, with one band that has half of the tokens.

    Args:
        variant: Name of the variant.
        seed: Seed of the run.
        loss: Loss on all tokens; that of the band is 1 lower.
        settings: Settings of the run; by default only the variant's name.
    """
    losses = [("all", 1000, loss), ("top 40 %", 500, loss - 1)]
    return RunResult(
        suite="small",
        variant=variant,
        seed=seed,
        settings=settings or {"variant": variant},
        text={"training": "digest"},
        mask="mask",
        tokens=1280,
        losses=[HeldOutLoss(text="held-out", band=band, tokens=tokens, loss=of) for band, tokens, of in losses],
        validation=[(20, loss + 1), (40, loss)],
        load=[[500, 500]],
        seconds=60.0,
        origin={"commit": "0123456789abcdef"},
    )
