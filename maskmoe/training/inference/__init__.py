"""What a trained checkpoint says: losses by frequency band, log-likelihoods of texts, continuations of prompts."""
