"""Defines the model class with which vLLM divides MaskMoE models into pipeline stages.

Every stage needs the token ids, but vLLM's class for models of transformers drops the ids on later stages, even if
the worker has them. This file is copied beside exported weights. vLLM loads the class if the file is importable and
`--model-class-overrides` names the class.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM  # pyrefly: ignore[missing-import]
from vllm.sequence import IntermediateTensors  # pyrefly: ignore[missing-import]


class MaskMoEForCausalLM(TransformersMoEForCausalLM):
    """Runs a MaskMoE model, and sends the token ids from stage to stage beside the hidden states."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        make_hidden_states = self.make_empty_intermediate_tensors

        def make_empty(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
            tensors = make_hidden_states(batch_size, dtype, device)
            tensors["token_ids"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
            return tensors

        self.make_empty_intermediate_tensors = make_empty

    def pipeline_parallel(self) -> None:
        """Keep only the layers of this stage."""
        self.model.stages_get_token_ids = True
        super().pipeline_parallel()

    def _decorate_cls_for_torch_compile(self, *, dynamic_arg_dims: dict[str, Any], **kwargs: Any) -> None:
        # Compile for any number of ids, as for any number of hidden states.
        super()._decorate_cls_for_torch_compile(dynamic_arg_dims={**dynamic_arg_dims, "routing_ids": 1}, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Process tokens.

        Args:
            input_ids: int32 or int64 [tokens]; read by the first stage only.
            positions: int64 [tokens].
            intermediate_tensors: `hidden_states` [tokens, hidden] and `token_ids` int64 [tokens] of the previous stage;
                None on the first stage.
            inputs_embeds: [tokens, hidden], embeddings of prompts, which the model refuses.
            kwargs: passed on to the model.

        Returns:
            the last stage's hidden states [tokens, hidden]; other stages' intermediate tensors.
        """
        token_ids: Any = input_ids
        if intermediate_tensors is not None:
            token_ids = intermediate_tensors["token_ids"]
            kwargs["routing_ids"] = token_ids[None]
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if isinstance(output, IntermediateTensors):
            output["token_ids"] = token_ids.clone()  # vLLM overwrites its ids while it sends the output
        return output
