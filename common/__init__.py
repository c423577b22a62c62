"""What the scripts share. Arrows run one way: scripts -> experiment -> the rest -> unet, data, config."""
