"""Opens what the fine-tuning scripts write in diffusers, and compares final latents from the same noise with ours.

    pip install diffusers==0.42.1 transformers==5.24.0 peft==0.21.2
    python tests/benchmarks/finetuned_in_diffusers.py [FOLDER ...]

Each FOLDER is a model to teach; if none is named, a tiny SD 1.x with random weights (tests/tiny_sd.py) and data/nano-sd.
A few steps at a high learning rate make a LoRA of the U-Net (in diffusers' and in kohya's names), a LoRA of U-Net and
text encoder, a word of two vectors and a whole model; then both sides take five DDIM steps with guidance 3, in float32.
Printed are the largest difference over the largest latent, beside the bar of 1e-3, and how far the same latents are from
the untaught model's (a file that changes nothing would agree, too). The exit code is 1 where a bar is missed.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import diffusers  # noqa: E402
import transformers  # noqa: E402

import nanodiff  # noqa: E402
import tiny_sd  # noqa: E402
import train_finetune  # noqa: E402
import train_lora  # noqa: E402
import train_textual_inversion  # noqa: E402
from nanodiff.pipelines.stable_diffusion import SHIPPED  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

BAR, STEPS, GUIDANCE = 1e-3, 5, 3.0
PROMPTS = ["a sks texture", "a <new> texture", "a photo of red woven fabric", ""]
LORA = ["--rank=4", "--alpha=3", "--lr=0.02"]  # alpha is not the rank, so that it must be read
RUNS = {  # what is taught: script, flags; files: (name in the table, file)
    "lora": (train_lora, LORA, [("LoRA, diffusers' names", "lora.safetensors"),
                                ("LoRA, kohya's names", "lora.kohya.safetensors")]),
    "text": (train_lora, [*LORA, "--targets=attention,text"], [
        ("LoRA with text encoder, diffusers' names", "lora.safetensors"),
        ("LoRA with text encoder, kohya's names", "lora.kohya.safetensors")]),
    "word": (train_textual_inversion, ["--num_vectors=2", "--lr=0.5"], [("learned word", "learned_embeds.safetensors")]),
    "whole": (train_finetune, ["--lr=0.005", "--train_text", "--instance_prompt=a sks texture"], [("whole model", "model")])}


def teach(script, model, flags, out):
    """A few steps of a training script on drawn pictures, as a user would start it."""
    quick = {"data": "zigzagged", "pictures": 8, "batch": 4, "steps": 6, "warmup": 1, "checkpoint_every": 6,
             "preview_every": 6, "sample_steps": 2, "each": 1, "workers": 1, "device": "cpu", "retention": "a texture"}
    prompt = [] if "word" in out.name or "whole" in out.name else ["--instance_prompt=a sks texture"]
    words = [*(f"--{name}={value}" for name, value in quick.items()), *prompt, *flags]
    with open(out.with_suffix(".txt"), "w") as log:
        shown, sys.stdout = sys.stdout, log
        try:
            script.main([f"--model={model}", f"--out={out}", *words])
        finally:
            sys.stdout = shown


@torch.no_grad()
def ours(model, file, noise):
    """Latents [n,C,h,w] of nanodiff."""
    sd = nanodiff.load(file if file and file.is_dir() else model)
    if file and file.name.startswith("lora"):
        sd.load_lora(file)
    elif file and file.name.startswith("learned"):
        sd.load_embedding(file)
    return sd.generate(PROMPTS, guidance=GUIDANCE, guidance_start=0, steps=STEPS, sampler="ddim", latents=noise,
                       output="latents", seed=0, progress=False)  # they guide all the way


@torch.no_grad()
def theirs(model, file, noise, factor):
    """The same of diffusers."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        file if file and file.is_dir() else model, safety_checker=None, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if file and file.name.startswith("lora"):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    elif file and file.name.startswith("learned"):
        pipe.load_textual_inversion(str(file), token="<new>")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    height, width = (side * factor for side in noise.shape[2:])
    return pipe(PROMPTS, guidance_scale=GUIDANCE, num_inference_steps=STEPS, latents=noise.clone(), height=height,
                width=width, output_type="latent").images


def relative(a, b):
    """The largest difference over the largest magnitude of b."""
    assert a.shape == b.shape, f"{list(a.shape)} beside {list(b.shape)}"
    return float((a - b).abs().max() / b.abs().max())


def rows(model, place):
    """[(what, error, change)] of one model; files are written below `place`."""
    sd = nanodiff.load(model)
    size = sd.settings["unet"]["sample_size"]
    sides = [size, size] if isinstance(size, int) else size
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), sd.unet.config.out_channels, *sides), np.float32)
    noise = torch.from_numpy(noise)
    untaught = theirs(model, None, noise, sd.factor)
    yield "untaught", relative(ours(model, None, noise), untaught), None
    for name, (script, flags, files) in RUNS.items():
        teach(script, model, flags, place / name)
        for what, file in files:
            found = theirs(model, place / name / file, noise, sd.factor)
            yield what, relative(ours(model, place / name / file, noise), found), relative(found, untaught)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="*")
    args = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        if not args.folders:
            tiny_sd.write_model("sd1", place / "tiny SD 1")
        for number, model in enumerate(args.folders or [place / "tiny SD 1", SHIPPED]):
            (place / str(number)).mkdir()
            print(f"{pathlib.Path(model).name:<46}{'error':>10}{'bar':>8}{'change':>10}")
            for what, error, change in rows(str(model), place / str(number)):
                good = error <= BAR and (change is None or change > 10 * BAR)
                missed |= not good
                print(f"  {what:<44}{error:>10.1e}{BAR:>8g}{'' if change is None else f'{change:>10.2f}'}"
                      f"{'' if good else '  missed'}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
