"""The builder reports settings that Megatron-Core refuses only while it makes the modules."""

from pathlib import Path

import pytest
from megatron.training.models.gpt import GPTModelConfig
from support.small_moe import make_config, make_mask, process_groups, random_visible_sets

from maskmoe.errors import UserError
from maskmoe.training.model.model_builder import MaskMoEGPTModelBuilder, MaskMoEModelConfig, refusing_settings

EXPERTS, VOCAB_SIZE = 4, 9


def test_bare_assertion_of_megatron_is_one_line(one_rank: None, tmp_path: Path) -> None:
    make_mask(random_visible_sets(0, 1, VOCAB_SIZE, EXPERTS)).save(tmp_path / "mask.safetensors")
    transformer = make_config(EXPERTS, add_bias_linear=True, moe_shared_expert_intermediate_size=8)
    settings = GPTModelConfig(transformer=transformer, vocab_size=VOCAB_SIZE, seq_length=16)
    config = MaskMoEModelConfig(megatron=settings, routing_mask=tmp_path / "mask.safetensors")
    with pytest.raises(UserError, match=r"^the model cannot be made: bias is not supported in the shared experts"):
        MaskMoEGPTModelBuilder(config).build_distributed_models(process_groups(), wrap_with_ddp=False)


def test_error_of_own_code_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="not enough values"), refusing_settings():
        _, _ = [0]
