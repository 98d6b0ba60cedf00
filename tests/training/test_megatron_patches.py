"""Tests of the patches that concern training steps; `test_trainer.py` tests the watched steps."""

import pytest
from support.runs import read_scalars
from support.training import VOCAB_SIZE

HIDDEN, SEQ_LENGTH, WIDTH, LAYERS, TOKENS, RANKS = 32, 32, 32, 4, 8 * 32, 2


@pytest.mark.runs("experts of one rank, expert parallel 2, logged seldom")
def test_throughput_counts_the_experts_that_tokens_use(runs):
    """40 % of the tokens see four experts and use k = 3 of them; the others use one expert."""
    scalars = read_scalars(runs[0].folder)
    attention = 2 * 4 * HIDDEN**2 + 2 * SEQ_LENGTH * HIDDEN
    experts = (0.4 * 3 + 0.6 * 1) * 2 * 3 * HIDDEN * WIDTH
    logits = 2 * HIDDEN * (-(-(VOCAB_SIZE + 1) // 128) * 128)
    operations = 3 * TOKENS * (LAYERS * (attention + experts) + logits)
    seconds = {event.step: event.value for event in scalars["iteration-time"]}
    teraflops = {event.step: event.value for event in scalars["throughput"]}
    measured = [teraflops[step] * seconds[step] * 1e12 * RANKS for step in (2, 4)]
    assert measured == pytest.approx([operations] * 2, rel=1e-5)
