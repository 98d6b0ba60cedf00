"""Cross-entropy that keeps the logits once, against plain torch, also over two tensor-parallel ranks."""

from collections.abc import Callable

import pytest
import torch
from support.small_moe import DEVICE, make_config, make_mask, make_model, process_groups, random_visible_sets
from support.tensors import saved_tensors
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.torch_modules import cross_entropy
from maskmoe.transformer.torch_modules.cross_entropy import vocab_parallel_cross_entropy

DTYPES = [torch.float32, torch.bfloat16]
# The functions add exponentials in another order. Gradients of bf16 logits are rounded to bf16, up or down.
LOSS_TOLERANCE = {"rtol": 1e-6, "atol": 2e-6}
GRADIENT_TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-7},
}

VOCAB_SIZE = 64


def values_of(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits [sequence, batch, vocabulary], targets and the gradient of the losses, [sequence, batch] each."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 2, VOCAB_SIZE, generator=generator)
    target = torch.randint(VOCAB_SIZE, (12, 2), generator=generator)
    gradient = torch.randn(12, 2, generator=generator)
    return logits.to(device, dtype), target.to(device), gradient.to(device)


def results(
    cross_entropy: Callable, logits: Tensor, target: Tensor, gradient: Tensor, group: ProcessGroup
) -> dict[str, Tensor]:
    """Return the losses and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, target, tp_group=group)
    return {"losses": losses.detach(), "gradient": torch.autograd.grad(losses, leaf, gradient)[0]}


def results_of_rank() -> dict[str, dict[str, Tensor]]:
    """Return the results of a rank with its part of the logits, by dtype."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for dtype in DTYPES:
        logits, *rest = values_of(dtype, torch.device("cpu"))
        values = (logits.chunk(num_ranks, dim=-1)[rank].contiguous(), *rest)
        found[str(dtype)] = results(vocab_parallel_cross_entropy, *values, torch.distributed.group.WORLD)
    return found


@pytest.fixture(params=[1, 5 * VOCAB_SIZE, 2**30], ids=["one token", "five tokens", "all tokens"])
def chunk(request, monkeypatch) -> None:
    """Compute on chunks of another size."""
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", request.param)
    monkeypatch.setattr(cross_entropy, "_GPU_CHUNK", request.param)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found["losses"], expected["losses"], **LOSS_TOLERANCE)
    tolerance = GRADIENT_TOLERANCE[expected["gradient"].dtype]
    torch.testing.assert_close(found["gradient"], expected["gradient"], **tolerance)


def plain(logits: Tensor, target: Tensor, tp_group: object) -> Tensor:
    """Compute cross-entropy in fp32."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return losses.view(target.shape)


@pytest.mark.parametrize("factor", [1, 100], ids=["", "large logits do not overflow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_plain_torch(dtype, factor, chunk) -> None:
    logits, *rest = values_of(dtype, DEVICE)
    values, group = (factor * logits, *rest), process_groups().tp
    assert_close(results(vocab_parallel_cross_entropy, *values, group), results(plain, *values, group))


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(results_of_rank, tmp_path_factory.mktemp("cross_entropy"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divided_vocabulary(dtype, ranks) -> None:
    """Two ranks with half of the vocabulary each compute what one rank with all of it computes."""
    expected = results(plain, *values_of(dtype, torch.device("cpu")), process_groups().tp)
    gradient = torch.cat([result[str(dtype)]["gradient"] for result in ranks], dim=-1)
    for result in ranks:
        assert_close({"losses": result[str(dtype)]["losses"], "gradient": gradient}, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_the_logits_once_in_their_dtype(dtype) -> None:
    logits, target, _ = values_of(dtype, DEVICE)
    product = logits.requires_grad_() * 1
    saved = saved_tensors(lambda: vocab_parallel_cross_entropy(product, target, tp_group=process_groups().tp))
    assert {tensor.data_ptr() for tensor in saved if tensor.dim() == 3} == {product.data_ptr()}


@pytest.mark.parametrize("fusion", [False, True], ids=["default", "--cross-entropy-loss-fusion"])
def test_model_computes_this_loss(fusion, monkeypatch) -> None:
    config = make_config(cross_entropy_loss_fusion=fusion)
    model = make_model(config, make_mask(random_visible_sets(0, 1, VOCAB_SIZE, 4)))
    calls = []
    monkeypatch.setattr(
        cross_entropy,
        "vocab_parallel_cross_entropy",
        lambda *arguments: calls.append(arguments) or vocab_parallel_cross_entropy(*arguments),
    )
    ids = torch.randint(VOCAB_SIZE, (2, 16), device=DEVICE)
    positions = torch.arange(16, device=DEVICE).expand_as(ids)
    losses = model(ids, positions, None, labels=ids)
    assert len(calls) == (not fusion)
    expected = plain(model(ids, positions, None), ids, None)
    torch.testing.assert_close(losses, expected, **LOSS_TOLERANCE)
    assert losses.is_contiguous()
