"""The parts of every step of training and evaluation: batches, the model, and the ranks."""
