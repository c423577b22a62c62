"""What the software takes: time, steps, memory."""
