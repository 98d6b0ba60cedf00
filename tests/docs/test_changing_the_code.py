"""The Python examples of the walk-throughs run against the code, and do what the page says."""

import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.documentation import DOCS, blocks
from support.launchers import RunRanks
from support.small_moe import (
    draw_parameters,
    initialize_parallelism,
    make_config,
    make_layer,
    make_mask,
    random_visible_sets,
)

from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher
from maskmoe.transformer.selection import MaskedLogits, select_experts
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids


def example(name: str) -> str:
    """Return the Python block of the page that defines `name`."""
    examples = [block.text for block in blocks(DOCS / "changing-the-code.md") if block.language == "python"]
    (text,) = (text for text in examples if re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE))
    return text


def define(name: str) -> SimpleNamespace:
    """Run the Python block that defines `name`, and return its names."""
    namespace: dict[str, object] = {}
    exec(example(name), namespace)
    return SimpleNamespace(**{key: value for key, value in namespace.items() if not key.startswith("__")})


def masked_logits(is_real: torch.Tensor | None = None) -> MaskedLogits:
    """Return logits of a token that sees three experts, and of a token that sees one."""
    visible = torch.tensor([[True, True, True, False], [False, False, True, False]])
    logits = torch.tensor([[1.0, 2.0, 0.5, 9.0], [1.0, 2.0, 0.5, 9.0]], requires_grad=True)
    values = logits.masked_fill(~visible, float("-inf"))
    sets = SimpleNamespace(experts=visible, routable=visible.sum(dim=1) > 1)
    return MaskedLogits(values, sets, is_real, num_sequences=1, score_function="softmax")


def test_sampling_follows_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = masked_logits()
    probabilities = logits.normalized_scores.detach()[:1].expand(20_000, -1)
    scores = define("with_sampling_noise").with_sampling_noise(probabilities)
    selected = select_experts(scores, logits.visible.experts[:1].expand(20_000, -1), topk=1)
    shares = torch.bincount(selected.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.02)
    assert shares[3] == 0


@pytest.mark.parametrize("is_real", [None, torch.tensor([True, False])], ids=["no padding", "padding"])
def test_entropy_loss_and_its_gradient(is_real: torch.Tensor | None) -> None:
    logits = masked_logits(is_real)
    loss = define("sum_choice_entropy").sum_choice_entropy(logits)
    expected = torch.distributions.Categorical(logits=torch.tensor([1.0, 2.0, 0.5])).entropy()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits.values)
    assert gradient[0, :3].abs().min() > 0
    assert gradient[0, 3] == 0
    assert gradient[1].abs().max() == 0


NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 6, 9, 6, 4, 8


def compare_gather_dispatch(module: Path) -> None:
    """Compare outputs and gradients under the `GatherDispatcher` of a file with those under one-copy dispatch."""
    num_ranks = torch.distributed.get_world_size()
    initialize_parallelism(expert_model_parallel_size=num_ranks)
    mask = make_mask(random_visible_sets(5, 1, VOCAB_SIZE, NUM_EXPERTS, (1, 2, 3, 6)))
    layer = make_layer(make_config(NUM_EXPERTS, topk=2, expert_model_parallel_size=num_ranks), mask)
    draw_parameters(layer)

    torch.manual_seed(torch.distributed.get_rank())
    token_ids = pack_token_ids(TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE))))
    hidden_states, gradient = torch.randn(2, SEQUENCE, BATCH, HIDDEN)

    def output_and_gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        input = hidden_states.clone().requires_grad_()
        output, _ = layer(input, padding_mask=token_ids)
        output.backward(gradient)
        return [output.detach(), input.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    assert isinstance(layer.dispatcher, OneCopyDispatcher)
    expected = output_and_gradients()
    gather = SourceFileLoader("gather", str(module)).load_module()
    layer.dispatcher = gather.GatherDispatcher(NUM_EXPERTS, torch.distributed.group.WORLD)
    torch.testing.assert_close(output_and_gradients(), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_gather_dispatcher_equals_one_copy_dispatch(run_ranks: RunRanks, tmp_path: Path) -> None:
    module = tmp_path / "gather.py"
    module.write_text(example("GatherDispatcher"), encoding="utf-8")
    run_ranks(compare_gather_dispatch, tmp_path, module)
