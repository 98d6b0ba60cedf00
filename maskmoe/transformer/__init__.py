"""MaskMoE's additions to Megatron-Core's layers: visible experts, router, dispatch, layer, layer specs and model."""
