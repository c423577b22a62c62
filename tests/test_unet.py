"""The network against the published names and shapes, and against a plain second writing of the published forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from attack_files import limited_memory
from torch import nn

from common.ddpm.unet import UNet, attend, from_published, load_tensors, sinusoidal_embedding
from common.presets import UNetConfig
from common.runtime.device import autocast, cast_weights

PAPER_CHANNELS = (64, 128, 256, 512, 512, 384)
ATTENTION_LAYERS = (2, 6)


def published_shapes(channels=PAPER_CHANNELS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict, and what they would be at other widths."""
    joined = channels[0] + channels[5] // 2
    shapes = {"shallow_conv.weight": (channels[0], 1, 3, 3), "shallow_conv.bias": (channels[0],)}
    shapes |= {"late_conv.weight": (joined // 2, joined, 3, 3), "late_conv.bias": (joined // 2,)}
    shapes |= {"output_conv.weight": (1, joined // 2, 1, 1), "output_conv.bias": (1,)}
    for i, c in enumerate(channels, start=1):
        for block in (f"Layer{i}.ResBlock1", f"Layer{i}.ResBlock2"):
            for part in ("gnorm1", "gnorm2"):
                shapes |= {f"{block}.{part}.weight": (c,), f"{block}.{part}.bias": (c,)}
            for part in ("conv1", "conv2"):
                shapes |= {f"{block}.{part}.weight": (c, c, 3, 3), f"{block}.{part}.bias": (c,)}
        down = i <= 3
        shapes[f"Layer{i}.conv.weight"] = (2 * c, c, 3, 3) if down else (c, c // 2, 4, 4)
        shapes[f"Layer{i}.conv.bias"] = (2 * c,) if down else (c // 2,)
        if i in ATTENTION_LAYERS:
            attention = f"Layer{i}.attention_layer"
            shapes |= {f"{attention}.proj1.weight": (3 * c, c), f"{attention}.proj1.bias": (3 * c,)}
            shapes |= {f"{attention}.proj2.weight": (c, c), f"{attention}.proj2.bias": (c,)}
    return shapes


def random_published(channels, seed=0) -> dict[str, torch.Tensor]:
    """Weights that keep activations near 1 through the whole network, so that no part of it drowns."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(channels).items():
        tensor = torch.randn(shape, generator=generator)
        if "gnorm" in name and name.endswith("weight"):
            state[name] = 1 + 0.3 * tensor
        elif name.endswith("weight"):
            state[name] = tensor / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = 0.3 * tensor
    return state


def published_forward(state, x, t, groups, heads):
    """What was published, one image at a time, from its description; x (N, 1, 32, 32), t (N,)."""
    width = max(state[f"Layer{i}.ResBlock1.gnorm1.weight"].shape[0] for i in range(1, 7))
    return torch.cat(
        [_forward_one(state, image[None], int(step), groups, heads, width) for image, step in zip(x, t, strict=True)]
    )


def _embedding(position, width):
    values = []
    for i in range(width // 2):
        angle = position / 10000 ** (2 * i / width)
        values += [math.sin(angle), math.cos(angle)]
    return torch.tensor(values)


def _residual(state, prefix, x, embedding, groups):
    channels = x.shape[1]
    x = x + embedding[:channels].reshape(1, channels, 1, 1)
    h = x
    for k in (1, 2):
        h = F.group_norm(h, groups, state[f"{prefix}.gnorm{k}.weight"], state[f"{prefix}.gnorm{k}.bias"])
        h = F.conv2d(F.relu(h), state[f"{prefix}.conv{k}.weight"], state[f"{prefix}.conv{k}.bias"], padding=1)
    return x + h


def _attention(state, prefix, x, heads):
    _, channels, height, width = x.shape
    size = channels // heads
    pixels = x[0].reshape(channels, height * width).T  # (L, C)
    projected = pixels @ state[f"{prefix}.proj1.weight"].T + state[f"{prefix}.proj1.bias"]  # (L, 3C)
    joined = torch.zeros(height * width, channels)
    for head in range(heads):
        places = torch.arange(size) * heads * 3 + head * 3  # of this head's queries among the 3C numbers
        q, k, v = (projected[:, places + kind] for kind in range(3))  # (L, C / heads)
        weights = torch.softmax(q @ k.T / math.sqrt(size), dim=1)
        joined[:, torch.arange(size) * heads + head] = weights @ v
    out = joined @ state[f"{prefix}.proj2.weight"].T + state[f"{prefix}.proj2.bias"]
    return out.T.reshape(1, channels, height, width)


def _forward_one(state, x, position, groups, heads, width):
    embedding = _embedding(position, width)
    x = F.conv2d(x, state["shallow_conv.weight"], state["shallow_conv.bias"], padding=1)
    skips = {}
    for i in range(1, 7):
        x = _residual(state, f"Layer{i}.ResBlock1", x, embedding, groups)
        if i in ATTENTION_LAYERS:
            x = _attention(state, f"Layer{i}.attention_layer", x, heads)
        x = skips[i] = _residual(state, f"Layer{i}.ResBlock2", x, embedding, groups)
        weight, bias = state[f"Layer{i}.conv.weight"], state[f"Layer{i}.conv.bias"]
        if i <= 3:
            x = F.conv2d(x, weight, bias, stride=2, padding=1)
        else:
            x = torch.cat([F.conv_transpose2d(x, weight, bias, stride=2, padding=1), skips[7 - i]], dim=1)
    x = F.relu(F.conv2d(x, state["late_conv.weight"], state["late_conv.bias"], padding=1))
    return F.conv2d(x, state["output_conv.weight"], state["output_conv.bias"])


def test_published_number_of_parameters():
    with torch.device("meta"):
        network = UNet(UNetConfig())
    assert sum(p.numel() for p in network.parameters()) == 35_178_689
    assert sum(math.prod(shape) for shape in published_shapes().values()) == 35_178_689
    assert len(published_shapes()) == 122


def test_published_names_and_shapes_load_into_the_paper_network():
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in published_shapes().items()}
        network = from_published(state)
    assert network.config.channels == PAPER_CHANNELS
    assert (network.config.groups, network.config.heads) == (32, 8)
    assert network.config.attention_layers == ATTENTION_LAYERS
    ours = sorted(tuple(tensor.shape) for tensor in network.state_dict().values())
    assert ours == sorted(published_shapes().values())


# Two heads of four or more channels each; groups of one channel and of several.
@pytest.mark.parametrize(
    ("channels", "groups", "heads"),
    [((4, 8, 16, 32, 32, 24), 2, 2), ((4, 8, 16, 32, 32, 24), 4, 4), ((8, 16, 32, 64, 64, 48), 8, 2)],
)
def test_from_published_is_the_published_function(channels, groups, heads):
    state = random_published(channels)
    network = from_published(state, groups=groups, heads=heads)
    assert not network.training
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 1, 32, 32, generator=generator), torch.tensor([0, 421, 999])
    with torch.inference_mode():
        ours, published = network(x, t), published_forward(state, x, t, groups, heads)
    assert published.std() > 0.1
    assert torch.allclose(ours, published, rtol=0, atol=1e-5 * float(published.abs().max()))


def test_attention_in_bfloat16_is_that_of_torch():
    """Each weight of a mean of values is rounded to 8 bits once or twice."""
    q, k, v = torch.randn(3, 2, 4, 100, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, expected = attend(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).abs().max() < 4 * 2**-8 * float(expected.abs().max())


def test_weights_rounded_once_are_those_rounded_at_each_call(tiny_network):
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    with torch.inference_mode(), autocast(torch.device("cpu"), "bf16"):
        each_time = tiny_network(x, t)
        cast_weights(tiny_network, "fp32")
        assert {w.dtype for w in tiny_network.parameters()} == {torch.float32}
        cast_weights(tiny_network, "bf16")
        assert tiny_network.layer1.block1.conv1.weight.dtype == torch.bfloat16
        assert torch.equal(tiny_network(x, t), each_time)


def test_every_published_tensor_acts():
    """Each tensor has a place of its own in the function: changing it changes the output."""
    state = random_published((4, 8, 16, 32, 32, 24))
    x, t = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    network = from_published(state, groups=2, heads=2)
    with torch.inference_mode():
        before = network(x, t)
        for name, parameter in network.named_parameters():
            if name.endswith("proj1.bias"):
                continue  # a constant added to all keys cancels in the softmax; the values' part is in the test above
            kept = parameter.clone()
            parameter.mul_(1.5)
            assert (network(x, t) - before).abs().max() > 1e-4, name
            parameter.copy_(kept)
        assert torch.equal(network(x, t), before)


def test_embedding_closed_form():
    table = sinusoidal_embedding(1000, 512)
    assert table.shape == (1000, 512)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0] * 256))
    for t, i in ((1, 0), (999, 0), (999, 255), (37, 100)):
        angle = t / 10000 ** (2 * i / 512)
        assert float(table[t, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-7)
        assert float(table[t, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize(
    "name", ["Layer3.ResBlock2.gnorm1.bias", "Layer6.attention_layer.proj2.weight", "output_conv.bias"]
)
def test_a_missing_tensor_is_named(name):
    state = random_published((4, 8, 16, 32, 32, 24))
    del state[name]
    ours = name.replace("Layer", "layer").replace("ResBlock", "block").replace("gnorm", "norm")
    with pytest.raises(ValueError, match=ours.replace("attention_layer", "attention") + " is missing"):
        from_published(state, groups=2, heads=2)


def test_a_missing_tensor_that_tells_the_width_is_named():
    state = random_published((4, 8, 16, 32, 32, 24))
    del state["Layer4.ResBlock1.conv1.weight"]
    with pytest.raises(ValueError, match=r"layer4\.block1\.conv1\.weight is missing"):
        from_published(state, groups=2, heads=2)


def test_an_unknown_tensor_is_named():
    state = random_published((4, 8, 16, 32, 32, 24)) | {"Layer7.conv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"layer7\.resample\.weight is unknown"):
        from_published(state, groups=2, heads=2)


def test_a_tensor_of_another_shape_is_named():
    state = random_published((4, 8, 16, 32, 32, 24))
    state["Layer5.conv.weight"] = state["Layer5.conv.weight"].transpose(0, 1)
    with pytest.raises(ValueError, match=r"layer5\.resample\.weight is \(16, 32, 4, 4\).*\(32, 16, 4, 4\)"):
        from_published(state, groups=2, heads=2)


def test_a_tensor_that_tells_the_width_is_named_where_its_shape_is_wrong():
    state = random_published((4, 8, 16, 32, 32, 24))
    state["Layer4.ResBlock1.conv1.weight"] = state["Layer4.ResBlock1.conv1.weight"][:-1]
    with pytest.raises(ValueError, match=r"layer4\.block1\.conv1\.weight"):
        from_published(state, groups=2, heads=2)


def test_a_state_dict_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not a published state dict"):
        from_published(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize("value", [torch.tensor(1.0), "text", None])
def test_a_published_state_dict_without_a_width_is_refused(value):
    state = random_published((4, 8, 16, 32, 32, 24)) | {"shallow_conv.weight": value}
    with pytest.raises(ValueError, match=r"not a published state dict: shallow_conv\.weight"):
        from_published(state, groups=2, heads=2)


@pytest.mark.parametrize(
    "value", [[1.0], None, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64)]
)
def test_what_is_no_tensor_of_real_numbers_is_named(value):
    state = random_published((4, 8, 16, 32, 32, 24)) | {"output_conv.bias": value}
    with pytest.raises(ValueError, match=r"output_conv\.bias is no tensor of real numbers"):
        from_published(state, groups=2, heads=2)


def test_a_width_that_one_tensor_claims_takes_no_memory():
    """2048 channels are 144 GB of weights."""
    state = random_published((4, 8, 16, 32, 32, 24)) | {"shallow_conv.weight": torch.zeros(2048, 1, 3, 3)}
    with limited_memory(), pytest.raises(ValueError, match="the network has"):
        from_published(state, groups=2, heads=2)


def test_failed_loading_leaves_the_network_alone(tiny_network):
    before = {name: tensor.clone() for name, tensor in tiny_network.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["output_conv.bias"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"output_conv\.bias"):
        load_tensors(tiny_network, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_network.state_dict().items())


def test_dropout_acts_in_training_alone():
    config = UNetConfig(channels=(4, 8, 16, 32, 32, 24), groups=2, heads=2, dropout=0.1)
    torch.manual_seed(0)
    network = UNet(config)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        network.eval()
        assert torch.equal(network(x, t), network(x, t))
        evaluated = network(x, t)
        network.train()
        first, second = network(x, t), network(x, t)
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluated)


def test_state_dict_holds_learned_tensors_alone(tiny_network):
    assert tiny_network.state_dict().keys() == dict(tiny_network.named_parameters()).keys()


def test_output_depends_on_the_timestep_of_its_own_image(tiny_network):
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    with torch.inference_mode():
        a, b = tiny_network(x, torch.tensor([10, 900]))
        alone = [tiny_network(x[:1], torch.tensor([t]))[0] for t in (10, 900)]
    assert (a - b).abs().max() > 1e-4
    assert torch.allclose(a, alone[0], atol=1e-6)
    assert torch.allclose(b, alone[1], atol=1e-6)
