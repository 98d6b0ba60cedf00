"""Packed documents against the same documents one at a time."""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import MLATransformerConfig
from support import small_moe as moe
from support.small_moe import DEVICE, YARN
from torch import Tensor

from maskmoe.training.model.batch import Batch, join_documents, token_losses
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.models import DenseGPTModel, MaskMoEGPTModel
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention

pytestmark = pytest.mark.usefixtures("one_rank")

NUM_LAYERS, VOCAB_SIZE, SEQUENCE = 2, 40, 16
VISIBLE = moe.random_visible_sets(6, NUM_LAYERS + 2, VOCAB_SIZE, 4)
# The bounds of the documents of two samples; the second sample is one document.
BOUNDS = [[0, 1, 6, 13, 16], [0, 16]]
FP32_ORDER_OF_SUMS = 2e-5
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "no experts": {"num_experts": None},
    "YaRN": {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 8,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
    },
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "bias of attention": {"add_qkv_bias": True},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "multi-token prediction": {"mtp_num_layers": 2},
    "multi-latent attention with YaRN": {
        "config_class": MLATransformerConfig,
        "rope_type": "yarn",
        **moe.LATENT_SIZES,
        **YARN,
    },
}


def build_model(
    position_embedding_type: str = "rope",
    num_experts: int | None = 4,
    pre_process: bool = True,
    post_process: bool = True,
    **settings: Any,
) -> GPTModel:
    torch.manual_seed(0)
    yarn = {name: settings.pop(name) for name in [*settings] if name.startswith("yarn_")}
    config = moe.make_config(num_experts, num_layers=NUM_LAYERS, hidden_size=16, **settings)
    vars(config).update(yarn)  # these settings are not fields of the configuration's class
    mask = moe.make_mask(VISIBLE[: NUM_LAYERS + (config.mtp_num_layers or 0)])
    visible_experts = None if num_experts is None else moe.make_visible_experts(config, mask)
    own = {} if visible_experts is None else {"visible_experts": visible_experts}
    return (MaskMoEGPTModel if own else DenseGPTModel)(
        config,
        get_maskmoe_decoder_block_spec(config, visible_experts),
        mtp_block_spec=get_maskmoe_mtp_block_spec(config, visible_experts) if config.mtp_num_layers else None,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE,
        position_embedding_type=position_embedding_type,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=moe.process_groups(),
        **own,
    ).to(DEVICE)


def padded_bounds(samples: list[list[int]]) -> Tensor:
    """Return the bounds as `GPTDataset` does: int32 [samples, sequence + 1], the last bound repeated."""
    return torch.tensor([bounds + [SEQUENCE] * (SEQUENCE + 1 - len(bounds)) for bounds in samples], dtype=torch.int32)


def token_ids() -> tuple[Tensor, Tensor]:
    """Return ids and labels of two samples, int64 [2, sequence] each."""
    ids = torch.randint(0, VOCAB_SIZE, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def packed_losses(model: torch.nn.Module, samples: list[list[int]] = BOUNDS) -> Tensor:
    """Return the losses [samples, sequence] of the packed samples."""
    ids, labels = (tensor[: len(samples)].contiguous() for tensor in token_ids())
    positions = torch.stack([torch.cat([torch.arange(end - start) for start, end in pairwise(b)]) for b in samples])
    documents = join_documents(padded_bounds(samples), ids.device)
    loss_mask = torch.ones(ids.shape, device=DEVICE)
    return token_losses(model, Batch(ids, positions.to(DEVICE), None, labels, loss_mask, documents))


def losses_one_by_one(model: torch.nn.Module) -> Tensor:
    """Return the losses [2, sequence], computed for one document at a time."""
    ids, labels = token_ids()
    losses = []
    for sample, bounds in enumerate(BOUNDS):
        for start, end in pairwise(bounds):
            document = slice(sample, sample + 1), slice(start, end)
            positions = torch.arange(end - start, device=DEVICE).unsqueeze(0)
            losses.append(model(ids[document], positions, None, labels=labels[document]).flatten())
    return torch.cat(losses).view(2, SEQUENCE)


def results(model: torch.nn.Module, losses: Tensor) -> list[Tensor | None]:
    """Return the losses and the gradients of their sum."""
    model.zero_grad()
    losses.sum().backward()
    return [losses, *(parameter.grad for parameter in model.parameters())]


def assert_close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_equals_documents_one_by_one(name: str) -> None:
    """Losses and gradients."""
    model = build_model(**MODELS[name])
    ours, theirs = results(model, packed_losses(model)), results(model, losses_one_by_one(model))
    if name == "multi-token prediction":
        # The mean of each document's loss is another loss than the mean over all documents.
        ours, theirs = ours[:1], theirs[:1]
    assert_close(ours, theirs, FP32_ORDER_OF_SUMS)


def test_a_sample_alone_equals_its_documents_one_by_one() -> None:
    model = build_model()
    found = packed_losses(model, BOUNDS[:1])
    torch.testing.assert_close(found, losses_one_by_one(model)[:1], rtol=0, atol=FP32_ORDER_OF_SUMS)


def test_samples_of_one_document_equal_samples_that_are_not_packed() -> None:
    model, whole = build_model(), [[0, SEQUENCE]] * 2
    ids, labels = token_ids()
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(2, -1)
    unpacked = model(ids, positions, None, labels=labels)
    torch.testing.assert_close(packed_losses(model, whole), unpacked, rtol=0, atol=FP32_ORDER_OF_SUMS)
    # The comparison can fail: documents make a difference, except for their first one.
    packed = packed_losses(model)
    first_end = BOUNDS[0][1]
    torch.testing.assert_close(packed[0, :first_end], unpacked[0, :first_end], rtol=0, atol=FP32_ORDER_OF_SUMS)
    assert (packed[0, first_end:] - unpacked[0, first_end:]).abs().max() > 1e2 * FP32_ORDER_OF_SUMS


def prediction_losses(compute: Callable[[], Tensor]) -> Tensor:
    """Return the losses [layers] of multi-token prediction that a computation logs."""
    MTPLossLoggingHelper.tracker.clear()
    compute()
    return MTPLossLoggingHelper.tracker["loss_values"]


def test_multi_token_prediction_keeps_to_documents() -> None:
    """The loss is the mean over the tokens whose label is in the same document; a document has too few at its end."""
    model = build_model(mtp_num_layers=2)
    ids, labels = token_ids()
    total, count = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    for sample, bounds in enumerate(BOUNDS):
        for start, end in pairwise(bounds):
            document = slice(sample, sample + 1), slice(start, end)
            positions = torch.arange(end - start, device=DEVICE).unsqueeze(0)
            counted = torch.tensor([max(0, end - start - ahead) for ahead in (1, 2)], device=DEVICE)
            total += counted * prediction_losses(
                lambda document=document, positions=positions: model(
                    ids[document], positions, None, labels=labels[document]
                )
            )
            count += counted
    packed = prediction_losses(lambda: packed_losses(model))
    torch.testing.assert_close(packed, total / count, rtol=FP32_ORDER_OF_SUMS, atol=0)
    across = prediction_losses(lambda: packed_losses(model, [[0, SEQUENCE]] * 2))
    assert ((packed - across).abs() > 1e2 * FP32_ORDER_OF_SUMS).all()


@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    samples_repeat_bounds=st.booleans(),
)
def test_documents_of_samples_are_joined(lengths: list[list[int]], samples_repeat_bounds: bool) -> None:
    size = max(sum(sample) for sample in lengths)
    # Give all samples the same number of tokens.
    lengths = [[*sample, *([size - sum(sample)] if sum(sample) < size else [])] for sample in lengths]
    columns = size + 1 if samples_repeat_bounds else max(map(len, lengths)) + 1
    rows = [np.cumsum([0, *sample]).tolist() for sample in lengths]
    cu_seqlens = torch.tensor([row + [size] * (columns - len(row)) for row in rows], dtype=torch.int32)
    documents = join_documents(cu_seqlens, torch.device("cpu"))
    joined = [*chain.from_iterable(lengths)]
    bounds = documents.cu_seqlens_q
    assert bounds is documents.cu_seqlens_kv
    assert bounds.dtype == documents.seq_idx.dtype == torch.int32
    assert bounds.tolist() == np.cumsum([0, *joined]).tolist()
    assert documents.max_seqlen_q == documents.max_seqlen_kv == size
    assert documents.seq_idx.tolist() == [np.repeat(np.arange(len(joined)), joined).tolist()]


HEADS, CHANNELS = 4, 12
LENGTHS = [5, 1, 11, 23]


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_query_groups": 2},
    "window": {"window_size": (3, 0)},
    "values of another width": {"value_channels": 20},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_a_mask_of_all_pairs(name: str, dtype: torch.dtype) -> None:
    settings = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype} | ATTENTIONS[name]
    widths = (CHANNELS, CHANNELS, settings.pop("value_channels", CHANNELS))
    groups = settings.get("num_query_groups", HEADS)
    config = moe.make_config(num_attention_heads=HEADS, hidden_size=HEADS * CHANNELS, **settings)
    attention = TorchDotProductAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=moe.process_groups(), softmax_scale=0.35
    )
    # Queries, keys and values [tokens, heads, channels].
    torch.manual_seed(0)
    shapes = zip((HEADS, groups, groups), widths, strict=True)
    inputs = [torch.randn(sum(LENGTHS), *shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]
    document = torch.arange(len(LENGTHS), device=DEVICE).repeat_interleave(torch.tensor(LENGTHS, device=DEVICE))
    later = torch.ones(len(document), len(document), dtype=torch.bool, device=DEVICE).triu(1)
    mask = ((document[:, None] != document) | later)[None, None]
    expected = attention(*(tensor.unsqueeze(1) for tensor in inputs), mask).squeeze(1)
    documents = join_documents(torch.tensor([[0, *np.cumsum(LENGTHS)]], dtype=torch.int32), DEVICE)
    found = attention(*inputs, None, packed_seq_params=documents)
    gradient = torch.randn_like(found)
    assert_close(
        [found, *torch.autograd.grad(found, inputs, gradient)],
        [expected, *torch.autograd.grad(expected, inputs, gradient)],
        5e-6 if dtype == torch.float32 else 2e-2,
    )
