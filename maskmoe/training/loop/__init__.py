"""What happens in every step of training, evaluation and generation: batches, the model, and the ranks."""
