"""What a trained checkpoint says: losses by frequency band."""
