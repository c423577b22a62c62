"""The machine, its processes, its disk."""
