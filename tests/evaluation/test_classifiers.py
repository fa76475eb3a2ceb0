"""The classifiers: what they learn, and that nothing but their images, labels and seed decides it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from stripes import make_stripes
from torch import nn
from torch.nn import functional

from dp_peft_diffusion.errors import UserError
from dp_peft_diffusion.evaluation import classifiers
from dp_peft_diffusion.evaluation.classifier_nets import dpdm_cnn, resnet, small_cnn, wide_resnet
from dp_peft_diffusion.evaluation.classifiers import NAMES, NETS, PROTOCOLS, Training, predict, probabilities

TINY_NETS = {"wrn_40_4": partial(wide_resnet, depth=10, width=1), "resnet_110": partial(resnet, depth=8)}
QUICK = {
    "logistic_regression": {},
    "mlp": {"epochs": 20, "batch_size": 20, "learning_rate": 3e-3},
    "cnn": {"epochs": 8, "batch_size": 20},
    "cnn_dpdm": {"epochs": 5, "batch_size": 20, "learning_rate": 2e-3},
    "wrn_40_4": {"epochs": 4, "batch_size": 20, "flip": True},
    "resnet_110": {"epochs": 5, "batch_size": 20, "learning_rate": 3e-3},
}


@pytest.fixture(autouse=True)
def tiny_nets(monkeypatch):
    for name, make_net in TINY_NETS.items():
        monkeypatch.setitem(NETS, name, make_net)


def test_every_classifier_is_tested_here():
    assert set(QUICK) == set(NAMES) == {"logistic_regression", *PROTOCOLS}


@pytest.mark.parametrize("name", NAMES)
def test_separable_images_are_learned_by_every_classifier(name):
    (images, labels), (tested, truth) = make_stripes(160, 0, channels=3), make_stripes(150, 1, channels=3)
    right = predict(name, images, labels, tested, **QUICK[name]) == truth
    assert right.mean() > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_classified_alike_whatever_stands_beside_it(name):
    images, labels = make_stripes(60, 0)
    tested, truth = make_stripes(90, 1)
    options = QUICK[name] | ({"epochs": 2} if QUICK[name] else {})
    together = predict(name, images, labels, tested, **options)
    order = np.random.default_rng(3).permutation(len(tested))
    alone = order[truth[order] == 1][:7]  # one class only, in another order: a batch norm that looks would notice
    assert np.array_equal(predict(name, images, labels, tested[order], **options), together[order])
    assert np.array_equal(predict(name, images, labels, tested[alone], **options), together[alone])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logistic_regression"])
def test_a_seed_decides_everything_and_the_global_streams_are_left_alone(name):
    images, labels = make_stripes(40, 0)
    tested = np.random.default_rng(1).integers(0, 256, (400, 1, 8, 8), dtype=np.uint8)
    options = {
        "epochs": 1,
        "batch_size": 20,
        "learning_rate": 1e-3,
    }  # little is learned: the net is what the seed makes

    def three_runs():
        return [predict(name, images, labels, tested, seed=seed, **options) for seed in (5, 5, 6)]

    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0), np.random.seed(0)
    first, again, other = three_runs()
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def published_cnn(images, labels, tested, seed):
    """The small CNN as it stood when the first tables were published, line by line."""
    inputs, targets = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        c, h, w = inputs.shape[1:]
        net = nn.Sequential(
            *(nn.Conv2d(c, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Flatten(), nn.Linear(32 * -(-h // 4) * -(-w // 4), 128), nn.ReLU()),
            nn.Linear(128, int(labels.max()) + 1),
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    most = min(h, w) // 16
    for _ in range(20):
        for batch in torch.randperm(len(inputs), generator=generator).split(100):
            down, right = torch.randint(-most, most + 1, (2, len(batch), 1), generator=generator)
            rows = (torch.arange(h) + down).clamp(0, h - 1)
            columns = (torch.arange(w) + right).clamp(0, w - 1)
            each = torch.arange(len(batch))[:, None, None]
            moved = inputs[batch][each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            loss = nn.functional.cross_entropy(net(moved), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return net(torch.from_numpy(tested).float() / 127.5 - 1).argmax(dim=1).numpy()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 18, 17)])
def test_the_default_cnn_predicts_what_it_predicted_when_tables_were_published(shape):
    rng = np.random.default_rng(0)  # noise: any change of weights changes some of 500 predictions
    images, tested = (rng.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (110, 500))
    labels = rng.integers(0, 4, 110)
    assert np.array_equal(predict("cnn", images, labels, tested, seed=7), published_cnn(images, labels, tested, 7))


@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn_dpdm"])
def test_an_ensemble_of_one_is_the_single_and_one_of_three_the_mean_of_seeds_of_its_own(name):
    rng = np.random.default_rng(0)
    images, tested = (rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8) for n in (40, 300))
    labels = rng.integers(0, 3, 40)
    training = replace(PROTOCOLS[name], epochs=1, batch_size=20)

    def member(seed):
        if name == "mlp":
            return classifiers._mlp(images, labels, tested, training, seed)
        return probabilities(NETS[name], training, images, labels, tested, seed=seed)

    options = {"epochs": 1, "batch_size": 20}
    single = predict(name, images, labels, tested, seed=2, ensemble=1, **options)
    assert np.array_equal(single, member(2).argmax(axis=1))
    three = predict(name, images, labels, tested, seed=2, ensemble=3, **options)
    assert np.array_equal(three, np.mean([member(6), member(7), member(8)], axis=0).argmax(axis=1))
    assert not np.array_equal(three, single)


def test_the_training_loop_is_sgd_with_momentum_decay_and_drops_by_hand():
    images, labels = make_stripes(30, 0)
    training = Training(3, 0.05, 16, "sgd", weight_decay=0.01, drops=(0.3, 0.6))
    flat = nn.Linear(64, 3)
    nn.init.zeros_(flat.weight), nn.init.zeros_(flat.bias)
    found = probabilities(lambda shape, k: nn.Sequential(nn.Flatten(), flat), training, images, labels, images, seed=4)

    inputs, targets = (
        torch.from_numpy(images).float().flatten(1) / 127.5 - 1,
        nn.functional.one_hot(torch.tensor(labels)),
    )
    theta, velocity = torch.zeros(3, 65), None  # weights, and the bias in the last column
    inputs = torch.cat([inputs, torch.ones(30, 1)], dim=1)
    generator = torch.Generator().manual_seed(4)
    for learning_rate in (0.05, 0.05 / 5, 0.05 / 25):
        for batch in torch.randperm(30, generator=generator).split(16):
            errors = (inputs[batch] @ theta.T).softmax(dim=1) - targets[batch]
            gradient = errors.T @ inputs[batch] / len(batch) + 0.01 * theta
            velocity = gradient if velocity is None else 0.9 * velocity + gradient
            theta = theta - learning_rate * (gradient + 0.9 * velocity)
    assert np.allclose(found, (inputs @ theta.T).softmax(dim=1).numpy(), atol=1e-5)


def test_a_shift_moves_each_image_by_a_few_pixels_of_its_own_and_repeats_its_edges():
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 6, 9), dtype=np.uint8)
    moved = classifiers._shift(torch.from_numpy(images), 2, torch.Generator().manual_seed(0)).numpy()
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    ways = [(down, right) for down in range(5) for right in range(5)]
    windows = np.stack([padded[:, :, down : down + 6, right : right + 9] for down, right in ways])  # (25, b, c, h, w)
    matches = (windows == moved).all(axis=(2, 3, 4))
    assert matches.any(axis=0).all() and matches.any(axis=1).all()  # each image is one of 25, and each of 25 occurs


def test_a_flip_mirrors_some_images_left_to_right_and_only_when_told():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 6, 9), dtype=np.uint8))

    def changed(**options):
        return classifiers._augmented(images, Training(1, 0.1, 1, **options), torch.Generator().manual_seed(0))

    same = (changed(flip=True) == images).flatten(1).all(dim=1)
    mirrored = (changed(flip=True) == images.flip(3)).flatten(1).all(dim=1)
    assert (same | mirrored).all() and 10 < same.sum() < 50  # by chance once in ten million
    assert torch.equal(changed(), images)
    assert not any(training.flip for training in PROTOCOLS.values())


def warped_ramps():
    """Of 300 warps of a ramp to the right and one down: the maps (300, 2, 2) that were fitted, and what they leave.

    Sampling between pixels keeps a ramp a ramp: its slopes are the affine map, and what no plane fits is the bend.
    """
    side, inner = 65, slice(16, -16)  # no edge is seen from the inner pixels
    steps = torch.arange(side) - side // 2.0
    right, down = steps.expand(side, side), steps[:, None].expand(side, side)
    images = (128 + 3 * torch.stack([right, down])).to(torch.uint8).expand(300, 2, side, side)
    training = Training(1, 0.1, 1, warp=True)
    warped = classifiers._augmented(images, training, torch.Generator().manual_seed(0))
    assert warped.dtype == torch.uint8
    seen = warped[:, :, inner, inner].double().flatten(0, 1).flatten(1) / 3  # (600, 33 * 33)
    plane = torch.stack([right[inner, inner].flatten(), down[inner, inner].flatten()], dim=1).double()
    plane = torch.cat([plane, torch.ones_like(plane[:, :1])], dim=1)
    slopes = torch.linalg.lstsq(plane, seen.T).solution  # (3, 600)
    return slopes[:2].T.unflatten(0, (300, 2)), seen.T - plane @ slopes


def test_a_warp_turns_stretches_and_shears_each_image_by_its_own_draw(monkeypatch):
    monkeypatch.setattr(classifiers, "bend", lambda b, h, w, *_: torch.zeros(b, h, w, 2))
    maps, rest = warped_ramps()
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    turned_back = torch.stack(
        [torch.stack([angle.cos(), angle.sin()], 1), torch.stack([-angle.sin(), angle.cos()], 1)], 1
    )
    stretch = turned_back @ maps  # [[1 / (size * aspect), shear], [0, aspect / size]]
    size, aspect = -stretch.det().log() / 2, (stretch[:, 1, 1] / stretch[:, 0, 0]).log() / 2
    for drawn, most in ((angle, 0.2), (size, 0.12), (aspect, 0.12), (stretch[:, 0, 1], 0.2)):
        assert -1.04 * most < drawn.min() < -0.9 * most and 0.9 * most < drawn.max() < 1.04 * most
    assert rest.std() < 0.4  # rounding to bytes


def test_a_warp_bends_too_and_no_protocol_warps():
    _, rest = warped_ramps()
    assert 0.5 < rest.std() < 1.3  # 0.04 half sides are 1.3 pixels, of which the plane takes some
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 6, 9), dtype=np.uint8))
    assert torch.equal(classifiers._augmented(images, Training(1, 0.1, 1), torch.Generator()), images)
    assert not any(training.warp for training in PROTOCOLS.values())


def test_a_warp_leaves_a_blank_image_blank():
    images = torch.full((20, 3, 9, 14), 200, dtype=torch.uint8)
    assert torch.equal(classifiers._warp(images, torch.Generator().manual_seed(0)), images)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 5, 9), (3, 33, 18)])
@pytest.mark.parametrize(
    "make_net", [small_cnn, dpdm_cnn, *TINY_NETS.values()], ids=["cnn", "cnn_dpdm", "wide_resnet", "resnet"]
)
def test_every_net_takes_images_of_every_shape_also_one_at_a_time(make_net, shape):
    net = make_net(shape, 5)  # in training mode: the last batch of an epoch may be a single image
    assert net(torch.zeros(1, *shape)).shape == (1, 5)


@pytest.mark.parametrize(
    ("make_net", "published"),
    [
        (partial(wide_resnet, depth=40, width=4), 8.9e6),  # arXiv 1605.07146, tables 3 and 4
        (partial(wide_resnet, depth=28, width=10), 36.5e6),
        (partial(wide_resnet, depth=16, width=8), 11.0e6),
        (partial(wide_resnet, depth=40, width=1), 0.6e6),
        (partial(resnet, depth=20), 0.27e6),  # arXiv 1512.03385, table 6
        (partial(resnet, depth=56), 0.85e6),
        (partial(resnet, depth=110), 1.7e6),
    ],
)
def test_nets_have_the_published_number_of_parameters(make_net, published):
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in make_net((3, 32, 32), 10).parameters())
    assert abs(found / published - 1) < 0.02 or abs(found - published) < 0.05e6


def test_the_named_nets_are_those_of_the_papers(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        counts = {
            name: sum(parameter.numel() for parameter in NETS[name](shape, 10).parameters())
            for name, shape in {"cnn_dpdm": (1, 28, 28), "wrn_40_4": (3, 32, 32), "resnet_110": (3, 32, 32)}.items()
        }
    dpdm = 32 * 10 + 64 * (9 * 32 + 1) + 128 * (9 * 64 + 1) + 128 * (1152 + 1) + 10 * 129  # 1,152 = 128 x 3 x 3
    assert counts == {"cnn_dpdm": dpdm, "wrn_40_4": 8_949_210, "resnet_110": 1_730_714}


def test_a_wide_resnet_computes_what_its_paper_says():
    """Zagoruyko and Komodakis, section 2 and table 1, written out with functions."""
    net = wide_resnet((3, 8, 8), 5, depth=16, width=1).eval()
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            value.uniform_(0.5, 1.5)
    _, first, *blocks, last, _, _, _, linear = net
    images = torch.rand(2, 3, 8, 8)

    def active(norm, x):
        return functional.relu(
            functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
        )

    x = functional.conv2d(images, first.weight, padding=1)
    for block, stride in zip(blocks, (1, 1, 2, 1, 2, 1), strict=True):
        before = active(block.norm1, x)
        inner = active(block.norm2, functional.conv2d(before, block.conv1.weight, stride=stride, padding=1))
        shortcut = x if block.projection is None else functional.conv2d(before, block.projection.weight, stride=stride)
        x = shortcut + functional.conv2d(inner, block.conv2.weight, padding=1)
    expected = active(last, x).mean(dim=(2, 3)) @ linear.weight.T + linear.bias
    assert [block.projection is None for block in blocks] == [True, True, False, True, False, True]
    with torch.no_grad():
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["logistic_regression", "mlp", "cnn"])
def test_a_class_that_no_image_has_is_never_predicted_by_position(name):
    images, labels = make_stripes(150, 0, classes=2)
    tested, truth = make_stripes(90, 1, classes=2)
    found = predict(name, images, 2 * labels, tested, **QUICK[name])  # classes 0 and 2
    assert (found == 2 * truth).mean() > 0.95 and set(found.tolist()) <= {0, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "svm"}, "'svm' is no classifier. Choose from: logistic_regression, mlp, cnn"),
        ({"epochs": 0}, "epochs of a classifier is 0"),
        ({"batch_size": 0}, "batch_size of a classifier is 0"),
        ({"shift": 0.6}, "shift of a classifier is 0.6"),
        ({"learning_rate": float("nan")}, "learning_rate of a classifier is nan"),
        ({"ensemble": 0}, "Choose 1 or more"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    images, labels = make_stripes(20, 0)
    with pytest.raises(UserError, match=message):
        predict(**{"name": "cnn", "images": images, "labels": labels, "tested_images": images} | options)


def test_augmentation_asked_of_an_mlp_is_not_reported_as_done():
    assert classifiers.training_of("mlp", epochs=3, flip=True, shift=0.1) == replace(PROTOCOLS["mlp"], epochs=3)
