"""Lines as Megatron's training log has them."""

_ITERATION = (
    " [2026-01-31 15:40:33.899054] iteration {iteration:8d}/{total:8d} | consumed samples:          160 | elapsed time "
    "per iteration (ms): 1250.0 | learning rate: 1.669740E-03 | global batch size:    16 | {loss}"
    "load_balancing_loss: 1.075320E+00 | loss scale: 1.0 | grad norm: 6.295 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |"
)


def iteration_line(iteration, loss="5.0E+00", total=20):
    """A line about one iteration of 1.25 s with 16 samples; without a loss if `loss` is None."""
    text = "" if loss is None else f"lm loss: {loss} | "
    return _ITERATION.format(iteration=iteration, total=total, loss=text)


def validation_line(iteration, loss="6.663481E+00", place=""):
    """A line about the held-out loss."""
    return f" validation loss at iteration {iteration}{place} | lm loss value: {loss} | lm loss PPL: 7.832730E+02 | "
