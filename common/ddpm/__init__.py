"""A network and its images."""
