"""Samples that hold several documents, each of which attends only to itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """Megatron-Core's description of packed sequences, with the bounds in host memory and on the device.

    Megatron-Core's plain torch code reads `cu_seqlens_q` on the host, in every layer. Bounds in host memory spare it a
    wait for the device. Transformer Engine wants `cu_seqlens_q` on the device.

    Attributes:
        lengths: Number of tokens of each document.
        bounds: int32 [documents + 1] on the device, the first token of each document, then the number of tokens.
    """

    lengths: list[int]
    bounds: Tensor

    @classmethod
    def of_samples(cls, cu_seqlens: Tensor, device: torch.device, *, reads_on_host: bool) -> PackedDocuments:
        """Join the documents of the samples of a micro-batch.

        Args:
            cu_seqlens: int32 [samples, any] in host memory, for each sample the bounds of its documents; the number of
                tokens of a sample may be repeated at the end.
            device: The device of the model.
            reads_on_host: Whether the model reads the bounds on the host.
        """
        sample_length = int(cu_seqlens[0, -1])
        first_tokens = torch.arange(len(cu_seqlens), dtype=torch.int32).unsqueeze(1) * sample_length
        on_host = (cu_seqlens + first_tokens).unique()
        bounds = on_host.to(device, non_blocking=True)
        used = on_host if reads_on_host else bounds
        lengths = on_host.diff()
        # Mamba layers start anew where the number of the document changes, int32 [1, batch * sequence].
        seq_idx = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths).unsqueeze(0)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=used,
            cu_seqlens_kv=used,
            # An upper bound that is the same for all micro-batches: rotary embeddings and attention plans are cached
            # for each value.
            max_seqlen_q=sample_length,
            max_seqlen_kv=sample_length,
            seq_idx=seq_idx.to(device, non_blocking=True),
            lengths=lengths.tolist(),
            bounds=bounds,
        )


class PackingModel(torch.nn.Module):
    """Mixin for a Megatron-Core model that takes `PackedDocuments` in samples, [batch, sequence], on every stage.

    Megatron-Core computes packed documents as one sequence, [1, batch * sequence]. Its pipeline schedules still expect
    hidden states [sequence, batch, hidden] between stages, so this class changes the shape at both ends of a stage.
    Rotary embeddings count from the beginning of each document, or of the only sample: attention within a document
    depends on differences of positions only.
    Megatron-Core's own `PackedSeqParams` is passed on, with all arguments in the shapes of Megatron-Core.
    """

    config: TransformerConfig
    decoder: Any
    post_process: bool

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: Any = None,
        *,  # `GPTModel` and `HybridModel` have different arguments at the next position.
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run one pipeline stage.

        Ids and labels are [batch, sequence]. With `PackedDocuments`, `position_ids` are positions within the documents,
        and `attention_mask` is None. The result is losses [batch, sequence] or logits [batch, sequence, vocabulary] on
        the last stage, else hidden states.

        Raises:
            NotImplementedError: The load-balancing loss `seq_aux_loss`, in training with `PackedDocuments` of several
                samples.
        """
        kwargs |= {"decoder_input": decoder_input, "labels": labels, "inference_context": inference_context}
        if not isinstance(packed_seq_params, PackedDocuments):
            return super().forward(
                input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params, **kwargs
            )
        kind, weight = self.config.moe_router_load_balancing_type, self.config.moe_aux_loss_coeff
        weights = dict(zip(kind, weight, strict=True)) if isinstance(weight, list) else {kind: weight}
        balances = self.config.num_moe_experts and weights.get("seq_aux_loss")
        if self.training and len(input_ids) > 1 and balances:
            raise NotImplementedError(
                "seq_aux_loss cannot balance the samples of PackedDocuments: train on micro-batches of one sample"
            )
        # Join the samples, and the hidden states that were received from the previous stage.
        for name in ("labels", "loss_mask", "padding_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].reshape(1, -1)
        ids, positions = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        received = self.decoder.input_tensor
        if received is not None:
            self.decoder.input_tensor = received.view(-1, 1, received.shape[-1])
        output = super().forward(ids, positions, attention_mask, packed_seq_params=packed_seq_params, **kwargs)
        # Separate the samples, or give the hidden states the shape in which the schedules send them.
        if self.post_process:
            return output.view(*input_ids.shape, *output.shape[2:])
        sent = output.view(-1, len(input_ids), output.shape[-1])
        # The schedules free the memory of a sent tensor, which must not be a view.
        return make_viewless_tensor(sent, requires_grad=True, keep_graph=True)
