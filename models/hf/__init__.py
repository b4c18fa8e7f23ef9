"""Hugging Face directories: export of a trained model, and the name mapping that serves both directions."""
