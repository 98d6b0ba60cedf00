"""Defines MaskMoE models for transformers.

Importing this package registers the models with transformers' Auto classes, which then load exported models without
`trust_remote_code`. The package imports only torch and transformers, since its files `*_maskmoe.py` are copied beside
exported weights; only vLLM imports `vllm_maskmoe.py`.
"""

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from maskmoe.huggingface.configuration_maskmoe import AUTO_MAP, MaskMoEConfig
from maskmoe.huggingface.modeling_maskmoe import MaskMoEForCausalLM, MaskMoEModel


def export_code(folder: Path) -> None:
    """Copy the code of the models to a folder of exported weights, for users who do not have this package."""
    for file in Path(__file__).parent.glob("*_maskmoe.py"):
        shutil.copy(file, folder)


AutoConfig.register(MaskMoEConfig.model_type, MaskMoEConfig, exist_ok=True)
MaskMoEConfig.register_for_auto_class()
for _auto_class, _model in ((AutoModel, MaskMoEModel), (AutoModelForCausalLM, MaskMoEForCausalLM)):
    _auto_class.register(MaskMoEConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto_class.__name__)

__all__ = ["AUTO_MAP", "MaskMoEConfig", "MaskMoEForCausalLM", "MaskMoEModel", "export_code"]
