"""Recurrences that are nonlinear in their state but act on each channel alone: one solver for every such cell."""
