"""Prior preservation: class pictures that are drawn where they are missing, and the batches of them."""

import numpy as np
import pytest
import torch
from PIL import Image

import nanodiff
import tiny_sd
import train_dreambooth
from conftest import same
from nanodiff.data.folder import find
from nanodiff.diffusion import process
from nanodiff.errors import UserError
from nanodiff.finetune import lesson as lessons, prior as priors


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd1"
    tiny_sd.write_model("sd1", path)
    return nanodiff.load(path)


def config(**more):
    return train_dreambooth.Config(**{
        "with_prior_preservation": True, "class_prompt": "a texture", "instance_prompt": "a sks texture",
        "num_class_images": 4, "batch": 2, "sample_steps": 1, "caption_dropout": 0.1, "size": 32, **more})


class FakeRun:
    """What priors.make_prior asks of a Run."""
    def __init__(self, folder):
        from contextlib import nullcontext
        self.folder, self.rank, self.world, self.device = folder, 0, 1, torch.device("cpu")
        self.print, self.autocast = (lambda text: None), nullcontext
        self.open = self.wait = lambda: None


def test_what_is_missing_of_n_class_pictures_is_made_and_the_same_as_in_one_go(sd, tmp_path):
    whole = priors.draw_class_pictures(config(), sd, 32, tmp_path / "whole", say=lambda text: None)
    assert len(whole) == 4 and set(whole.captions) == {"a texture"}
    some = config()
    some.num_class_images = 2
    priors.draw_class_pictures(some, sd, 32, tmp_path / "parts", say=lambda text: None)
    drawn = (tmp_path / "parts/class-0000.png").stat().st_mtime_ns
    said = []
    priors.draw_class_pictures(config(), sd, 32, tmp_path / "parts", said.append)
    assert (tmp_path / "parts/class-0000.png").stat().st_mtime_ns == drawn and "2 of 4" in said[0]
    for name in find(tmp_path / "whole"):
        one, other = (np.asarray(Image.open(tmp_path / where / name)).astype(int) for where in ("whole", "parts"))
        assert abs(one - other).max() <= 1  # of 255: sums are rounded otherwise in another batch on some CPUs
    priors.draw_class_pictures(config(), sd, 32, tmp_path / "parts", said.append)
    assert len(said) == 1  # all are there: nothing is drawn


def test_what_stands_beside_the_new_pictures_are_class_pictures_under_the_class_prompt(sd, tmp_path):
    flags = config(caption_dropout=0.0)
    prior = priors.make_prior(flags, sd, FakeRun(tmp_path))
    x0, t, noise, target, context = priors.prior_batch(prior, FakeRun(tmp_path), sd, 3, 0)
    assert torch.allclose(context, sd.encode_text(["a texture"] * 2), atol=2e-3)  # kept in half precision
    latents, _, position = prior.batches.get(3, 0)
    assert torch.equal(x0, latents) and t.shape == (2,) and 0 <= int(t.min()) and int(t.max()) < sd.schedule.T
    assert not torch.allclose(noise, lessons.step_noise(flags, 3, position, x0.shape[1:]))  # not the new pictures'
    flags.caption_dropout = 0.999
    *same_as_before, unchanged, empty = priors.prior_batch(prior, FakeRun(tmp_path), sd, 3, 0)
    assert torch.allclose(empty, sd.encode_text(["", ""]), atol=2e-3) and same(same_as_before, [x0, t, noise])
    assert torch.equal(target, process.target(sd.schedule, sd.kind, x0, noise, t)) and torch.equal(target, unchanged)


@pytest.mark.slow
def test_the_base_model_is_right_where_its_own_predictions_are_the_target(sd, tmp_path):
    """Its loss is 0 before fine-tuning, at every step; a noisy copy that comes again is the same."""
    run, flags = FakeRun(tmp_path), config(teacher_predictions=3)
    prior = priors.make_prior(flags, sd, run)
    assert prior.teacher_predictions.shape == (4, 3, 4, 8, 8)
    seen = {}
    for step in range(60):
        x0, t, noise, target, context = priors.prior_batch(prior, run, sd, step, 0)
        x_t = process.q_sample(sd.schedule, x0, t, noise)
        with torch.no_grad():
            torch.testing.assert_close(sd.unet(x_t, t, context), target, rtol=1e-4, atol=1e-5)
        for one, answer in zip(x_t, target):
            assert same([seen.setdefault(one.sum().item(), answer)], [answer])
    assert len(seen) == 12  # three copies of each of four pictures, of other noise and time steps
    assert not torch.allclose(target, process.target(sd.schedule, sd.kind, x0, noise, t), atol=0.1)


def test_several_class_prompts_are_drawn_in_turn_and_each_picture_keeps_its_own(sd, tmp_path):
    several = config()
    several.class_prompt, several.num_class_images, several.class_batch = "a texture | a red circle|", 3, 1
    prior = priors.make_prior(several, sd, FakeRun(tmp_path))
    said = [Image.open(tmp_path / "class" / f"class-000{i}.png").text["prompt"] for i in range(3)]
    assert said == ["a texture", "a red circle", "a texture"]
    whole, index = prior.batches, torch.arange(3)
    assert len(whole.get(0, 0)[0]) == 1
    wanted = sd.encode_text(said)
    assert torch.allclose(prior.captions(index), wanted, atol=2e-3)
    assert not torch.allclose(wanted[0], wanted[1], atol=2e-3)
    learning = priors.make_prior(several, sd, FakeRun(tmp_path), learning=True)
    assert torch.allclose(lessons.Denoiser(sd).text_states(learning.captions(index)), wanted, atol=1e-5)


def test_a_text_encoder_that_learns_gives_each_row_its_own_caption_and_gradients(sd):
    captions = ["a texture", "a red circle", "a texture"]
    token_ids, frozen = (lessons.encode_captions(sd, captions, learning) for learning in (True, False))

    def states(rows):
        return lessons.Denoiser(sd).text_states(token_ids(rows))
    row = torch.tensor([2, -1, 0, 1, 2])
    wanted = sd.encode_text(["a texture", "", "a texture", "a red circle", "a texture"])
    assert torch.allclose(states(row), wanted, atol=1e-5)
    assert torch.allclose(frozen(row), states(row), atol=2e-3)
    exact = states(row).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(states(row), exact)  # the U-Net alone runs in lower precision
    some = next(sd.text_model.parameters()).requires_grad_(True)
    states(row).square().mean().backward()
    grad = some.grad.clone()
    some.grad = None
    ids = sd.tokenizer(["a texture", "", "a texture", "a red circle", "a texture"])
    sd.text_model(ids)[0].square().mean().backward()
    assert torch.allclose(grad, some.grad, rtol=1e-4, atol=1e-7)
    some.requires_grad_(False).grad = None


def test_class_pictures_of_ones_own_are_taken_as_they_are(sd, tmp_path):
    priors.draw_class_pictures(config(), sd, 32, tmp_path, say=lambda text: None)
    index = torch.arange(4)
    before = priors.draw_class_pictures(config(), sd, 32, tmp_path).read(index, index)
    assert same(priors.draw_class_pictures(config(seed=7), sd, 32, tmp_path).read(index, index), before)


def test_more_than_a_batch_of_class_pictures_is_needed(sd, tmp_path):
    few = config()
    few.num_class_images, few.batch = 2, 3
    with pytest.raises(UserError, match="more than the 2 class pictures"):
        priors.make_prior(few, sd, FakeRun(tmp_path))


@pytest.mark.parametrize("change, expected", [
    ({"class_prompt": ""}, "--class_prompt"),
    ({"instance_prompt": "", "data": "zigzagged"}, "--instance_prompt"), ({"instance_prompt": "a texture"}, "are both"),
    ({"num_class_images": 1}, "--batch 2 is more than --num_class_images 1"),
    ({"class_data": "worlds"}, "captions of its own"), ({"class_prompt": " | "}, "holds no prompt"),
])
def test_wrong_flags_are_refused(change, expected):
    wrong = config()
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(UserError, match=expected):
        priors.check_flags(wrong)
