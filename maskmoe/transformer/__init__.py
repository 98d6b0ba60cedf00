"""The layers, models and layer specs of MaskMoE for Megatron-Core; `maskmoe.__all__` names the public ones."""
