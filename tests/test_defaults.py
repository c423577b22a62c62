"""What --help says of defaults that depend on other options; and that each command has a --help."""

import sys
from importlib import import_module

import pytest

from common.__main__ import COMMANDS
from common.presets import PRESETS
from common.study import run
from common.study.run import choose_method, metric_of_images


@pytest.mark.parametrize(
    ("preset", "given", "method"),
    [
        ("quick", (None, None, None), ("dpm++", 20, 1.0)),
        ("quick", (None, None, 0.5), ("ddim", 20, 0.5)),
        ("quick", ("ddim", 7, None), ("ddim", 7, PRESETS["quick"].eta)),
        ("quick", ("ddpm", None, None), ("ddpm", 1000, 1.0)),
        ("paper", (None, None, None), ("ddpm", 1000, 1.0)),
        ("paper", (None, 20, None), ("dpm++", 20, 1.0)),
        ("paper", (None, 20, 0.0), ("ddim", 20, 0.0)),
    ],
)
def test_the_sampler_follows_from_what_is_given(preset, given, method):
    assert choose_method(*given, PRESETS[preset]) == method


def test_inception_is_the_metric_of_many_images_where_its_weights_are(monkeypatch, tmp_path):
    weights = tmp_path / "weights.pth"
    monkeypatch.setattr(run, "inception_file", lambda: weights)
    assert metric_of_images(5000, True) == "random"
    weights.touch()
    assert [metric_of_images(*of) for of in ((5000, True), (2048, True), (5000, False))] == [
        "inception", "random", "random",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help(command, monkeypatch, capsys):
    module, _ = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [f"python -m common {command}", "--help"])
    with pytest.raises(SystemExit) as exit_:
        import_module(module).main()
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and f"usage: python -m common {command}" in shown
    assert f"python -m common {command}" in shown.partition("options:")[0].partition("\n\n")[2]  # an example
