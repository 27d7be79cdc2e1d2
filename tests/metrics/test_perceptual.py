"""Perceptual distances: the classifier's, and LPIPS against the paper's equation with VGG-16 written out by hand."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nanodiff.classifiers.worlds import load_classifier
from nanodiff.errors import UserError
from nanodiff.metrics.perceptual import LPIPS, ClassifierDistance, load_distance, unit_length

# VGG-16 in torchvision's names: (number in features, channels in, channels out) of each convolution.
CONVOLUTIONS = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
                (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
BEFORE_POOLING = {2: 64, 7: 128, 14: 256, 21: 512, 28: 512}  # the last convolution of each of the five sizes
SLICES = [(1, 0, 4), (2, 4, 9), (3, 9, 16), (4, 16, 23), (5, 23, 30)]  # of lpips.LPIPS: number, first layer, end


def weights():
    """Random weights as a user's file holds them, of the sizes that keep activations alive."""
    generator, state_dict = torch.Generator().manual_seed(0), {}
    for number, channels, out in CONVOLUTIONS:
        state_dict[f"features.{number}.weight"] = (torch.randn(out, channels, 3, 3, generator=generator)
                                             * (2 / 9 / channels) ** 0.5).half()
        state_dict[f"features.{number}.bias"] = (0.1 * torch.randn(out, generator=generator)).half()
    for i, channels in enumerate(BEFORE_POOLING.values()):
        state_dict[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator).half()
    return state_dict


@pytest.fixture(scope="module")
def state_dict():
    return weights()


@pytest.fixture(scope="module")
def file(state_dict, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(state_dict, path)
    return path


@pytest.fixture(scope="module")
def lpips(file):
    return load_distance(str(file))


@pytest.fixture(scope="module")
def classifier_distance():
    return load_distance()


@pytest.fixture(params=["lpips", "classifier_distance"])
def distance(request):
    return request.getfixturevalue(request.param)


def picture(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def by_hand(weights, x, y):
    """LPIPS as the paper's equation 1 says, layer by layer."""
    total, maps = 0, []
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    for z in (x, y):
        z = (z - shift) / scale
        outputs = []
        for number, _, _ in CONVOLUTIONS:
            weight, bias = (weights[f"features.{number}.{kind}"].float() for kind in ("weight", "bias"))
            z = F.relu(F.conv2d(z, weight, bias, padding=1))
            if number in BEFORE_POOLING:
                outputs.append(z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10))
                z = F.max_pool2d(z, 2)
        maps.append(outputs)
    for i, (a, b) in enumerate(zip(*maps)):
        total = total + ((a - b) ** 2 * weights[f"lin{i}.model.1.weight"].float()).sum(1).mean((1, 2))
    return total


# --- both distances --------------------------------------------------------------------------------------------------

def test_equal_pictures_are_at_distance_0_others_above_and_order_does_not_matter(distance):
    x, y = picture(3, 3, 32, 48), picture(3, 3, 32, 48, seed=1)
    assert torch.equal(distance(x, x), torch.zeros(3))
    there, back = distance(x, y), distance(y, x)
    assert there.shape == (3,) and (there > 0.01).all()
    torch.testing.assert_close(there, back)
    near = distance(x, (x + 0.02 * y).clamp(-1, 1))
    assert (near > 0).all() and (near < 0.5 * there).all()


def test_the_distance_of_a_pair_does_not_depend_on_its_neighbours_and_16_pixels_are_enough(distance):
    x, y = picture(4, 3, 16, 16), picture(4, 3, 16, 16, seed=1)
    together = distance(x, y)
    torch.testing.assert_close(torch.cat([distance(x[i:i + 1], y[i:i + 1]) for i in range(4)]), together,
                               rtol=1e-4, atol=1e-6)


def test_a_grey_picture_gets_a_finite_gradient_and_the_weights_get_none(distance):
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(x, picture(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_it_stays_in_eval_mode_and_moves_nothing(distance):
    before = {name: tensor.clone() for name, tensor in distance.state_dict().items()}
    distance.train()
    assert not any(module.training for module in distance.modules())
    distance(picture(2, 3, 16, 16), picture(2, 3, 16, 16, seed=1))
    assert all(torch.equal(before[name], tensor) for name, tensor in distance.state_dict().items())


def test_unit_length_is_1_and_where_all_is_0_gradients_are_finite():
    h = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(unit_length(h).square().sum(1), torch.ones(2, 3, 3))
    torch.testing.assert_close(unit_length(1000 * h), unit_length(h))
    nothing = torch.zeros(1, 5, 2, 2, requires_grad=True)
    unit_length(nothing).sum().backward()
    assert torch.equal(unit_length(nothing), nothing) and nothing.grad.isfinite().all()


def test_the_classifiers_distance_looks_at_every_relu():
    classifier = load_classifier()
    distance = ClassifierDistance(classifier)
    relus = sum(isinstance(module, torch.nn.ReLU) for module in classifier.body.modules())
    shapes = [tuple(h.shape[1:]) for h in distance.activations(picture(1, 3, 32, 32))]
    assert len(shapes) == relus and shapes[0] == (32, 16, 16) and shapes[-1] == (192, 2, 2)


# --- LPIPS -----------------------------------------------------------------------------------------------------------

def test_lpips_is_the_equation_with_vgg16_written_out(lpips, state_dict):
    x, y = picture(2, 3, 32, 48), picture(2, 3, 32, 48, seed=1)
    torch.testing.assert_close(lpips(x, y), by_hand(state_dict, x, y), rtol=1e-5, atol=0)
    shapes = [tuple(h.shape[1:]) for h in lpips.activations(x)]
    assert shapes == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3)]


def test_pictures_in_0_to_1_give_the_same_number_with_lowest_0(lpips):
    x, y = picture(2, 3, 16, 16), picture(2, 3, 16, 16, seed=1)
    torch.testing.assert_close(lpips((x + 1) / 2, (y + 1) / 2, lowest=0), lpips(x, y))


@pytest.mark.parametrize("change, lowest, words", [
    (lambda x: 127.5 * (x + 1), -1, "expected -1 to 1"), (lambda x: x, 0, "expected 0 to 1"),
    (lambda x: 1.2 * x, -1, "values from -1.2 to 1.2 "), (lambda x: x + float("nan"), -1, "from nan to nan")])
def test_values_outside_the_range_are_refused_in_either_picture(lpips, change, lowest, words):
    x = picture(1, 3, 32, 32)
    x[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    for pair in ((change(x), x.abs()), (x.abs(), change(x))):
        with pytest.raises(UserError, match=words):
            lpips(*pair, lowest=lowest)


def test_a_little_overshoot_passes_and_so_does_what_a_network_puts_out_while_it_learns(lpips):
    x, y = picture(1, 3, 16, 16), 1.04 * picture(1, 3, 16, 16, seed=1)
    assert lpips(x, y).isfinite().all()
    assert lpips((3 * x).requires_grad_(), x).isfinite().all()


def test_the_state_dict_of_the_lpips_package_is_read_too(lpips, state_dict, tmp_path):
    theirs = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, tensor in state_dict.items():
        if match := re.match(r"features\.(\d+)\.(.*)", name):
            number = next(n for n, first, end in SLICES if first <= int(match[1]) < end)
            theirs[f"net.slice{number}.{match[1]}.{match[2]}"] = tensor
        else:
            theirs[name] = theirs[name.replace("lin", "lins.", 1)] = tensor
    torch.save(theirs, tmp_path / "lpips.pth")
    x, y = picture(1, 3, 16, 16), picture(1, 3, 16, 16, seed=1)
    assert torch.equal(LPIPS(tmp_path / "lpips.pth")(x, y), lpips(x, y))


def test_a_negative_linear_weight_a_missing_or_a_left_over_key_is_refused_by_name(state_dict, tmp_path):
    def broken(**changes):
        path = tmp_path / "broken.pth"
        torch.save({name: tensor for name, tensor in (state_dict | changes).items() if tensor is not None}, path)
        return path

    negative = state_dict["lin2.model.1.weight"].clone()
    negative[0, 7] = -0.25
    for changes, words in [({"lin2.model.1.weight": negative}, "lin2.model.1.weight goes down to -0.25; expected"),
                           ({"lin4.model.1.weight": None}, 'missing, for example "lin4.model.1.weight"'),
                           ({"features.28.bias": None}, 'missing, for example "features.28.bias"'),
                           ({"classifier.0.bias": torch.zeros(1)}, 'left over, for example "classifier.0.bias"'),
                           ({"features.0.bias": torch.zeros(3)}, r'has shape \[3\], expected \[64\]')]:
        with pytest.raises(UserError, match=words):
            LPIPS(broken(**changes))
    with pytest.raises(UserError, match="nowhere.safetensors cannot be read"):
        load_distance(str(tmp_path / "nowhere.safetensors"))


def test_single_precision_is_used_whatever_the_file_holds(lpips):
    assert {p.dtype for p in lpips.parameters()} == {torch.float32}
