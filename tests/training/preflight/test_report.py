"""The text of the report of `--check`."""

from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.memory import MemoryReport, StageMemory
from maskmoe.training.preflight.parameters import PARTS, Chunk, ModelParameters
from maskmoe.training.preflight.report import Report


def model_of(layers: tuple[str, ...], predictions: tuple[str, ...], mean: float) -> ModelParameters:
    chunk = Chunk(dict.fromkeys(PARTS, 10**8), 8 * 10**7, 0, layers, predictions, True, True)
    return ModelParameters(chunk, ((chunk, chunk), (chunk,)), 8, 2, mean, mask_bytes=0, padded_vocab_size=9)


def test_complete_report():
    layout = Layout(16, 2, 2, 1, 4, 1, 1, 2, 1, 64, 4096)
    stages = tuple(
        StageMemory(gib << 30, gib << 29, 0, 0, 0, 0, 0, 0, micro_batches_in_flight=4 / gib) for gib in (2, 4)
    )
    model = model_of(tuple("GE*E+-M-E"), ("*E", "*E"), 1.4)
    cost = {"flops_per_token": 2.5e9, "tokens": 10**11, "flops": 2.5e20}
    report = Report((), ("something",), layout, model, MemoryReport(stages, 1.4), cost)
    lines = report.to_text().splitlines()
    for line in (
        "ranks         16",
        "  dense parts TP 2 × PP 2 × CP 1 × DP 4 = 16",
        "  experts     ETP 1 × EP 4 × PP 2 × expert DP 2 = 16",
        "step          64 samples = 16 micro-batches × 1 × DP 4; 262,144 tokens",
        "layers        9: 1 attention, 1 multi-latent attention, 1 gated delta net, 1 Mamba, 2 MLP, "
        "3 MoE; multi-token prediction: 2 attention, 2 MoE",
        "  of stages   9+9, 9",
        "parameters    0.50 B  500,000,000",
        "active        0.33 B  325,000,000  for a token with 2 experts, without multi-token prediction",
        "              0.32 B  317,500,000  on average, with 1.4 experts a token",
        "memory        GiB a rank, pipeline stage 1 of 0 to 1, 1 micro-batches in flight",
        "  weights and buffers            4.00  exact",
        "  total                          6.00",
        "  total of stages           3.00, 6.00",
        "cost          2.5 GFLOPs a token, forward and backward",
        "  whole run   100 B tokens, 2.5e+20 FLOPs",
        "note: something",
        "no errors found",
    ):
        assert line in lines
    assert not any("optimizer" in line for line in lines)
    assert Report(("an error",)).to_text() == ""
