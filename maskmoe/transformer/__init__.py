"""What the method adds to Megatron-Core's layers: visible experts, router, dispatcher, layer, specs and model."""
