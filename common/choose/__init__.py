"""Which weight gets which bytes."""
