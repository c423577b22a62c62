"""What the scripts share, in rooms; arrows run downwards only (the layers in pyproject.toml, `make lint`)."""
