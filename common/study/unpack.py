"""Writes a packed model as a folder of ordinary files, which diffusers' from_pretrained loads without arguments.

    python -m common unpack results/my-unet/models/FILE.safetensors --out my-unet-13x
    python -m common unpack FILE --out DIR --dtype fp16

A model of diffusers becomes a whole pipeline (unet/, scheduler/, model_index.json). This project's own network becomes
a folder with config.json and model.safetensors. The weights have the values of the packed file, but are stored as plain
FP32 numbers, so the folder is as large as that of the FP32 model. --dtype fp16 rounds them and halves the size.
"""

from common.options import Parser, file_name


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=file_name, metavar="FILE", help="a packed model, or a baseline")
    parser.add_argument("--out", type=file_name, required=True, metavar="DIR", help="a new folder, or an empty one")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights in the folder")
    options = parser.parse_args()

    import torch

    from common.formats.diffusers_folder import write_folder
    from common.study.run import read_checkpoint

    model = read_checkpoint(options.file, "FILE")
    write_folder(model, options.out, torch.float16 if options.dtype == "fp16" else torch.float32)
    print(f"{model.metadata['label']}: {options.out}/, weights in {options.dtype.upper()}")
