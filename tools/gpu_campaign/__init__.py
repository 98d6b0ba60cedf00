"""A campaign on the GPUs of one machine: tests, training and measurements, with one page of results."""
