"""All that updates weights."""
