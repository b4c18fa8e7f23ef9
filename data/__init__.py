"""Corpora: text to token files (`python -m data.prepare`), token files to batches (`data.loader`)."""
