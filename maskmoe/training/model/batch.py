"""Datasets, micro-batches with the token ids on every pipeline stage, and the loss of a micro-batch."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_args, get_tokenizer
from maskmoe.processes.console import console
from maskmoe.training.settings.samples import samples_to_request


class Batch(NamedTuple):
    """One micro-batch on one rank; every tensor is [batch, sequence] unless another shape is given.

    Attributes:
        tokens: int64
        position_ids: int64
        attention_mask: bool [batch, 1, sequence, sequence], True where attention is not allowed; None if causal
        labels: int64, the token that follows each token
        loss_mask: float32
        documents: the documents within which tokens attend, over all samples one after the other; None if tokens attend
            to the whole sample
    """

    tokens: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    loss_mask: Tensor
    documents: PackedSeqParams | None


Blend = tuple[list[str], list[float] | None]
"""Prefixes of datasets, and their weights."""

# A loss is spiky from this multiple of the largest of the first 100 on, as in Megatron-LM's `pretrain_gpt.py`.
_SPIKY_LOSS_FACTOR = 10
# The names of the tokens that `GPTFIMDataset` needs, each with a flag `--fim-NAME-token`.
_FILL_IN_MIDDLE_TOKENS = ("prefix", "middle", "suffix", "pad", "eod")


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, micro_batch_size: int) -> Batch:
    """Return the next micro-batch, complete on every pipeline stage.

    Megatron's `get_batch` gives no tokens to later stages. Here every stage reads the same samples. `data_iterator` is
    None on ranks that are not the first of their tensor-parallel group.
    """
    args = get_args()
    has_documents = args.dataloader_inter_document_masking
    data = next(data_iterator) if data_iterator is not None else {}
    tensors = [name for name in Batch._fields if name != "documents"]  # the names of `GPTDataset`
    batch: dict[str, Any] = dict.fromkeys((*tensors, "cu_seqlens", "max_seqlen"))
    batch |= {key: data[key].cuda(non_blocking=True) for key in batch if data.get(key) is not None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=has_documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=cast(torch.distributed.ProcessGroup, mpu.get_tensor_model_parallel_group()),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        # Megatron leaves tensors out on later stages of a pipeline, so report a pipeline of one stage.
        pipeline_model_parallel_size=1,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    documents = None
    if has_documents:
        # The rank that read the data need not wait for the device.
        cu_seqlens = data["cu_seqlens"] if data else batch["cu_seqlens"].cpu()
        documents = join_documents(cu_seqlens, batch["tokens"].device)
    return Batch(**{name: batch[name] for name in tensors}, documents=documents)


def join_documents(cu_seqlens: Tensor, device: torch.device) -> PackedSeqParams:
    """Describe the documents of the samples of a micro-batch, one sample after the other.

    `cu_seqlens`, int32 [samples, any] in host memory, has for each sample the bounds of its documents; the number of
    tokens of a sample may be repeated at the end. The description is on the device.
    """
    sample_length = int(cu_seqlens[0, -1])
    first_tokens = torch.arange(len(cu_seqlens), dtype=torch.int32).unsqueeze(1) * sample_length
    bounds = (cu_seqlens + first_tokens).unique()
    # Mamba layers start anew where the number of the document changes, int32 [1, batch * sequence].
    seq_idx = torch.arange(len(bounds) - 1, dtype=torch.int32).repeat_interleave(bounds.diff()).unsqueeze(0)
    bounds = bounds.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        # An upper bound that is the same for all micro-batches: rotary embeddings and attention plans are cached for
        # each value.
        max_seqlen_q=sample_length,
        max_seqlen_kv=sample_length,
        seq_idx=seq_idx.to(device, non_blocking=True),
    )


def inputs_of_model(batch: Batch, padding_mask: Tensor | None = None) -> dict[str, Any]:
    """Return the arguments of a model's forward pass for a micro-batch.

    `padding_mask` is bool [batch, sequence], True for tokens that routers must not count. Megatron-Core computes packed
    documents as one sequence, so the model gets [1, batch * sequence] of each tensor if the batch has documents.
    """
    per_token = {
        "input_ids": batch.tokens,
        "position_ids": batch.position_ids,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "padding_mask": padding_mask,
    }
    if batch.documents is not None:
        per_token = {name: tensor if tensor is None else tensor.view(1, -1) for name, tensor in per_token.items()}
    return {"attention_mask": batch.attention_mask, "packed_seq_params": batch.documents, **per_token}


def token_losses(model: torch.nn.Module, batch: Batch, padding_mask: Tensor | None = None) -> Tensor:
    """Run the forward pass of one pipeline stage; on the last stage, return the loss of every token [batch, sequence].

    `padding_mask` as for `inputs_of_model`.
    """
    output = model(**inputs_of_model(batch, padding_mask))
    return output.view_as(batch.tokens) if get_attr_wrapped_model(model, "post_process") else output


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[gpt_dataset.GPTDataset | None]:
    """Build the train, validation and test datasets on the first tensor-parallel rank of every pipeline stage.

    A dataset is None without a share, and on ranks that read no data. Datasets do not depend on `vp_stage`.

    Raises:
        UserError: Megatron asks for whole datasets, because of `--full-validation`.
    """
    console.load("building the datasets")
    args = get_args()
    if None in num_samples:
        raise UserError("--full-validation is not supported. Use maskmoe evaluate.")
    return build_blend(samples_to_request(args, num_samples), *get_blend_and_blend_per_split(args))


# Megatron calls the function on all ranks, not only on those of the first stage, if the attribute is set.
vars(build_datasets)["is_distributed"] = True


def build_blend(
    num_samples: Sequence[int | None], blend: Blend | None, blend_per_split: list[Blend | None] | None
) -> list[gpt_dataset.GPTDataset | None]:
    """Build the datasets of all splits, see `build_datasets`, of one blend or of a blend for each split.

    A number of samples of None stands for one epoch.
    """
    args = get_args()
    dataset, config = MockGPTDataset if args.mock_data else GPTDataset, GPTDatasetConfig
    if args.fim_data:
        dataset, config = FillInMiddleDataset, GPTFIMDatasetConfig
    # Megatron's configuration names most settings like its arguments.
    settings = {field.name: getattr(args, field.name) for field in fields(config) if field.name in args}
    settings |= fill_in_middle_tokens(args) if args.fim_data else {}
    settings |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    builder = BlendedMegatronDatasetBuilder(
        dataset,
        cast(list[int], num_samples),  # Megatron annotates int but takes None, too.
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        config(**settings),
    )
    return cast(list[gpt_dataset.GPTDataset | None], builder.build())


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron's `GPTDataset`, but it does not use the cached indices of an earlier dataset at the same path.

    With these indices, samples would begin and end where samples of the earlier dataset did, and omit new documents.
    """

    dataset: Any  # the `IndexedDataset`
    config: Any  # the `GPTDatasetConfig`

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Return a sample. Padding in the first sample takes no loss off the same places of other samples."""
        is_first = not self.masks_and_position_ids_are_cached
        sample = super().__getitem__(idx)
        if is_first and self.masks_and_position_ids_are_cached:
            # Megatron has cached the loss mask of this sample.
            self.cached_loss_mask = torch.ones_like(sample["loss_mask"])
        return sample

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the documents in order, the bounds of samples, and the order of samples, from the cache or new."""
        # The names of cached files are a hash of the identifiers, so other documents have other files.
        lengths = np.ascontiguousarray(self.dataset.sequence_lengths)
        self.unique_identifiers["document_lengths"] = hashlib.sha256(lengths).hexdigest()
        description = json.dumps(self.unique_identifiers, indent=4, default=lambda part: part.unique_identifiers)
        self.unique_description = description
        self.unique_description_hash = hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()
        return super()._build_document_sample_shuffle_indices()


class FillInMiddleDataset(GPTDataset, GPTFIMDataset):
    """`GPTFIMDataset` whose samples depend on their index only.

    Megatron's class draws from one generator in the order of reading, so samples would differ after a resume.
    """

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray, list]:
        """Return token ids, documents and lengths of a sample, drawn from a generator of its own."""
        self.np_rng = np.random.RandomState([self.config.random_seed, idx])
        return super()._query_document_sample_shuffle_indices(idx)


def fill_in_middle_tokens(args: Namespace) -> dict[str, Any]:
    """Return the setting of `GPTFIMDatasetConfig` that no argument of Megatron has by its name."""
    return {"fim_extra_tokens": {name: getattr(args, f"fim_{name}_token") for name in _FILL_IN_MIDDLE_TOKENS}}


def check_fill_in_middle_tokens(args: Namespace) -> None:
    """Raise `UserError` if `GPTFIMDataset` would silently insert wrong tokens with the HuggingFaceTokenizer."""
    tokenizer = get_tokenizer()
    vocabulary = tokenizer._tokenizer.tokenizer.get_vocab()
    for name in _FILL_IN_MIDDLE_TOKENS:
        token = getattr(args, f"fim_{name}_token")
        if token not in vocabulary:
            raise UserError(
                f"--tokenizer-model {args.tokenizer_model} has no token {token}, which --fim-data needs: add the token "
                f"before the tokenizer is used, or name another one by --fim-{name}-token"
            )
    if tokenizer.eod not in (None, vocabulary[args.fim_eod_token]):
        (end,) = tokenizer._tokenizer.ids_to_tokens([tokenizer.eod])
        raise UserError(
            f"--fim-data would join documents, because they end with {end} and not with {args.fim_eod_token}: pass "
            f"--fim-eod-token '{end}'"
        )
    if tokenizer._tokenizer.text_to_ids(""):
        raise UserError(
            f"--fim-data would insert the tokens that --tokenizer-model {args.tokenizer_model} adds to each text into "
            "documents: pass --tokenizer-hf-no-include-special-tokens"
        )


def loss_function(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the masked sum of the losses of a micro-batch, in the form that Megatron's schedules take.

    `loss_mask` is float [batch, sequence]; `output_tensor` has the loss of every token, see `inputs_of_model`.

    Returns:
        The sum of the losses, the number of tokens in the sum (int32), and both as `lm loss` for the log. Under context
            parallelism, the first sum is weighted, see `weight_of_rank`.

    Raises:
        RuntimeError: The loss is NaN or infinite, and `--check-for-nan-in-loss-and-grad` is on.
    """
    loss = torch.sum(output_tensor.view_as(loss_mask).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    machine = get_rerun_state_machine()
    if get_args().check_for_nan_in_loss_and_grad:
        machine.validate_result(
            loss, lambda value: not torch.isfinite(value), "found NaN or Inf in local forward loss calculation"
        )
    if get_args().check_for_spiky_loss:
        is_spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss")
        machine.validate_result(loss, is_spiky, "Spiky loss", fatal=False)
    logged = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
    if get_args().context_parallel_size > 1 and not get_args().calculate_per_token_loss:
        cp_group = cast(torch.distributed.ProcessGroup, mpu.get_context_parallel_group())
        loss = loss * weight_of_rank(num_tokens, cp_group)
    return loss, num_tokens, logged


def weight_of_rank(num_tokens: Tensor, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the factor of a rank's summed losses that makes all tokens of a micro-batch weigh the same.

    Megatron averages losses on each rank, then gradients over ranks, so tokens of a rank with fewer would weigh more.
    """
    total = num_tokens.float()
    torch.distributed.all_reduce(total, group=cp_group)
    return num_tokens * cp_group.size() / total.clamp(min=1)
