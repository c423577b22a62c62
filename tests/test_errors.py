"""What goes wrong is said in one line that names the option and the remedy, before any work, and nothing is written."""

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from common.choose.layers import layer_weights
from common.ddpm.unet import UNet
from common.errors import run_main
from common.fisher import information
from common.formats.packed import full_precision, load_model, save_model
from common.options import script_parser
from common.presets import PRESETS
from common.runtime import sealed
from common.study import evaluate, learning_curve, report, score_folder
from common.study import run as study_run
from common.study.evaluate import make_evaluator
from common.study.run import start

ROOT = Path(__file__).parent.parent
SCRIPTS = ("simplediffusion", "whole_threshold", "layer_group", "layer_ratio", "layer_math", "layer_budget")
PATHS = ("simplediffusion", "layer_ratio")  # the two ways through the pipeline: what scripts share has no more
SHARED = [
    "--preset", "--checkpoint", "--data", "--data-dir", "--images", "--sampler",
    "--steps", "--eta", "--batch-size", "--seed", "--seeds", "--device", "--precision", "--engine", "--metric",
    "--inception-weights", "--out", "--dry-run",
]  # fmt: skip


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def few_digits(monkeypatch):
    """An eighth of the training digits, so that their features take no time."""
    load = study_run.load_digits

    def load_few(data, split, data_dir):
        digits = load(data, split, data_dir)
        return digits[::8] if split == "train" else digits

    monkeypatch.setattr(study_run, "load_digits", load_few)


@pytest.fixture
def refused(tiny_preset, few_digits, tmp_path, monkeypatch, capfd):
    """Runs a script as its process would; returns the one line it fails with. It must leave every file as it was."""

    def run(script, *arguments, main=None):
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_main(main or importlib.import_module(script).main)
        lines = capfd.readouterr().err.splitlines()
        if isinstance(exit_.value.code, str):  # what the interpreter prints as it exits with code 1
            lines += exit_.value.code.splitlines()
        else:
            assert exit_.value.code not in (None, 0)
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{script}.py: error: ")
        assert files(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture
def baseline(tiny_preset, tiny_network, tmp_path):
    """The path of a baseline that was never trained, where the scripts look for it."""
    return write_model(tmp_path / "checkpoints" / "quick.safetensors", tiny_network)


def started(*arguments):
    return start(script_parser("").parse_args(list(arguments)))


def write_model(path, network):
    metadata = {"label": "Baseline (FP32)", "preset": "quick", "training": {}, "digits_seen": 0}
    save_model(path, full_precision(network.config, network.state_dict(), metadata))
    return path


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--format", "int1"),
        ("--format", "fp32"),
        ("--images", "0"),
        ("--images", "-5"),
        ("--images", "many"),
        ("--images", "1.5"),
        ("--steps", "0"),
        ("--steps", "-1"),
        ("--batch-size", "0"),
        ("--batch-size", "-2"),
        ("--seed", "one"),
        ("--preset", "huge"),
        ("--sampler", "euler"),
        ("--metric", "clip"),
        ("--precision", "fp8"),
        ("--timestep-weighting", "2"),
        ("--fisher-timestep", "2"),
        ("--images", "1_0"),
        ("--images", "٣"),
        ("--images", "99999999999999999999"),
        ("--images", " 300"),
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--seed", "18446744073709551616"),  # seeds key a generator of 64 bits
        ("--eta", "-0.1"),
        ("--eta", "1.5"),
        ("--eta", "nan"),
        ("--eta", "0_1"),
        ("--out", ""),
        ("--checkpoint", ""),
        ("--out", "two\nlines"),
        ("--out", "\udcff"),  # a byte that is no text
    ],
)
def test_option_out_of_its_values(refused, option, value):
    message = refused("layer_ratio", option, value)
    assert f"argument {option}" in message and (value in message or repr(value) in message)


def test_unknown_option(refused):
    assert "--thresold" in refused("layer_ratio", "--thresold", "1")
    assert "--thresh" in refused("layer_ratio", "--thresh", "1")  # abbreviations hide typing errors


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "inf", "half"])
@pytest.mark.parametrize(("script", "option"), [("layer_ratio", "--ratio"), ("whole_threshold", "--threshold")])
def test_number_outside_zero_to_one(refused, script, option, value):
    message = refused(script, option, "0.5", value)
    assert f"argument {option}" in message and repr(value) in message and "0..1" in message


@pytest.mark.parametrize("option", ["--alpha", "--k"])
@pytest.mark.parametrize("value", ["-11", "11", "nan", "x"])
def test_math_number_outside_its_range(refused, option, value):
    message = refused("layer_math", option, value)
    assert f"argument {option}" in message and repr(value) in message and "..10" in message


def test_math_takes_either_alpha_or_k(refused):
    message = refused("layer_math", "--alpha", "0.5", "--k", "1")
    assert "--k" in message and "--alpha" in message


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("12/3457", "layer '7'"),
        ("1-2/3456", "layer '-'"),
        ("12/345", "lacks layer 6"),
        ("12/3/6", "lacks layer 4, 5"),
        ("12/23456", "layer 2 twice"),
        ("12//3456", "empty group"),
    ],
)
def test_groups(refused, groups, said):
    message = refused("layer_group", "--groups", "12/3456", groups)
    assert "argument --groups" in message and repr(groups) in message and said in message


def test_a_folder_of_images_goes_with_a_model(refused):
    message = refused("layer_ratio", "--preset", "quick", "--data", "cifar")
    assert "--data cifar" in message and "--model" in message and "mnist5k" in message


def test_more_steps_than_timesteps(refused):
    message = refused("layer_ratio", "--preset", "quick", "--device", "cpu", "--steps", "1001")
    assert "--steps 1001" in message and "1000 timesteps" in message


@pytest.mark.parametrize("steps", ["50", "999", "1001"])
def test_ddpm_with_other_steps(refused, steps):
    message = refused("layer_ratio", "--preset", "quick", "--device", "cpu", "--sampler", "ddpm", "--steps", steps)
    assert f"--steps {steps}" in message and "--sampler ddpm" in message


def test_eta_with_ddpm(refused):
    message = refused("simplediffusion", "--preset", "quick", "--device", "cpu", "--sampler", "ddpm", "--eta", "0.5")
    assert "--eta 0.5" in message and "--sampler ddim" in message


# Devices


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_absent(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("layer_ratio", "--preset", "quick", "--device", device)
    assert f"--device {device}" in message and "--device cpu" in message


def test_cuda_device_that_is_absent(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = refused("layer_ratio", "--preset", "quick", "--device", "cuda:2")
    assert "--device cuda:2" in message and "2 CUDA devices" in message


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "", "cpu:1", "cuda:-1"])
def test_unknown_device(refused, device):
    message = refused("layer_ratio", "--preset", "quick", "--device", device)
    assert f"--device {device}" in message and "cpu, cuda or cuda:N" in message


def test_cuda_device_is_the_one_that_was_asked_for(tiny_preset, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index or 0}")
    for device, number in (("cuda:1", 1), ("cuda", 0), (None, 0)):  # torch takes no device without a number
        run = started("--preset", "quick", *(("--device", device) if device else ()))
        assert chosen.pop() == number
        assert (run.device.index or 0, run.sampling.device) == (number, f"cuda GPU {number}")


# Checkpoints

QUICK = ("--preset", "quick", "--device", "cpu")


def test_missing_baseline_names_the_command(refused, tmp_path):
    message = refused("layer_ratio", *QUICK)
    assert f"--checkpoint {tmp_path / 'checkpoints' / 'quick.safetensors'}" in message
    assert "python simplediffusion.py --preset quick" in message


def test_missing_checkpoint_names_the_command(refused):
    message = refused("layer_ratio", *QUICK, "--checkpoint", "absent.safetensors")
    assert "--checkpoint absent.safetensors" in message and "python simplediffusion.py --preset quick" in message


def truncated(content):
    return content[: len(content) // 2]


def truncated_in_its_header(content):
    return content[:40]


def altered(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def altered_in_its_header(content):
    return content.replace(b"digits_seen", b"digits_sawn")


def longer(content):
    return content + b"\0"


def empty(content):
    return b""


def foreign(content):
    import safetensors.torch

    return safetensors.torch.save({"weight": torch.zeros(3)})


def text(content):
    return b"not a checkpoint\n" * 100


@pytest.mark.parametrize("named", [True, False], ids=["preset named", "preset from the file"])
@pytest.mark.parametrize("script", PATHS)
@pytest.mark.parametrize(
    "damage", [truncated, truncated_in_its_header, altered, altered_in_its_header, longer, empty, foreign, text]
)
def test_damaged_checkpoint(refused, baseline, tmp_path, script, damage, named):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(baseline.read_bytes()))
    preset = QUICK if named else ("--device", "cpu")
    assert str(path) in refused(script, *preset, "--checkpoint", path)


def test_damaged_baseline(refused, baseline):
    baseline.write_bytes(altered(baseline.read_bytes()))
    message = refused("layer_ratio", *QUICK)
    assert str(baseline) in message and "altered" in message


@pytest.mark.parametrize("named", [True, False], ids=["preset named", "preset from the file"])
@pytest.mark.parametrize("script", PATHS)
def test_checkpoint_that_is_a_folder(refused, tmp_path, script, named):
    (tmp_path / "folder").mkdir()
    preset = QUICK if named else ("--device", "cpu")
    assert f"--checkpoint {tmp_path / 'folder'}" in refused(script, *preset, "--checkpoint", tmp_path / "folder")


@pytest.mark.parametrize("script", PATHS)
def test_file_of_another_kind(refused, tmp_path, script):
    path = tmp_path / "other.safetensors"
    sealed.save(path, "images", {"images": torch.zeros(1, 32, 32, dtype=torch.uint8)}, {})
    message = refused(script, *QUICK, "--checkpoint", path)
    assert str(path) in message and "not a model file" in message


def test_checkpoint_of_another_architecture(refused, tiny_config, tmp_path):
    other = replace(tiny_config, channels=(6, 12, 24, 48, 48, 36))
    path = write_model(tmp_path / "other.safetensors", UNet(other))
    message = refused("layer_ratio", *QUICK, "--checkpoint", path)
    assert f"--checkpoint {path}" in message and "another architecture" in message and "--preset" in message
    assert "36" in message and "24" in message


def test_checkpoint_of_another_preset(refused, baseline):
    message = refused("layer_ratio", "--preset", "paper", "--device", "cpu", "--checkpoint", baseline)
    assert f"--checkpoint {baseline}" in message and "another architecture" in message and "--preset" in message


def test_checkpoint_of_an_unknown_preset(refused, tiny_network, tmp_path):
    path = tmp_path / "other.safetensors"
    metadata = {"label": "Baseline (FP32)", "preset": "huge"}
    save_model(path, full_precision(tiny_network.config, tiny_network.state_dict(), metadata))
    message = refused("layer_ratio", "--device", "cpu", "--checkpoint", path)
    assert str(path) in message and "huge" in message and "--preset" in message


@pytest.mark.parametrize("fmt", ["fp16", "int4"])
def test_quantized_checkpoint_given_to_a_strategy(refused, tiny_network, tmp_path, fmt):
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {"preset": "quick"})
    path = tmp_path / "packed.safetensors"
    save_model(path, model.quantize(layer_weights(model.state), fmt, {"label": "Uniform"}))
    message = refused("layer_ratio", *QUICK, "--checkpoint", path)
    assert f"--checkpoint {path}" in message and "quantized already" in message
    assert str(tmp_path / "checkpoints" / "quick.safetensors") in message


# Fisher values, data, features


@pytest.mark.parametrize("script", PATHS)
def test_fisher_values_of_other_weights(refused, baseline, tmp_path, script):
    weights = load_model(baseline).sha256
    path = Path("results/quick") / f"fisher-{weights[:12]}.safetensors"
    ones = torch.ones(1, 1, dtype=torch.float64)
    table = information.FisherTable(["a"], [1], ones, 2 * ones, ones.new_zeros(1, 0, 0), [1], {}, "b" * 64, [])
    information.save(path, table)
    kept = path.read_bytes()
    # Statistics of the digits may be kept by then: let them be there already.
    make_evaluator(started(*QUICK))
    message = refused(script, *QUICK)
    assert str(path) in message and "other weights" in message and "delete it" in message
    assert path.read_bytes() == kept


def test_mnist_that_is_not_reachable(refused, baseline, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    message = refused("layer_ratio", *QUICK, "--data", "mnist", "--data-dir", "digits")
    assert "--data mnist" in message and "--data-dir digits" in message and "--data mnist5k" in message


def test_mnist_is_downloaded_again_after_a_failure(refused, baseline, monkeypatch):
    asked = []

    def unreachable(request, *_, **__):
        asked.append(request)
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    refused("layer_ratio", *QUICK, "--data", "mnist", "--data-dir", "digits")
    once = len(asked)
    assert once > 0
    refused("layer_ratio", *QUICK, "--data", "mnist", "--data-dir", "digits")
    assert len(asked) == 2 * once


def test_mnist_below_a_file(refused, baseline, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("layer_ratio", *QUICK, "--data", "mnist", "--data-dir", tmp_path / "file")
    assert f"--data-dir {tmp_path / 'file'}" in message and "--data mnist5k" in message


def test_inception_weights_that_are_not_reachable(refused, baseline, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    message = refused("layer_ratio", *QUICK, "--metric", "inception", "--images", "3000")
    assert "--metric inception" in message and "--inception-weights" in message and "--metric mnist" in message


def test_inception_weights_that_are_not_there(refused, baseline):
    message = refused("layer_ratio", *QUICK, "--metric", "inception", "--inception-weights", "absent.pth")
    assert "--inception-weights absent.pth" in message


def test_inception_weights_without_their_metric(refused, baseline):
    message = refused("layer_ratio", *QUICK, "--inception-weights", "weights.pth")
    assert "--inception-weights weights.pth" in message and "--metric inception" in message


def test_too_few_images_for_the_features(refused, baseline):
    message = refused("layer_ratio", *QUICK, "--images", "256")
    assert "256 images" in message and "at least 257" in message and "--images" in message


def test_too_few_images_are_refused_before_training(refused, tmp_path):
    assert "--images" in refused("simplediffusion", *QUICK, "--images", "256")
    assert not (tmp_path / "checkpoints").exists()


# Output


@pytest.mark.parametrize("below", [".", "results"])
def test_out_that_cannot_be_written(refused, baseline, tmp_path, below):
    # A path at or below a regular file: even root cannot make a folder there.
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / below
    message = refused("layer_ratio", *QUICK, "--out", out)
    assert f"--out {out}" in message and "name another folder" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_without_permission(refused, baseline, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    message = refused("layer_ratio", *QUICK, "--out", tmp_path / "closed")
    assert f"--out {tmp_path / 'closed'}" in message and "Permission denied" in message


def test_out_without_space(refused, baseline, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refused("layer_ratio", *QUICK, "--out", "elsewhere")
    assert "--out elsewhere" in message and "3 MiB free" in message


def test_disk_that_fills_up_on_the_way(refused, baseline, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("common.runtime.files.tempfile.mkstemp", full)
    message = refused("layer_ratio", *QUICK)
    assert "cannot be written (No space left on device); free some space" in message and "results/" in message


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_checkpoint_that_cannot_be_written(refused, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    path = tmp_path / below / "new.safetensors"
    make_evaluator(started(*QUICK))
    message = refused("simplediffusion", *QUICK, "--checkpoint", path, "--retrain")
    assert "--checkpoint" in message and str(path.parent) in message and "--out" not in message


@pytest.mark.parametrize("option", ["--training-steps", "--training-seed", "--keep-every"])
def test_options_of_training_for_a_network_that_is_trained(refused, baseline, option):
    message = refused("simplediffusion", *QUICK, option, "3")
    assert f"{option} 3" in message and "quick.safetensors" in message and "--retrain" in message


def test_learning_curve_of_which_nothing_was_kept(refused, baseline):
    message = refused("learning-curve", *QUICK, main=learning_curve.main)
    assert "quick.after-*.safetensors" in message and "--keep-every" in message


def test_loss_that_is_not_finite(refused, tiny_preset, tmp_path, monkeypatch):
    preset = replace(tiny_preset, training=replace(tiny_preset.training, lr=1e30))
    monkeypatch.setitem(PRESETS, "quick", preset)
    make_evaluator(started(*QUICK))
    monkeypatch.setattr("common.training.loop.tqdm", lambda steps, **_: steps)  # its bar goes to stderr as well
    message = refused("simplediffusion", *QUICK)
    assert "the loss is not finite at step" in message and "learning rate" in message
    assert not list(tmp_path.rglob("quick*.safetensors"))


# Tables and folders


def test_report_without_rows(refused):
    message = refused("report", "--out", "absent", main=report.main)
    assert str(Path("absent/results.jsonl")) in message and "python simplediffusion.py" in message


@pytest.mark.parametrize("content", [b'{"label": "Base', b"text", b"\xff\xfe", b"7", b"{}", b'{"label": "Base"}'])
def test_report_of_damaged_or_foreign_rows(refused, tmp_path, content):
    (tmp_path / "results.jsonl").write_bytes(content + b"\n")
    message = refused("report", "--out", tmp_path, main=report.main)
    assert str(tmp_path / "results.jsonl") in message and "damaged" in message


@pytest.mark.parametrize("script", PATHS)
def test_damaged_rows_are_found_before_any_work(refused, baseline, monkeypatch, script):
    Path("results/quick").mkdir(parents=True)
    Path("results/quick/results.jsonl").write_text('{"label": "Base\n')
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("sampled before the rows were read"))
    assert "damaged" in refused(script, *QUICK)


def test_metrics_of_a_folder_that_is_absent(refused):
    assert "absent: no such folder" in refused("metrics", "absent", main=score_folder.main)


# Whole processes


def run_process(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [["--help"], ["--images", "0"]])
def test_options_answer_without_torch(script, arguments, tmp_path):
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script) + '.py'!r}, run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    print(exit.code, sorted({'torch', 'numpy', 'torchvision', 'matplotlib', 'scipy'} & sys.modules.keys()))\n"
    )
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {[script + '.py', *arguments]!r}\n"
    process = run_process("-c", start + code, cwd=tmp_path)
    assert process.stdout.splitlines()[-1] == ("0 []" if arguments == ["--help"] else "2 []")
    assert len(process.stderr.splitlines()) == (0 if arguments == ["--help"] else 1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_shared_options_and_defaults(script, tmp_path):
    shown = " ".join(run_process(ROOT / f"{script}.py", "--help", cwd=tmp_path).stdout.split())
    own = {"simplediffusion": ["--format", "--baseline"], "layer_budget": ["--timestep-weighting"]}
    for option in SHARED + own.get(script, ["--format", "--timestep-weighting"]):
        assert re.search(rf"{option}(?![\w-])", shown), option
    assert f"python {script}.py" in shown
    for option, default in [("--data-dir", "data"), ("--seed", "0"), ("--seeds", "1")]:
        own = shown.split(f" {option} ")[-1].split(" --")[0]
        assert f"(default: {default})" in own, option


def test_process_fails_with_one_line(tmp_path):
    process = run_process(
        ROOT / "layer_ratio.py", *QUICK, "--checkpoint", "absent.safetensors", "--out", "out", cwd=tmp_path
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("layer_ratio.py: error: --checkpoint absent.safetensors: no such file")
    assert not files(tmp_path)


@pytest.mark.parametrize("module", ["report", "metrics", "sensitivity", "timesteps", "learning_curve", "features"])
def test_the_old_place_of_a_tool_says_what_to_type(module, tmp_path):
    run = f"runpy.run_module('common.{module}', run_name='__main__')"
    process = run_process("-c", f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); {run}", cwd=tmp_path)
    command = module.replace("_", "-")
    assert process.returncode == 1
    assert process.stderr == f"python -m common.{module}: error: type instead: python -m common {command}\n"


def test_a_baseline_that_does_not_say_what_it_saw(refused, tiny_network, tmp_path):
    path = tmp_path / "silent.safetensors"
    metadata = {"label": "Baseline (FP32)", "preset": "quick"}
    save_model(path, full_precision(tiny_network.config, tiny_network.state_dict(), metadata))
    message = refused("layer_ratio", *QUICK, "--checkpoint", path)
    assert f"--checkpoint {path}" in message and "how many digits" in message


def test_an_option_that_is_given_twice(refused):
    assert "argument --ratio: is given 2 times" in refused("layer_ratio", "--ratio", "0.1", "--ratio", "0.2")


def test_training_replaces_no_model_but_ones_own(refused, baseline, tiny_network, tmp_path, monkeypatch):
    packed, foreign = tmp_path / "packed.safetensors", tmp_path / "notes.txt"
    model = load_model(baseline)
    save_model(packed, model.quantize(layer_weights(model.state), "int4", {"label": "Uniform", "strategy": "Uniform"}))
    foreign.write_text("kept")
    make_evaluator(started(*QUICK))
    for path, said in ((packed, "quantized model"), (foreign, "not a baseline"), (tmp_path, "not a file")):
        message = refused("simplediffusion", *QUICK, "--retrain", "--checkpoint", path)
        assert f"--checkpoint {path}" in message and said in message
    monkeypatch.setattr("common.study.baselines.SHIPPED", (model.sha256[:8],))
    message = refused("simplediffusion", *QUICK, "--retrain")
    assert "--checkpoint FILE" in message and "comes with the software" in message


def test_packed_file_of_another_baseline(refused, baseline, tmp_path):
    packed = tmp_path / "packed.safetensors"
    metadata = {"label": "Uniform", "strategy": "Uniform", "baseline": "b" * 64}
    save_model(packed, load_model(baseline).quantize([], "int4", metadata))
    message = refused("simplediffusion", *QUICK, "--checkpoint", packed, "--baseline", baseline)
    assert f"--baseline {baseline}" in message and "bbbbbbbb" in message


def test_the_traceback_is_shown_where_it_is_asked_for(tiny_preset, monkeypatch, capfd):
    import layer_ratio

    monkeypatch.setattr(sys, "argv", ["layer_ratio.py", *QUICK, "--checkpoint", "absent", "--debug"])
    with pytest.raises(SystemExit, match="absent: no such file"):
        run_main(layer_ratio.main)
    assert "Traceback" in capfd.readouterr().err
