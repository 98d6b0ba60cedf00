"""Defines MaskMoE models for transformers.

Importing this package registers the models with transformers' Auto classes, which then load exported models without
`trust_remote_code`. The package imports only torch and transformers, since its files `configuration_maskmoe.py` and
`modeling_maskmoe.py` are copied beside exported weights.
"""

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from maskmoe.huggingface import configuration_maskmoe, modeling_maskmoe
from maskmoe.huggingface.configuration_maskmoe import MaskMoEConfig
from maskmoe.huggingface.modeling_maskmoe import MaskMoEForCausalLM, MaskMoEModel

AUTO_MAP = {
    "AutoConfig": "configuration_maskmoe.MaskMoEConfig",
    "AutoModel": "modeling_maskmoe.MaskMoEModel",
    "AutoModelForCausalLM": "modeling_maskmoe.MaskMoEForCausalLM",
}
"""The `auto_map` of config.json: names the classes that `trust_remote_code` loads from the files of `export_code`."""

_EXPORTED_MODULES = (configuration_maskmoe, modeling_maskmoe)


def export_code(folder: Path) -> None:
    """Copy the code of the models to a folder of exported weights, for users who do not have this package."""
    for module in _EXPORTED_MODULES:
        shutil.copy(module.__file__, folder)


def _register() -> None:
    AutoConfig.register(MaskMoEConfig.model_type, MaskMoEConfig, exist_ok=True)
    for auto_class, model in ((AutoModel, MaskMoEModel), (AutoModelForCausalLM, MaskMoEForCausalLM)):
        auto_class.register(MaskMoEConfig, model, exist_ok=True)
        model.register_for_auto_class(auto_class.__name__)
    MaskMoEConfig.register_for_auto_class()


_register()

__all__ = ["AUTO_MAP", "MaskMoEConfig", "MaskMoEForCausalLM", "MaskMoEModel", "export_code"]
