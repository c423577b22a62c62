"""Fisher information against closed forms and against one backward pass for each sample."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.ddpm.architecture import schedule_of
from common.ddpm.digits import typical_variance
from common.ddpm.schedule import Schedule, denoising_loss
from common.ddpm.unet import UNet
from common.errors import UserError
from common.fisher import gradients, information
from common.fisher.gradients import squared_gradients
from common.fisher.information import FisherTable, fisher_information
from common.formats.packed import full_precision
from common.options import script_parser
from common.runtime import sealed
from common.runtime.sealed import CheckpointError
from common.study import diffusion_fisher
from common.study.run import start


def one_backward_per_sample(network, loss, samples):
    """{name: float64 (N,)}: the mean over entries of the squared gradient, by N separate backward passes."""
    values = {name: [] for name, _ in network.named_parameters()}
    for n in range(len(samples[0])):
        network.zero_grad()
        loss(network, *(s[n : n + 1] for s in samples)).sum().backward()
        for name, parameter in network.named_parameters():
            values[name].append(float(parameter.grad.double().square().mean()))
    return {name: np.array(v) for name, v in values.items()}


def squared_loss(network, x, y):
    return (network(x).squeeze(1) - y).square()


def regression(n, dimensions=5):
    generator = torch.Generator().manual_seed(1)
    network = nn.Linear(dimensions, 1)
    with torch.no_grad():
        network.weight.copy_(torch.randn(1, dimensions, generator=generator))
        network.bias.fill_(0.3)
    return network, (torch.randn(n, dimensions, generator=generator), torch.randn(n, generator=generator))


def test_linear_model_equals_the_closed_form():
    network, (x, y) = regression(37)
    mean, error = fisher_information(network, squared_loss, (x, y))
    xs, ys = x.double().numpy(), y.double().numpy()
    weight, bias = (p.detach().double().numpy().ravel() for p in network.parameters())
    residual = xs @ weight + bias - ys
    closed = {
        "weight": (2 * residual[:, None] * xs) ** 2,  # (d/dw)(w.x + b - y)^2 = 2 (w.x + b - y) x
        "bias": (2 * residual[:, None]) ** 2,
    }
    assert mean.keys() == error.keys() == closed.keys()
    for name, squared in closed.items():
        per_sample = squared.mean(1)
        assert mean[name] == pytest.approx(per_sample.mean(), rel=1e-5)
        assert error[name] == pytest.approx(per_sample.std(ddof=1) / np.sqrt(37), rel=1e-4)


def test_gradients_that_cancel_still_count():
    # w = b = 0, x = 1, y = +1 and -1: the gradients are -2 and +2, their average 0, the mean of their squares 4.
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    mean, error = fisher_information(network, squared_loss, (torch.ones(2, 1), torch.tensor([1.0, -1.0])))
    assert mean == {"weight": 4.0, "bias": 4.0}
    assert error == {"weight": 0.0, "bias": 0.0}


def diffusion_samples(n):
    generator = torch.Generator().manual_seed(2)
    x0 = torch.rand(n, 1, 32, 32, generator=generator) * 2 - 1
    return x0, torch.tensor([1, 400, 999, 25])[:n], torch.randn(n, 1, 32, 32, generator=generator)


def diffusion_loss(network, x0, t, noise):
    return denoising_loss(network, Schedule(), x0, t, noise)


def test_unet_equals_one_backward_per_sample(tiny_network):
    samples = diffusion_samples(4)
    expected = one_backward_per_sample(tiny_network, diffusion_loss, samples)
    measured = squared_gradients(tiny_network, diffusion_loss, samples)
    assert measured.keys() == expected.keys()
    for name, values in measured.items():
        assert values.shape == (4,)
        np.testing.assert_allclose(values.numpy(), expected[name], rtol=2e-4, err_msg=name)
        assert (expected[name] > 0).all(), name


def test_unet_differs_from_the_squared_batch_gradient(tiny_network):
    samples = diffusion_samples(4)
    mean, _ = fisher_information(tiny_network, diffusion_loss, samples)
    tiny_network.zero_grad()
    diffusion_loss(tiny_network, *samples).mean().backward()
    for name, parameter in tiny_network.named_parameters():
        # The square of an average never exceeds the average of the squares.
        assert float(parameter.grad.square().mean()) < 0.999 * mean[name], name


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x.flatten(1)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))


class Borrowed(nn.Module):
    """A layer whose weight is also used without calling it, as in an autoencoder that decodes with the transpose."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(12, 7), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.linear(torch.tanh(self.layer(x.flatten(1))), self.layer.weight.T))


class Merged(nn.Module):
    """A layer that sees the places of all samples in one dimension."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(16, 5)

    def forward(self, x):
        rows = x.reshape(-1, 3)  # (N * 4, 3)
        return self.head(torch.tanh(self.layer(rows)).reshape(len(x), -1))


class PlacesFirst(nn.Module):
    """A layer that sees samples in the second dimension."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.reshape(len(x), 4, 3).transpose(0, 1))).mean(0))


class Bare(nn.Module):
    """Parameters that belong to no layer, beside one that does."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(12)), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(x.flatten(1) * self.scale)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def normalised():
    network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    nn.init.normal_(network[1].running_mean)
    return network


def padded():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding="same"), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        nn.LayerNorm([3, 4, 3]), nn.PReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def normalised_vectors():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    "build", [convolutions, normalised, normalised_vectors, padded, Twice, Tied, Borrowed, Merged, PlacesFirst, Bare]
)
def test_any_module_and_loss(build):
    torch.manual_seed(3)
    samples = torch.randn(7, 1, 4, 3), torch.randint(5, (7,))
    network = build().eval()
    network(samples[0])  # sets the widths of the lazy layers

    def loss(call, x, label):
        return F.cross_entropy(call(x), label, reduction="none")

    mean, error = fisher_information(network, loss, samples, chunk=3)
    expected = one_backward_per_sample(network, loss, samples)
    assert mean.keys() == expected.keys()
    for name, values in expected.items():
        assert values.mean() > 0
        assert mean[name] == pytest.approx(values.mean(), rel=1e-4), name
        assert error[name] == pytest.approx(values.std(ddof=1) / np.sqrt(7), rel=1e-3), name


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 24, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1),
        nn.ConvTranspose2d(16, 24, 3, stride=2, padding=1, output_padding=1),
    ],
    ids=["same", "uneven", "up", "output padding"],
)
def test_squared_norms_equal_those_of_the_gradients(layer):
    torch.manual_seed(4)
    x = torch.randn(3, 16, 4, 5)
    g = torch.randn_like(layer(x))
    expected = []
    for n in range(3):
        (gradient,) = torch.autograd.grad((layer(x[n : n + 1]) * g[n : n + 1]).sum(), [layer.weight])
        expected.append(float(gradient.double().square().sum()))
    np.testing.assert_allclose(gradients._squared_norms(layer, x, g).detach().numpy(), expected, rtol=1e-5)


def test_layer_that_the_loss_does_not_reach_has_no_information():
    network = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    samples = torch.randn(4, 3), torch.randn(4)
    mean, error = fisher_information(network, lambda _, x, y: squared_loss(network["used"], x, y), samples)
    assert mean["unused.weight"] == mean["unused.bias"] == error["unused.weight"] == 0.0
    assert mean["used.weight"] > 0


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_independent_of_the_chunk(chunk):
    network, samples = regression(37)
    counted = []
    mean, error = fisher_information(network, squared_loss, samples, chunk=chunk, on_chunk=counted.append)
    reference_mean, reference_error = fisher_information(network, squared_loss, samples, chunk=37)
    assert mean == pytest.approx(reference_mean, rel=1e-6)
    assert error == pytest.approx(reference_error, rel=1e-5)
    assert sum(counted) == 37 and max(counted) == min(chunk, 37)


def test_network_is_left_as_it_was(tiny_network):
    before = sealed.hash_tensors(tiny_network.state_dict())
    frozen = tiny_network.late_conv.bias.requires_grad_(False)
    mean, _ = fisher_information(tiny_network, diffusion_loss, diffusion_samples(2))
    assert mean["late_conv.bias"] > 0
    assert sealed.hash_tensors(tiny_network.state_dict()) == before
    for parameter in tiny_network.parameters():
        assert parameter.grad is None and parameter.requires_grad == (parameter is not frozen)
    assert not any(module._forward_hooks for module in tiny_network.modules())


def small_table(weights="a" * 64):
    return FisherTable(
        names=["a", "b", "c"],
        timesteps=[1, 25, 75],
        values=torch.tensor([[8.0, 2.0, 100.0], [1.0, 6.0, 50.0], [3.0, 4.0, 70.0]], dtype=torch.float64),
        errors=torch.full((3, 3), 0.5, dtype=torch.float64),
        covariance=torch.tensor([[0.25, 0.15], [0.15, 0.25]], dtype=torch.float64).expand(3, 2, 2),
        samples=[4, 2, 2],
        settings={"data": "mnist5k", "grid": [25, 75]},
        weights=weights,
        image_weights=[3.0, 1.0],
    )


def test_table_at_the_first_timestep_is_divided_by_the_largest_of_the_named():
    table = small_table()
    assert table.at("first", ["a", "b"]) == {"a": 1.0, "b": 0.25}
    assert table.at("first", ["a", "b", "c"]) == {"a": 0.08, "b": 0.02, "c": 1.0}


def test_uniform_table_is_the_mean_over_the_grid():
    # Means over timesteps 25 and 75: a 2, b 5. Timestep 1 is not of the grid.
    assert small_table().at("uniform", ["a", "b"]) == {"a": 0.4, "b": 1.0}
    # (0.25 + 0.25 + 2 * 0.15) / 4
    assert small_table().estimates("uniform")[1].tolist() == pytest.approx([0.2**0.5] * 3)


def test_table_by_weight_in_the_image():
    # 3 parts of timestep 25 and 1 of timestep 75.
    table = small_table()
    values, errors = table.estimates("image")
    assert torch.allclose(values, (3 * table.values[1] + table.values[2]) / 4)
    variance = (9 * 0.25 + 0.25 + 2 * 3 * 0.15) / 16
    assert errors.tolist() == pytest.approx([variance**0.5] * 3)


def test_errors_of_means_over_timesteps_count_that_digits_are_the_same():
    # Each of 40 digits has a share that is its own at both timesteps: correlation 0.8. The mean lies within one error
    # of the truth in 68% of draws; taken as independent the timesteps would give 58%.
    generator, covered, as_independent, draws = torch.Generator().manual_seed(0), 0, 0, 1000
    own = torch.randn(draws, 1, 40, 1, generator=generator, dtype=torch.float64)
    apart = torch.randn(draws, 2, 40, 1, generator=generator, dtype=torch.float64)
    for values in 10 + 0.8**0.5 * own + 0.2**0.5 * apart:  # (timesteps, digits, parameters)
        means, covariance = values.mean(1), information.covariance_of_means(values)
        table = replace(small_table(), names=["a"], values=torch.cat([means[:1], means]), covariance=covariance)
        (value,), (error,) = table.estimates("uniform")
        covered += abs(value - 10) < error
        as_independent += abs(value - 10) < covariance[0].trace().sqrt() / 2
    assert 0.64 < covered / draws < 0.72
    assert as_independent / draws < 0.60


def test_table_round_trip(tmp_path):
    table = small_table()
    information.save(tmp_path / "f.safetensors", table)
    loaded = information.load(tmp_path / "f.safetensors", table.weights)
    assert torch.equal(loaded.values, table.values) and torch.equal(loaded.errors, table.errors)
    assert torch.equal(loaded.covariance, table.covariance)
    for field in ("names", "timesteps", "samples", "settings", "weights", "image_weights"):
        assert getattr(loaded, field) == getattr(table, field)


def test_a_table_of_zeros_or_nan_is_said_in_one_line():
    zeros = replace(small_table(), values=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(UserError, match="all Fisher values are zero"):
        zeros.at("image", ["a", "b"])
    network, (x, y) = regression(4)
    for loss, message in (
        (lambda call, x, y: call(x).squeeze(1) * 0, "all Fisher values are zero"),
        (lambda call, x, y: (y - 1).square(), "all Fisher values are zero"),  # which has no graph at all
        (lambda call, x, y: call(x).squeeze(1) * torch.inf, "the Fisher value of weight is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            information.measure(network, loss, [(1, (x, y))], "w" * 64, {}, [])


def test_bfloat16_weights_have_fisher_values():
    network, (x, y) = regression(8)
    expected, _ = fisher_information(network, squared_loss, (x, y))
    measured, _ = fisher_information(network.bfloat16(), squared_loss, (x.bfloat16(), y.bfloat16()))
    assert measured == pytest.approx(expected, rel=0.05)


def test_table_of_other_weights_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    information.save(path, small_table("a" * 64))
    with pytest.raises(UserError) as error:
        information.load(path, "b" * 64)
    assert str(path) in str(error.value) and "other weights" in str(error.value) and "delete it" in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"names": ["a", "b"]}, "one for each timestep and name"),
        ({"names": ["a", "b", "b"]}, "not names"),
        ({"names": ["a", "b", ["c"]]}, "not names"),
        ({"timesteps": [1, 25]}, "not of one length"),
        ({"timesteps": [1, 25, "75"]}, "not whole numbers"),
        ({"samples": [4, 2]}, "not of one length"),
        ({"samples": {"4": 2}}, "entry samples is not of type list"),
        ({"image_weights": [1.0]}, "not of one length"),
        ({"image_weights": [1.0, float("nan")]}, "not positive numbers"),
        ({"values": torch.full((3, 3), float("nan"), dtype=torch.float64)}, "not finite"),
        ({"values": torch.zeros(3, 3, dtype=torch.float64)}, "all zero"),
        ({"errors": -torch.ones(3, 3, dtype=torch.float64)}, "negative"),
        ({"errors": torch.ones(3, 2, dtype=torch.float64)}, "one for each timestep and name"),
        ({"errors": torch.ones(3, 3)}, "tensor errors is torch.float32"),
        ({"covariance": torch.ones(3, 3, 3, dtype=torch.float64)}, "its covariance is not that of"),
        ({"covariance": torch.full((3, 2, 2), torch.inf, dtype=torch.float64)}, "its covariance is not finite"),
        ({"covariance": -torch.ones(3, 2, 2, dtype=torch.float64)}, "variances are negative"),
        ({"weights": 1}, "entry weights is not of type str"),
        ({"settings": []}, "entry settings is not of type dict"),
    ],
)
def test_a_table_that_is_wrong_inside_is_refused(tmp_path, change, reason):
    path = tmp_path / "f.safetensors"
    information.save(path, replace(small_table(), **change))
    with pytest.raises(CheckpointError, match=rf"f\.safetensors is damaged.*{reason}.*; delete it"):
        information.load(path, "a" * 64)


def test_a_table_that_lacks_an_entry_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    information.save(path, small_table())
    tensors, metadata = sealed.load(path, "fisher")
    former = {"values": tensors["values"], "errors": tensors["errors"]}  # until covariances were kept
    for lacking in ({"values": tensors["values"]}, metadata), (former, metadata), (tensors, {"weights": "a" * 64}):
        sealed.save(path, "fisher", *lacking)
        with pytest.raises(CheckpointError, match=r"is missing.*; delete it"):
            information.load(path, "a" * 64)


def test_measure_fills_a_row_for_each_timestep():
    network, (x, y) = regression(12)
    table = information.measure(network, squared_loss, [(1, (x[:5], y[:5])), (1, (x, y))], "w" * 64, {}, [1.0])
    assert (table.names, table.timesteps, table.samples) == (["weight", "bias"], [1, 1], [5, 12])  # as of few timesteps
    for row, n in enumerate((5, 12)):
        mean, error = fisher_information(network, squared_loss, (x[:n], y[:n]))
        assert table.values[row].tolist() == [mean["weight"], mean["bias"]]
        assert table.errors[row].tolist() == [error["weight"], error["bias"]]
    assert table.estimates("uniform")[1].tolist() == pytest.approx(table.errors[1].tolist())  # of a grid of one


@pytest.fixture
def run_and_model(tiny_preset, tiny_network, monkeypatch):
    monkeypatch.setattr(diffusion_fisher, "FISHER_GRID", 2)
    options = script_parser("").parse_args(["--preset", "quick", "--device", "cpu"])
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"})
    return start(options), model


def forbid_measuring(monkeypatch):
    def measure(*_):
        raise AssertionError("measured although a fitting table exists")

    monkeypatch.setattr(information, "measure", measure)


def test_fisher_table_is_measured_once_and_reused(run_and_model, monkeypatch):
    run, model = run_and_model
    monkeypatch.setattr(diffusion_fisher, "FISHER_GRID", 20)
    table = diffusion_fisher.fisher_table(run, model)
    assert table.weights == model.sha256 and table.names == list(model.state)
    assert table.timesteps == [1, *range(25, 1000, 50)]  # the centres of 20 equal parts of 0..999
    assert table.samples == [run.preset.fisher_digits] + [run.preset.fisher_grid_digits] * 20
    assert (table.values > 0).all() and (table.errors > 0).all()

    forbid_measuring(monkeypatch)
    again = diffusion_fisher.fisher_table(run, model)
    assert torch.equal(again.values, table.values) and torch.equal(again.errors, table.errors)
    assert again.settings == table.settings


def test_timesteps_of_a_kept_fisher_table_weigh_as_those_of_a_new_one(run_and_model):
    """Also of a file that was written when they weighed otherwise."""
    run, model = run_and_model
    table = diffusion_fisher.fisher_table(run, model)
    (path,) = run.out.glob("fisher-*.safetensors")
    information.save(path, replace(table, image_weights=[1.0] * len(table.image_weights)))
    assert diffusion_fisher.fisher_table(run, model).image_weights == table.image_weights
    variance = typical_variance(run.load_images("train"))
    assert variance > 2
    assert table.image_weights == schedule_of(model.config, "cpu").image_weights(table.timesteps[1:], variance)


def test_fisher_table_that_is_missing_is_measured_to_the_same_values(run_and_model):
    run, model = run_and_model
    table = diffusion_fisher.fisher_table(run, model)
    (path,) = run.out.glob("fisher-*.safetensors")
    content = path.read_bytes()
    path.unlink()
    assert torch.equal(diffusion_fisher.fisher_table(run, model).values, table.values)
    assert path.read_bytes() == content


def test_fisher_table_of_other_settings_is_measured_anew(run_and_model):
    run, model = run_and_model
    diffusion_fisher.fisher_table(run, model)
    more = replace(run, preset=replace(run.preset, fisher_digits=6))
    assert diffusion_fisher.fisher_table(more, model).samples[0] == 6


def test_a_damaged_fisher_table_is_named_and_measured_anew(run_and_model, capsys):
    run, model = run_and_model
    diffusion_fisher.fisher_table(run, model)
    (path,) = run.out.glob("fisher-*.safetensors")
    content = path.read_bytes()
    capsys.readouterr()
    for damaged in (content[:-1], b"no table"):
        path.write_bytes(damaged)
        diffusion_fisher.fisher_table(run, model)
        (line,) = capsys.readouterr().out.splitlines()
        assert str(path) in line and line.endswith("Fisher values are measured anew")
        assert path.read_bytes() == content


def test_fisher_table_belongs_to_its_weights(run_and_model, tiny_config):
    run, model = run_and_model
    torch.manual_seed(5)
    other = full_precision(tiny_config, UNet(tiny_config).state_dict(), {})
    table, other_table = diffusion_fisher.fisher_table(run, model), diffusion_fisher.fisher_table(run, other)
    assert len(list(run.out.glob("fisher-*.safetensors"))) == 2
    assert not torch.equal(table.values, other_table.values)


def test_fisher_table_of_other_weights_under_the_expected_name_is_an_error(run_and_model, monkeypatch):
    run, model = run_and_model
    path = run.out / f"fisher-{model.sha256[:12]}.safetensors"
    information.save(path, small_table("b" * 64))
    content = path.read_bytes()
    forbid_measuring(monkeypatch)
    with pytest.raises(UserError, match="other weights"):
        diffusion_fisher.fisher_table(run, model)
    assert path.read_bytes() == content


def test_fisher_table_measures_the_model_at_hand(run_and_model, monkeypatch):
    # Data, true noise and weights reach the loss: the values equal a loop over what was handed to it.
    run, model = run_and_model
    seen = {}
    measure = information.measure

    def spy(network, loss, batches, *rest):
        seen.update(network=network, loss=loss, batches=batches)
        return measure(network, loss, batches, *rest)

    monkeypatch.setattr(information, "measure", spy)
    table = diffusion_fisher.fisher_table(run, model)
    network, (x0, t, noise) = seen["network"], seen["batches"][0][1]
    assert not network.training
    assert sealed.hash_tensors(network.state_dict()) == model.sha256
    assert x0.min() == -1 and x0.max() == 1 and t.tolist() == [1] * len(x0)
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    expected = one_backward_per_sample(network, diffusion_loss, (x0, t, noise))
    for i, name in enumerate(table.names):
        assert float(table.values[0, i]) == pytest.approx(expected[name].mean(), rel=2e-4), name
