"""Make routing masks before training from the frequency of each token id, without torch or Megatron."""
