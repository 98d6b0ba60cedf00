"""What is read out of and put into checkpoints besides Megatron's own."""
