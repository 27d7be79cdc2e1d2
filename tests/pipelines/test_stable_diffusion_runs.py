"""What a run of Stable Diffusion promises: seeds, batches, what is computed once, pictures in and out, plain errors."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import nanodiff
from nanodiff.diffusion import Schedule, samplers
from nanodiff.errors import Diverged, UserError
from nanodiff.pipelines import generation, stable_diffusion
import tiny_sd
from conftest import same
from test_stable_diffusion import counted, draw, error, folder, models  # noqa: F401  the last two are fixtures

ANCESTRAL = ("ddpm", "euler_a")


# --- runs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", [*ANCESTRAL, "dpm++2m"])
@pytest.mark.parametrize("edit", [{}, {"image": torch.zeros(1, 3, 32, 32), "mask": torch.eye(8), "strength": 0.9}])
def test_a_picture_depends_on_seed_and_number_and_not_on_its_batch(sampler, edit, models, monkeypatch):
    sd, options = models["sd1_inpaint" if edit else "sd1"], {"sampler": sampler, **edit}
    whole = draw(sd, n=3, **options)
    with counted(sd.unet) as sizes:
        assert error(draw(sd, n=3, batch=1, **options), whole) < 1e-4
        monkeypatch.setattr(stable_diffusion, "AT_ONCE", 2 * 8 * 8)
        assert error(draw(sd, n=3, **options), whole) < 1e-4
    steps = 2 if edit else 3  # 0.9 of three steps are two
    assert sizes == 3 * steps * [2] + steps * [4] + steps * [2]  # with guidance two of each
    assert error(draw(sd, first=2, **options), whole[2:]) < 1e-4
    assert error(whole[:1], whole[1:2]) > 0.01 and error(draw(sd, seed=6, **options), whole[:1]) > 0.01


def test_recorded_noises_and_generators_serve_every_picture_in_every_batch(models, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, noises = torch.randn(3, 4, 8, 8, generator=rng), torch.randn(3, 3, 4, 8, 8, generator=rng)
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]
    fixed = {"seed": None, "sampler": "euler_a"}
    given, drawn = draw(models["sd1"], n=3, latents=x, noises=noises, **fixed), draw(
        models["sd1"], n=3, generator=generators(), **fixed)
    monkeypatch.setattr(stable_diffusion, "AT_ONCE", 1)
    assert error(draw(models["sd1"], n=3, latents=x, noises=noises, **fixed), given) < 1e-4
    assert error(draw(models["sd1"], n=3, generator=generators(), **fixed), drawn) < 1e-4
    one = draw(models["sd1"], latents=x[2:], noises=noises[:, 2:], **fixed)
    assert error(one, given[2:]) < 1e-4
    assert error(draw(models["sd1"], generator=generators()[1], **fixed), drawn[1:2]) < 1e-4
    fresh = draw(models["sd1"], n=3, latents=x, generator=generators(), **fixed)  # the steps' noises alone
    assert not same(fresh, given) and fresh.isfinite().all()
    with pytest.raises(UserError, match="3 generators were given for 2 pictures"):
        draw(models["sd1"], n=2, generator=generators(), **fixed)


def test_the_pictures_of_the_first_prompt_come_first_each_with_its_own_negative_text(models):
    prompts, negatives = ["woven", "a photo of a knit"], ["grey", "blurry colours"]
    many = draw(models["sd1"], prompts, n=2, negative=negatives)
    for i in range(4):
        one = draw(models["sd1"], prompts[i // 2], negative=negatives[i // 2], first=i)
        assert error(many[i : i + 1], one) < 1e-4
    assert error(draw(models["sd1"], prompts[0]), draw(models["sd1"], prompts[0], negative="grey")) > 1e-3
    assert same(draw(models["sd1"], negative=None), draw(models["sd1"], negative=""))


@pytest.mark.parametrize("sampler", samplers.by_name)
def test_a_run_calls_the_unet_once_a_step_and_everything_else_once(sampler, models):
    unet, steps = models["sd1"].unet, 4
    calls = {"pndm": steps + 1, "heun": 2 * steps - 1}.get(sampler, steps)
    words = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    for scale, times in ((1, 1), (7.5, 2)):
        with counted(unet) as sizes, counted(words) as texts, counted(unet.time_embedding.linear_1) as steps_told:
            draw(models["sd1"], n=3, guidance=scale, sampler=sampler, steps=steps)
        assert sizes == calls * [3 * times] and texts == [3 * times] and steps_told == [steps]


@pytest.mark.parametrize("sampler", ["dpm++2m", "pndm", "heun"])
def test_progress_counts_the_steps_of_the_grid_and_ends_with_the_last(sampler, capsys):
    grid, _ = samplers.grid_for(sampler, Schedule.scaled_linear(), 4)
    network = samplers.Denoiser(lambda x, level: x)
    for level, _ in samplers.by_name[sampler](network, torch.ones(1, 1), grid):
        generation.show_progress(grid, level, time.time())
    lines = [line.split(",")[0] for line in capsys.readouterr().err.split("\r")[1:]]
    assert list(dict.fromkeys(lines)) == [f"step {i} of 4" for i in (1, 2, 3, 4)] and lines == sorted(lines)


def test_guidance_can_start_on_the_way(models):
    sd = models["sd1"]
    with counted(sd.unet) as sizes:
        late = draw(sd, n=3, steps=4, guidance_start=0.4)
    assert sizes == 2 * [3] + 2 * [6]  # the condition alone, then both
    assert error(late, draw(sd, n=3, steps=4)) > 1e-3 and error(late, draw(sd, n=3, steps=4, guidance=1)) > 1e-3
    assert same(draw(sd, steps=4, guidance_start=0), draw(sd, steps=4))  # what a model without a word of it does


# --- pictures in and out --------------------------------------------------------------------------------------------

def test_a_picture_of_any_size_and_any_kind_is_taken_and_resized(models, tmp_path):
    sd, pixels = models["sd1"], torch.randint(0, 256, (30, 41, 4), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy().astype("uint8"), "RGBA")
    image.save(tmp_path / "a.png")
    latents = draw(sd, image=tmp_path / "a.png", strength=0.5)
    assert latents.shape == (1, 4, 8, 10)  # 32 x 40 pixels: the nearest multiples of 4
    assert same(draw(sd, image=str(tmp_path / "a.png"), strength=0.5), latents)
    assert same(draw(sd, image=image, strength=0.5), latents)
    assert draw(sd, image=image, height=16, width=24).shape == (1, 4, 4, 6)
    assert draw(sd, height=16).shape == (1, 4, 4, 8) and draw(sd).shape == (1, 4, 8, 8)  # else the U-Net's own size


@pytest.mark.parametrize("sampler", samplers.by_name)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_keeps_the_known_latents_exactly_and_makes_the_others_anew(sampler, strength, models):
    known = 4 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # far from unit variance: not cut
    mask = torch.zeros(32, 32)
    mask[:, 16:] = 1
    latents = draw(models["sd1"], image=known, mask=mask, sampler=sampler, strength=strength, n=2)
    assert torch.equal(latents[..., :4], known[..., :4].expand(2, -1, -1, -1))
    assert (latents[..., 4:] != known[..., 4:]).float().mean() > 0.99 and float(known.abs().max()) > 8


def test_the_lower_the_strength_the_nearer_the_picture_stays(models):
    known = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = [float((draw(models["sd2"], image=known, steps=10, strength=s) - known).norm()) for s in (1, 0.6, 0.3, 0.1)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.3 * moved[0]


def test_a_mask_hides_the_picture_from_a_network_of_nine_channels(models):
    sd, mask = models["sd1_inpaint"], torch.zeros(1, 1, 32, 32)
    mask[..., :16, :] = 1
    image, seen = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    other = torch.where(mask > 0, -image, image)
    hook = sd.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:1, 4:]))
    pictures = [draw(sd, image=one, mask=mask, strength=1.0) for one in (image, other)]
    hook.remove()
    assert same(*pictures) and len(seen) == 6 and torch.equal(seen[0][:, :1, ::4], mask[..., ::16, ::4])
    assert error(draw(sd, image=image, mask=1 - mask, strength=1.0), pictures[0]) > 0.01
    kinds = (mask[0, 0] > 0, mask[0], Image.fromarray(255 * mask[0, 0].byte().numpy()), mask[..., ::2, ::2])
    for one in kinds:
        assert same(draw(sd, image=image, mask=one, strength=1.0), pictures[0])


def test_latents_tensors_and_pillow_images_are_of_the_same_pictures(models):
    sd = models["sd1"]
    latents, pixels, images = (draw(sd, n=2, output=output) for output in ("latents", "tensor", "pil"))
    assert pixels.shape == (2, 3, 32, 32) and pixels.min() >= -1 and pixels.max() <= 1
    assert error(sd.decode(latents).clamp(-1, 1), pixels) < 1e-6
    levels = ((pixels[1] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert len(images) == 2 and images[1].mode == "RGB" and images[1].size == (32, 32)
    assert abs(np.asarray(images[1]) - levels).max() < 0.51
    assert error(sd.decode(latents, tile=4), sd.decode(latents)) > 0
    assert same(draw(sd, output="tensor", tile=4), sd.decode(draw(sd), tile=4).clamp(-1, 1))


def test_latents_are_scaled_on_the_way_in_and_out(models):
    sd, image = models["sd2"], tiny_sd.golden()["sd2/vae/image_24x32"]
    factor = tiny_sd.info()["sd2"]["vae"]["scaling_factor"]
    mean, logvar = (tiny_sd.golden()[f"sd2/vae/{name}_24x32"] for name in ("mean", "logvar"))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    latents = sd.encode(image, torch.Generator().manual_seed(3))
    assert error(latents, factor * (mean + (0.5 * logvar).exp() * noise)) < 2e-5
    z, wanted = tiny_sd.golden()["sd2/vae/z_24x32"], tiny_sd.golden()["sd2/vae/decoded_24x32"]
    assert error(sd.decode(factor * z), wanted) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype, autoencoder", [("bfloat16", torch.bfloat16), (torch.float16, torch.float32)])
def test_half_precision_draws_nearly_the_same_picture(dtype, autoencoder, folder, models):  # noqa: F811
    sd = nanodiff.load(folder / "sd2", dtype=dtype)
    types = {name: {p.dtype for p in getattr(sd, name).parameters()} for name in ("unet", "autoencoder", "text_model")}
    assert types == {"unet": {stable_diffusion.parse_dtype(dtype)}, "autoencoder": {autoencoder},
                     "text_model": {torch.float32}}
    pixels, wanted = (draw(one, output="tensor", guidance=2) for one in (sd, models["sd2"]))
    assert pixels.dtype == torch.float32 and 0 < float((pixels - wanted).abs().mean()) < 0.05


# --- what goes wrong ------------------------------------------------------------------------------------------------

WRONG = [
    ({"sampler": "dpm++2"}, "nearest: dpm\\+\\+2m"), ({"steps": 0}, "steps is 0"),
    ({"steps": 1001}, "1 to the schedule's 1000"),
    ({"height": 63}, "height is 63; expected a multiple of 4 pixels.*nearest: 64"), ({"width": -4}, "width is -4"),
    ({"strength": 0}, "strength is 0"), ({"strength": 1.2}, "strength is 1.2"),
    ({"output": "image"}, "output \"image\""),
    ({"n": 0}, "n = 0"), ({"prompt": []}, "0 prompts"), ({"prompt": 3}, "a prompt must be text"),
    ({"tile": 1}, "tile is 1"),
    ({"negative": ["a", "b"]}, "2 negative texts were given for 1 prompts"), ({"skip_last": 3}, "skip_last is 3"),
    ({"generator": torch.Generator()}, "a seed and a generator"),
    ({"mask": torch.ones(8, 8)}, "a mask was given without"),
    ({"latents": torch.zeros(1, 4, 8, 9)}, "expected \\[1, 4, 8, 8\\] for 1 pictures of 32x32"),
    ({"eta": 1.0}, '"eta" is no option of dpm'), ({"spacin": "leading"}, "nearest: spacing"),
    ({"guidance_start": 1.0}, "guidance_start is 1.0; expected a share from 0"),
    ({"guidance": float("nan")}, "guidance is nan"), ({"image": torch.full((1, 3, 32, 32), 7.0)}, "goes from 7 to 7"),
    ({"image": torch.zeros(32, 32)}, "shape \\[32, 32\\]"), ({"image": torch.zeros(1, 5, 8, 8)}, "has 5 channels"),
    ({"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "torch.uint8"), ({"image": 3}, "the image is a int"),
    ({"image": torch.zeros(2, 4, 8, 8)}, "2 images were given for 1 pictures"),
    ({"image": torch.zeros(1, 4, 8, 8), "height": 64}, "expected none, or 32 and 32"),
    ({"image": torch.zeros(1, 4, 8, 8), "mask": torch.zeros(2, 8, 8)}, "2 masks were given for 1 pictures"),
]


@pytest.mark.parametrize("options, expected", WRONG, ids=[f"{list(one)[-1]}-{i}" for i, (one, _) in enumerate(WRONG)])
def test_wrong_input_is_told_before_the_unet_is_called(options, expected, models):
    with counted(models["sd1"].unet) as calls, pytest.raises(UserError, match=expected) as told:
        draw(models["sd1"], **options)
    assert not calls and "\n" not in str(told.value)


def test_an_inpainting_network_wants_a_mask_and_the_picture(models):
    with counted(models["sd1_inpaint"].unet) as calls:
        for options in ({}, {"image": torch.zeros(1, 3, 32, 32)}):
            with pytest.raises(UserError, match="takes 9 channels: an inpainting model wants a mask"):
                draw(models["sd1_inpaint"], **options)
        with pytest.raises(UserError, match="wants the picture itself"):
            draw(models["sd1_inpaint"], image=torch.zeros(1, 4, 8, 8), mask=torch.ones(8, 8))
    assert not calls


@pytest.mark.parametrize("path, expected", [
    ("sd3", "nearest: sd[12]"), ("sd1/unet", "cannot be read"), ("", "does not exist")])
def test_a_model_that_is_not_there_is_told_with_the_nearest_name(path, expected, folder):  # noqa: F811
    with pytest.raises(UserError, match=expected):
        nanodiff.load(folder / path if path else "")


def test_numbers_that_are_not_finite_stop_the_run_at_their_step(folder):  # noqa: F811
    sd = nanodiff.load(folder / "sd1")
    sd.autoencoder.decoder.conv_out.bias[1] = float("nan")
    assert draw(sd).isfinite().all()
    for output in ("pil", "tensor"):
        with pytest.raises(Diverged, match="decoded pixels are not finite"):
            draw(sd, output=output)
    calls = []

    def spoil(module, args, out):
        calls.append(len(calls))
        return out.fill_(float("inf")) if len(calls) == 3 else out

    hook = sd.unet.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="^step 3: the latents are not finite"):
        draw(sd, steps=6)
    hook.remove()
    assert len(calls) == 3
    sd.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="^step 1: the latents are not finite"):
        draw(sd)


def test_importing_nanodiff_costs_no_more_than_torch_and_load_is_there(folder):  # noqa: F811
    code = f"""
import sys, torch
before = set(sys.modules)
import nanodiff
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert new == {{"nanodiff"}}, new
sd = nanodiff.load({str(folder / "sd1")!r})
sd.generate("a", steps=1, output="latents", progress=False)
assert not {{"PIL", "scipy", "tifffile", "torch._dynamo"}} & set(sys.modules), "more than a run needs"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
