"""Scripts that tests start as the ranks of one gloo group."""
