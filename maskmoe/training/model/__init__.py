"""The batch and the model of every step of training and evaluation."""
