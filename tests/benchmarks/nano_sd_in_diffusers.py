"""Opens a Stable Diffusion folder in diffusers, strictly, and compares whole runs of it with ours.

    pip install diffusers==0.42.1 transformers==5.23.0
    python tests/benchmarks/nano_sd_in_diffusers.py [FOLDER]

FOLDER is data/nano-sd if none is named. Every part must load without a missing, unexpected or misshapen weight. Then
both sides start from the same noises, in float32 with guidance 3: 50 steps of DDIM and 20 of DPM-Solver++ (2M), as the
folder's own scheduler settings have them. Printed is the largest absolute difference of the final latents, beside the
bar of 1e-3; the exit code is 1 where something is left over or a difference is above the bar.
"""

import argparse
import os
import sys
import warnings

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import transformers  # noqa: E402

import nanodiff  # noqa: E402
from nanodiff.pipelines.stable_diffusion import SHIPPED  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

BAR = 1e-3
PARTS = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
         "text_encoder": transformers.CLIPTextModel}
RUNS = [("ddim", 50, diffusers.DDIMScheduler), ("dpm++2m", 20, diffusers.DPMSolverMultistepScheduler)]
PROMPTS = ["a photo of red woven fabric", "a photo of dtd_spiralled texture, blue and white", "a green circle", ""]


def open_strictly(folder):
    """The pipeline in float32; ends the script, with a line for each, where a weight does not fit."""
    kept = {"torch_dtype": torch.float32, "local_files_only": True}
    wrong, parts = [], {}
    for part, kind in PARTS.items():
        parts[part], report = kind.from_pretrained(folder, subfolder=part, output_loading_info=True, **kept)
        wrong += [f"{part}: {what}: {sorted(map(str, found))}" for what, found in report.items() if found]
        weights = list(parts[part].parameters())
        print(f"{part:14}{sum(p.numel() for p in weights):>13,} parameters in {len(weights)} tensors")
    if wrong:
        sys.exit("\n".join(wrong))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **kept)
    for part, net in parts.items():
        held = getattr(pipe, part).state_dict()
        assert all(torch.equal(held[key], value) for key, value in net.state_dict().items()), part
    print("nothing missing, unexpected or misshapen in any part")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def differences(pipe, sd, prompts, guidance, seed=0):
    """{what: largest absolute difference} of token ids, text states, and the latents and pictures of every run."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    found = {"token ids": float((ids != sd.tokenizer(prompts)).sum())}
    found["text states"] = largest(pipe.text_encoder(ids).last_hidden_state, sd.encode_text(prompts))
    size = sd.settings["unet"]["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.standard_normal((len(prompts), sd.unet.config.out_channels, *sides), np.float32))
    settings = pipe.scheduler.config
    for sampler, steps, scheduler in RUNS:
        pipe.scheduler = scheduler.from_config(settings)
        theirs = pipe(prompts, guidance_scale=guidance, num_inference_steps=steps, latents=noise.clone(),
                      height=sides[0] * sd.factor, width=sides[1] * sd.factor, output_type="latent").images
        ours = sd.generate(prompts, guidance=guidance, guidance_start=0, steps=steps, sampler=sampler, latents=noise,
                           output="latents", seed=seed, progress=False)  # they guide all the way
        name = f"{sampler}, {steps} steps"
        found[f"{name}: latents"] = largest(theirs, ours)
        found[f"{name}: largest latent itself"] = float(theirs.abs().max())
        found[f"{name}: pictures"] = largest(
            pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample, sd.decode(ours))
    return found


def largest(a, b):
    assert a.shape == b.shape, f"{list(a.shape)} beside {list(b.shape)}"
    return float((a - b).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(SHIPPED))
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    args = parser.parse_args()
    if not os.path.isdir(args.folder):
        sys.exit(f"error: {args.folder} is no folder; expected a diffusers folder of Stable Diffusion")
    pipe = open_strictly(args.folder)
    settings = {key: pipe.scheduler.config.get(key) for key in ("prediction_type", "timestep_spacing",
                                                                "rescale_betas_zero_snr")}
    print(f"{pipe.scheduler.__class__.__name__}: {settings}, guidance {args.guidance:g}, {len(args.prompts)} prompts")
    found = differences(pipe, nanodiff.load(args.folder), args.prompts, args.guidance)
    for what, value in found.items():
        bar = f"  (bar {BAR:g})" if what.endswith(": latents") else ""
        print(f"{what:38}{value:10.2g}{bar}")
    above = [what for what, value in found.items() if what.endswith(": latents") and not value <= BAR]
    sys.exit(1 if above or found["token ids"] else 0)


if __name__ == "__main__":
    main()
