"""Images in, estimates with errors out."""
