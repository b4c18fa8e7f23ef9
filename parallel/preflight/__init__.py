"""The look at a job's nodes before hours are spent on them: `python -m parallel.preflight`."""
