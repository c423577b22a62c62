"""The shipped classifier, and pytorch-fid's Inception with weights made up here: its own are a download of 90 MB."""

import errno
import hashlib
import os
import pickle
import sys
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from pytorch_fid import inception

from common.ddpm.digits import DataError, load_labelled_digits
from common.errors import UserError, run_main
from common.metrics import features
from common.metrics.features import CLASSIFIER_FILE, CLASSIFIER_SHA256, load_features
from common.runtime import sealed
from common.study import train_features

CPU = torch.device("cpu")


# The classifier


def test_classifier_ships_and_is_the_frozen_one():
    network = load_features("mnist", CPU)
    assert network.sha256 == CLASSIFIER_SHA256 == sealed.hash_tensors(network.state_dict())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert CLASSIFIER_FILE.stat().st_size < 500_000


def test_classifier_reads_digits():
    # The digits of mnist5k are from MNIST's training set, which the classifier was trained on: this shows that the
    # weights, the padding and the range fit together. The accuracy on MNIST's test set is what its training prints.
    images, labels = load_labelled_digits("mnist5k", "test")
    with torch.inference_mode():
        values, probabilities = load_features("mnist", CPU).extract(images)
    assert len(images) == 1000
    assert (probabilities.argmax(1) == labels).double().mean() >= 0.99
    assert values.shape == (1000, 256) and values.dtype == torch.float32
    assert probabilities.shape == (1000, 10) and probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-12)


def test_features_of_an_image_do_not_depend_on_its_batch():
    images = load_labelled_digits("mnist5k", "test")[0][::40]
    network = load_features("mnist", CPU)
    together, _ = network.extract(images)
    alone = torch.cat([network.extract(image[None])[0] for image in images])
    assert (together.std(0) > 0.01).sum() > together.shape[1] / 2  # the images differ, so a mixture would show
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_altered_classifier_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    content = bytearray(CLASSIFIER_FILE.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(features, "CLASSIFIER_FILE", path)
    with pytest.raises(UserError, match="altered") as error:
        load_features("mnist", CPU)
    assert str(path) in str(error.value) and "git checkout" in str(error.value)


def test_another_classifier_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    tensors, metadata = sealed.load(CLASSIFIER_FILE, "features")
    tensors["head.bias"] = tensors["head.bias"] + 1e-3
    sealed.save(path, "features", tensors, metadata)
    monkeypatch.setattr(features, "CLASSIFIER_FILE", path)
    with pytest.raises(UserError, match="not the frozen feature network") as error:
        load_features("mnist", CPU)
    assert str(path) in str(error.value) and "git checkout" in str(error.value)


def test_classifier_of_other_tensors_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "features.safetensors"
    sealed.save(path, "features", {"weight": torch.zeros(3)}, {})
    monkeypatch.setattr(features, "CLASSIFIER_FILE", path)
    with pytest.raises(UserError, match="not the frozen feature network") as error:
        load_features("mnist", CPU)
    assert "\n" not in str(error.value)


def test_missing_classifier_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CLASSIFIER_FILE", tmp_path / "features.safetensors")
    with pytest.raises(UserError, match=r"missing; git checkout it"):
        load_features("mnist", CPU)


# Inception


@pytest.fixture(scope="module")
def shapes():
    """{name: (shape, dtype)} of pytorch-fid's network."""
    built = []

    def capture(*_, **__):
        raise StopIteration

    # Its constructor asks for the weights last, so the network is taken as it asks.
    original = inception._inception_v3
    with (
        mock.patch.object(inception, "_inception_v3", lambda *a, **k: built.append(original(*a, **k)) or built[0]),
        mock.patch.object(inception, "load_state_dict_from_url", capture),
        torch.device("meta"),
        pytest.raises(StopIteration),
    ):
        inception.fid_inception_v3()
    return {name: (tensor.shape, tensor.dtype) for name, tensor in built[0].state_dict().items()}


@pytest.fixture(scope="module")
def random_state(shapes):
    """Random weights under which activations neither vanish nor overflow."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (shape, dtype) in shapes.items():
        if len(shape) > 1:
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            state[name] = torch.randn(shape, generator=generator).mul(0.1).to(dtype)
    return state


@pytest.fixture(scope="module")
def random_file(random_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state, path)
    yield path
    path.unlink()  # pytest keeps its folders, and this is 90 MB


@pytest.fixture
def any_hash(monkeypatch):
    """Weights of any hash pass for the published ones; networks are built without memory, for speed."""
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
    with torch.device("meta"):
        yield


def zeros(shapes):
    """A state of the right shapes in a file of a few kB: each tensor is one stored zero, repeated."""
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}


def refused(weights):
    with pytest.raises(UserError) as error:
        load_features("inception", CPU, weights)
    message = str(error.value)
    assert "\n" not in message
    assert "--inception-weights" in message
    return message


def test_inception_equals_pytorch_fid(random_file, random_state, monkeypatch):
    digest = hashlib.sha256(random_file.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", digest[:8])
    network = load_features("inception", CPU, random_file)
    assert (network.name, network.dimensions, network.sha256) == ("inception", 2048, digest)
    assert not network.training

    # Both resize to 299 x 299 in the same place; 107 x 107 is seven times as fast, and is enough to tell them apart.
    sizes, resize = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **how: sizes.append(size) or resize(x, (107, 107), **how))
    images = load_labelled_digits("mnist5k", "test")[0][::400]
    with torch.inference_mode():
        values, probabilities = network.extract(images)

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: random_state):
        theirs = inception.InceptionV3().eval()
    rgb = torch.stack([images, images, images], dim=1) / 255  # as its dataset hands images over
    with torch.inference_mode():
        expected = theirs(rgb)[0][:, :, 0, 0]
    assert sizes == [(299, 299)] * 2
    assert values.shape == (3, 2048) and values.dtype == torch.float32
    assert (expected[0] - expected[1]).abs().mean() > 0.01 * expected.abs().mean()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))

    # The published score leaves out the bias of the last layer.
    scores = F.linear(expected.double(), random_state["fc.weight"].double()).softmax(1)
    assert probabilities.shape == (3, 1008)
    torch.testing.assert_close(probabilities, scores, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_inception_of_another_hash_is_refused(shapes, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(zeros(shapes), path)
    message = refused(path)
    assert str(path) in message and features.INCEPTION_SHA256_PREFIX in message
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:8] in message


@pytest.mark.parametrize("name", ["Conv2d_1a_3x3.conv.weight", "fc.weight"])
def test_inception_of_the_wrong_shape_is_refused(any_hash, shapes, tmp_path, name):
    path = tmp_path / "weights.pth"
    state = zeros(shapes)
    state[name] = torch.zeros(()).expand(7, *state[name].shape[1:])
    torch.save(state, path)
    message = refused(path)
    assert str(path) in message and name in message and "not the weights of pytorch-fid's Inception" in message


def test_inception_with_a_tensor_missing_is_refused(any_hash, shapes, tmp_path):
    path = tmp_path / "weights.pth"
    state = zeros(shapes)
    del state["Mixed_7c.branch1x1.conv.weight"]
    torch.save(state, path)
    assert "not the weights of pytorch-fid's Inception" in refused(path)


def test_inception_file_is_hashed_before_it_is_decoded(shapes, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(1)}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("decoded"))
    assert "SHA-256" in refused(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda _: None, "no such file"), (Path.mkdir, "not a file"), (os.mkfifo, "not a file")],
    ids=["missing", "folder", "named pipe"],
)
def test_inception_path_that_is_no_file(tmp_path, make, said):
    path = tmp_path / "weights.pth"
    make(path)
    message = refused(path)
    assert f"--inception-weights {path}: {said}" in message and "leave the option out" in message


def test_inception_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.touch()

    def forbid(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbid)  # root may read any file
    message = refused(path)
    assert f"--inception-weights {path}: cannot be read (Permission denied)" in message


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("weights\n" * 100)


def truncated(path):
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    path.write_bytes(path.read_bytes()[:4000])


def a_list(path):
    torch.save([1, 2, 3], path)


def classifier(path):
    path.write_bytes(CLASSIFIER_FILE.read_bytes())


@pytest.mark.parametrize("write", [empty, text, truncated, a_list, classifier])
def test_file_that_is_no_inception_checkpoint_is_refused(tmp_path, write, any_hash, monkeypatch):
    path = tmp_path / "weights.pth"
    write(path)
    message = refused(path)
    assert str(path) in message and "not the weights of pytorch-fid's Inception" in message
    monkeypatch.undo()
    assert "SHA-256" in refused(path)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def bare_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, bare_pickle])
def test_code_in_an_inception_file_is_not_run(any_hash, tmp_path, save):
    path, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    save({"fc.weight": Trap(sprung)}, path)
    assert "not the weights of pytorch-fid's Inception" in refused(path)
    assert not sprung.exists()
    # The trap works where nothing guards against it.
    if save is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert sprung.exists()


# Downloading


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch.hub folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    "failure",
    [
        URLError("Name or service not known"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError('invalid hash value (expected "6726825d", got "00")'),
    ],
)
def test_download_that_fails_names_the_option(hub, monkeypatch, failure):
    def download(*_, **__):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    message = refused(None)
    assert inception.FID_WEIGHTS_URL in message and "--metric mnist" in message
    assert not [p for p in hub.rglob("*") if p.is_file()]


def test_download_asks_for_the_published_file_and_is_kept(hub, monkeypatch, shapes):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        torch.save(zeros(shapes), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert "SHA-256" in refused(None)  # of the wrong hash, so it is refused, and then found again
    assert "SHA-256" in refused(None)
    assert asked == [(inception.FID_WEIGHTS_URL, "6726825d")]
    assert (hub / "pt_inception-2015-12-05-6726825d.pth").exists()
    assert "delete it" in refused(None)


def test_only_the_first_process_downloads(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded twice"))
    monkeypatch.setattr(features.distributed, "on_first", lambda work: tmp_path / "the first one's.pth")
    assert "the first one's.pth: no such file" in refused(None)


def test_download_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file" / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("nowhere to download to"))
    assert str(tmp_path / "file") in refused(None)


# Training


@pytest.fixture
def train(monkeypatch):
    """Runs `common features` on ten digits; returns how often it trained."""
    trained = []
    digits, labels = load_labelled_digits("mnist5k", "test")
    few = digits[::100], labels[::100]

    def train(*arguments, load=lambda split, data_dir: few):
        monkeypatch.setattr(train_features, "load_mnist", load)
        monkeypatch.setattr(F, "cross_entropy", lambda *x, loss=F.cross_entropy: trained.append(x) or loss(*x))
        monkeypatch.setattr(sys, "argv", ["features", *map(str, arguments)])
        run_main(train_features.main)
        return len(trained)

    train.steps = trained
    return train


def test_classifier_is_trained_and_kept(train, tmp_path, capsys):
    path = tmp_path / "new" / "features.safetensors"
    assert train("--out", path) == 3  # epochs of one batch
    tensors, metadata = sealed.load(path, "features")
    features.DigitClassifier().load_state_dict(tensors)
    printed = capsys.readouterr().out
    assert sealed.hash_tensors(tensors) in printed and f"{metadata['accuracy']:.2%} of the test digits" in printed


@pytest.mark.parametrize(
    ("out", "said"), [("folder", "not a file"), ("pipe", "not a file"), ("file/below", "cannot be written")]
)
def test_out_that_cannot_be_written_is_refused_before_training(train, tmp_path, out, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as error:
        train("--out", tmp_path / out)
    assert f"--out {tmp_path}" in error.value.code and said in error.value.code and "\n" not in error.value.code
    assert not train.steps


def test_digits_of_either_split_that_are_absent_are_said_before_training(train, tmp_path):
    def load(split, data_dir):
        if split == "test":
            raise DataError(f"not in --data-dir {data_dir}")
        return torch.zeros(10, 32, 32, dtype=torch.uint8), torch.zeros(10, dtype=torch.long)

    with pytest.raises(SystemExit) as error:
        train("--out", tmp_path / "new", "--data-dir", "absent", load=load)
    assert "--data-dir absent" in error.value.code
    assert not train.steps and not list(tmp_path.iterdir())
