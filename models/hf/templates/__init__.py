"""What an export adds to the flattened sources: plain modules, flattened like these (`models/hf/flatten.py`)."""
