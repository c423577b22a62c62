"""What the scripts share, in rooms; arrows run downwards only (the layers in pyproject.toml, `make lint`)."""


def load(file):
    """The network of a packed model's file, or of a baseline's, as an nn.Module in evaluation mode, weights in FP32.

    Of a model of diffusers a UNet2DModel: network(x, t).sample is the prediction. Of this project's own a UNet:
    network(x, t) is. Raises UserError for a file that cannot be used.
    """
    from common.formats.packed import load_plain

    return load_plain(file)
