"""How far Stable Diffusion here is from diffusers and transformers: the largest error of every recorded output.

    python tests/benchmarks/parity.py

Two tiny models of the real layouts with random weights (tests/tiny_sd.py); errors are largest absolute differences over
the largest magnitude of the reference. The same comparisons stand in the tests, with their bars.
"""

import pathlib
import sys
import tempfile
import warnings

import torch

import nanodiff
from nanodiff.diffusion import samplers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny_sd  # noqa: E402


def error(ours, reference):
    return float((ours - reference).abs().max() / reference.abs().max())


@torch.no_grad()
def networks(sd, golden, info):
    """{what: error} of the text model, the U-Net and the autoencoder."""
    states, pooled = sd.text_model(golden["text/ids"])
    found = {"token ids that differ": float((sd.tokenizer(info["text"]["prompts"]) != golden["text/ids"]).sum()),
             "text states": error(states, golden["text/states"]), "text pooled": error(pooled, golden["text/pooled"])}
    found["U-Net"] = 0.0
    for key in golden:
        if key.startswith("unet/y_"):
            size, t = key.removeprefix("unet/y_").split("_")
            t = torch.tensor(info["unet"]["mixed"] if t == "mixed" else int(t[1:]))
            y = sd.unet(golden[f"unet/x_{size}"], t, golden["unet/context"])
            found["U-Net"] = max(found["U-Net"], error(y, golden[key]))
    for size in sorted(key.split("_")[1] for key in golden if key.startswith("vae/image_")):
        posterior = sd.autoencoder.encode(golden[f"vae/image_{size}"])
        for what, ours in (("mean", posterior.mean), ("logvar", posterior.logvar),
                           ("decoded", sd.autoencoder.decode(golden[f"vae/z_{size}"]))):
            name = f"autoencoder {what}"
            found[name] = max(found.get(name, 0.0), error(ours, golden[f"vae/{what}_{size}"]))
    return found


def runs(sd, golden, info):
    """{what: error} of whole sampling runs from the recorded noises, and of edits."""
    said, edit = info["sampling"], info["editing"]
    settings = {"prompt": said["prompt"], "negative": said["negative"], "guidance": said["guidance"], "output": "latents",
                "progress": False, "height": said["height"], "width": said["width"]}
    found = {}
    for name in samplers.by_name:
        for steps in (10, 25):
            y = sd.generate(**settings, sampler=name, steps=steps, latents=golden["sampling/x"],
                            noises=golden["sampling/noises"])
            found[f"{name}, {steps} steps"] = error(y, golden[f"sampling/{name}.{steps}"])
    settings |= {"height": edit["height"], "width": edit["width"], "image": golden["editing/latents"],
                 "latents": golden["editing/noise"], "steps": edit["steps"]}
    for name in ("ddim", "dpm++2m"):
        y = sd.generate(**settings, sampler=name, strength=edit["strength"])
        found[f"image to image, {name}"] = error(y, golden[f"editing/img2img/{name}"])
    for strength, key in ((1.0, "ddim"), (0.6, "ddim.0.6")):
        y = sd.generate(**settings, sampler="ddim", strength=strength, mask=golden["editing/mask"])
        found[f"inpainting, strength {strength}"] = error(y, golden[f"editing/inpaint/{key}"])
    return found


@torch.no_grad()
def adapters(sd, golden, info, folder):
    """{what: error} of LoRA files, merged and not, and of learned words."""
    found = {}
    for kind in tiny_sd.LORAS:
        tiny_sd.write_lora(kind, folder / f"{kind}.safetensors")
        for scale in (1.0, 0.5):
            sd.load_lora(folder / f"{kind}.safetensors", scale)
            for state in ("beside the weights", "merged"):
                y = sd.unet(golden["lora/x"], info["lora"]["t"], golden["lora/context"])
                name = f"LoRA, {kind} names, {state}"
                text = sd.encode_text(info["lora"]["prompts"])
                found[name] = max(found.get(name, 0.0), error(y, golden[f"lora/{kind}.{scale}"]),
                                  error(text, golden[f"lora/{kind}.{scale}.text"]))
                sd.merge_lora()
            sd.unload_lora()
    for kind in info["embedding"]["order"]:
        path = folder / tiny_sd.EMBEDDING_FILES[kind]
        tiny_sd.write_embedding(kind, path)
        sd.load_embedding(path)
    ids = sd.tokenizer(info["embedding"]["prompts"])
    found["learned words: ids that differ"] = float((ids != golden["embedding/ids"]).sum())
    found["learned words: text states"] = error(sd.text_model(ids)[0], golden["embedding/states"])
    return found


def main():
    warnings.simplefilter("ignore")  # one of the prompts is too long on purpose
    columns = {}
    for name in tiny_sd.NAMES:
        golden = {key.removeprefix(f"{name}/"): value for key, value in tiny_sd.golden().items()
                  if key.startswith(f"{name}/")}
        info = tiny_sd.info()[name]
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            tiny_sd.write_model(name, folder / "model")
            sd = nanodiff.load(folder / "model")
            columns[name] = networks(sd, golden, info) | runs(sd, golden, info)
            if "lora" in info:
                columns[name] |= adapters(sd, golden, info, folder)
    print(f"{'':36}" + "".join(f"{name:>10}" for name in columns))
    for what in dict.fromkeys(key for column in columns.values() for key in column):
        cells = (column.get(what) for column in columns.values())
        print(f"{what:36}" + "".join(f"{'' if cell is None else format(cell, '.1e'):>10}" for cell in cells))


if __name__ == "__main__":
    main()
