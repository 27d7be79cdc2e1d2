"""What diffusers, transformers and peft make of the models in tests/tiny_sd.py, and facts of the full-size ones.

    pip install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 && python tests/golden/make_stable_diffusion.py

Writes stable_diffusion.safetensors and stable_diffusion.json. The models are written as a user's folder, opened with
`from_pretrained`, and found to hold what was drawn. Everything is computed in float32 on one thread.
"""

import copy
import functools
import json
import os
import pathlib
import tempfile

import numpy as np
import torch
from peers import (components, diffusers, full_size, ids_of, normal, open_model, peft, randn_from, shapes_of, tiny_sd,
                   transformers)
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
PIPELINES = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"

PROMPTS = ["", "a photo of dtd_spiralled texture", "A Photo, of  a woven   fabric!",
           "naïve café, 3.14159 + 2,000 = 50%", " ".join(["word"] * 75),
           "a very long prompt that goes on about threads, " * 9]
CONTEXT = ["a photo of dtd_braided texture", "sks"]
PICTURE = {"sd1": ("a photo of dtd_honeycombed texture", ""),
           "sd2": ("a close-up photo of sks fabric, 4k", "blurry, low quality")}
SIZES = {"sd1": [(8, 12), (7, 10)], "sd2": [(16, 8), (10, 13)]}  # the second needs every upsampler to aim at its skip
IMAGE_SIZES = [(24, 32), (20, 12)]
TIMES, MIXED = (0, 1, 500, 999), (1, 500)
FIRST = "down_blocks.0.attentions.0"
BLOCKS = {"sd1": ["time_embedding", "conv_in", "down_blocks.0.resnets.0", FIRST, FIRST + ".transformer_blocks.0.attn1",
                  FIRST + ".transformer_blocks.0.attn2", FIRST + ".transformer_blocks.0.ff",
                  "down_blocks.0.downsamplers.0", "down_blocks.1.attentions.0", "down_blocks.2.resnets.0",
                  "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.1",
                  "up_blocks.0.upsamplers.0", "up_blocks.1.attentions.1", "up_blocks.2.attentions.1", "conv_norm_out"]}
BLOCKS["sd2"] = BLOCKS["sd1"] + ["down_blocks.1.resnets.1", "down_blocks.2.attentions.1", "up_blocks.3.attentions.2"]
SAMPLERS = {  # the diffusers class and what is changed in the model's own scheduler settings
    "ddpm": ("DDPMScheduler", {}), "ddim": ("DDIMScheduler", {}), "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}), "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}), "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SCHEDULER_MODULES = {"ddpm": "ddpm", "ddim": "ddim", "euler_a": "euler_ancestral_discrete"}  # that draw noise
GUIDANCE = 7.5
EMBEDDING_PROMPTS = ["a photo of <fibre> texture, 4k", "a sinuous pattern of <knit> and <fibre>",
                     "plain words, then <knit>"]


# --- the parts of the golden file ------------------------------------------------------------------------------------

def text(pipe):
    ids = ids_of(pipe, PROMPTS)
    out = pipe.text_encoder(ids, output_hidden_states=True)
    norm = pipe.text_encoder.get_submodule("final_layer_norm")
    assert torch.equal(norm(out.hidden_states[-1]), out.last_hidden_state)
    return {"text/ids": ids, "text/states": out.last_hidden_state, "text/pooled": out.pooler_output,
            "text/skip1": norm(out.hidden_states[-2])}, {"prompts": PROMPTS}


def unet(name, pipe, rng):
    net, store = pipe.unet, {"unet/context": pipe.text_encoder(ids_of(pipe, CONTEXT)).last_hidden_state}
    context, exact, error = store["unet/context"], copy.deepcopy(pipe.unet).double(), 0
    for height, width in SIZES[name]:
        size, x = f"{height}x{width}", normal(rng, 2, 4, height, width)
        store[f"unet/x_{size}"] = x
        for t in (*TIMES, MIXED):
            key = "mixed" if t is MIXED else f"t{t}"
            y = net(x, torch.tensor(t), context).sample
            store[f"unet/y_{size}_{key}"] = y
            error = max(error, (exact(x.double(), torch.tensor(t), context.double()).sample - y).abs().max().item())
    case = "{}x{}".format(*SIZES[name][0])
    x, y = store[f"unet/x_{case}"], store[f"unet/y_{case}_t500"]
    hooks = [net.get_submodule(block).register_forward_hook(
        lambda module, args, out, key="unet/block/" + block: store.update(
            {key: (out[0] if isinstance(out, tuple) else out)[:1].clone()})) for block in BLOCKS[name]]
    net(x, 500, context)
    for hook in hooks:
        hook.remove()
    return store, {"context": CONTEXT, "t": TIMES, "mixed": MIXED, "block_case": case + "_t500",
                   "float32_minus_float64": error, "largest": y.abs().max().item(),
                   "effect_of_the_other_prompt": (net(x, 500, context.flip(0)).sample - y).abs().max().item()}


def vae(pipe, rng):
    store, net, exact, error = {}, pipe.vae, copy.deepcopy(pipe.vae).double(), 0
    for height, width in IMAGE_SIZES:
        coarse = normal(rng, 1, 3, height // 4, width // 4)
        image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        image = (0.5 * image + 0.1 * normal(rng, 1, 3, height, width)).clamp(-1, 1)
        latent = net.encode(image).latent_dist
        z = normal(rng, *latent.mean.shape)
        decoded = net.decode(z).sample
        error = max(error, (exact.decode(z.double()).sample - decoded).abs().max().item(),
                    (exact.encode(image.double()).latent_dist.mean - latent.mean).abs().max().item())
        store |= {f"vae/{key}_{height}x{width}": value for key, value in {
            "image": image, "mean": latent.mean, "logvar": latent.logvar, "z": z, "decoded": decoded}.items()}
    return store, {"scaling_factor": net.config.scaling_factor, "float32_minus_float64": error}


def scheduler_of(name, sampler):
    kind, change = SAMPLERS[sampler]
    return getattr(diffusers, kind).from_config(tiny_sd.SETTINGS[name]["scheduler"], **change)


def sample(name, pipe, context, x, noises, sampler, steps):
    """(states: the start and after each call of the scheduler, the scheduler, the number of noises used)."""
    pipe.scheduler, states = scheduler_of(name, sampler), []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def watched(output, t, state, *args, **kwargs):
        states.extend([] if states else [state])
        result = step(output, t, state, *args, **kwargs)
        states.append(result[0])
        return result

    pipe.scheduler.step = watched
    module = "diffusers.schedulers.scheduling_" + SCHEDULER_MODULES.get(sampler, "ddpm")
    with randn_from(module, noises) as taken:
        factor = pipe.vae_scale_factor
        final = pipe(prompt_embeds=context[1:], negative_prompt_embeds=context[:1], guidance_scale=GUIDANCE,
                     num_inference_steps=steps, latents=x.clone(), height=x.shape[2] * factor,
                     width=x.shape[3] * factor, output_type="latent").images
    assert torch.equal(final, states[-1]) and torch.isfinite(final).all()
    return torch.stack(states), pipe.scheduler, len(taken)


def sampling(name, pipe, rng):
    prompt, negative = PICTURE[name]
    context = torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)[1::-1])
    x, noises = normal(rng, 1, 4, 8, 8), normal(rng, 26, 1, 4, 8, 8)
    store = {"sampling/x": x, "sampling/noises": noises, "sampling/context": context}
    facts = {"prompt": prompt, "negative": negative, "guidance": GUIDANCE, "height": 8 * pipe.vae_scale_factor,
             "width": 8 * pipe.vae_scale_factor, "runs": {}}
    nudge = 1e-5 * normal(rng, 1, 4, 8, 8)
    for sampler in SAMPLERS:
        for steps in (10, 25):
            states, scheduler, used = sample(name, pipe, context, x, noises, sampler, steps)
            nudged, _, _ = sample(name, pipe, context, x + nudge, noises, sampler, steps)
            store[f"sampling/{sampler}.{steps}"] = states[-1]
            if (sampler, steps) == ("ddim", 10):
                store["sampling/ddim.10.states"] = states
            start = states[0] - nudged[0]
            facts["runs"][f"{sampler}.{steps}"] = {
                "scheduler": SAMPLERS[sampler], "t": [round(float(t), 6) for t in scheduler.timesteps],
                "init_noise_sigma": float(scheduler.init_noise_sigma), "noises_used": used,
                "largest": states[-1].abs().max().item(),
                "growth_of_a_small_change": ((states[-1] - nudged[-1]).abs().max() / start.abs().max()).item()}
    return store, facts


def editing(name, pipe, rng, context, inpainting_unet=None):
    """Image to image, and inpainting with the 4-channel U-Net or the 9-channel one."""
    factor, side = pipe.vae_scale_factor, 8 * pipe.vae_scale_factor
    image = torch.nn.functional.interpolate(normal(rng, 1, 3, 6, 6), size=(side, side), mode="bilinear").clamp(-1, 1)
    posterior_noise, noise = normal(rng, 1, 4, 8, 8), normal(rng, 1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:7, 3:6] = 1
    mask[..., 0, 7] = 1

    def encoded(picture):
        latent = pipe.vae.encode(picture).latent_dist
        return (latent.mean + latent.std * posterior_noise) * pipe.vae.config.scaling_factor

    pixels = mask.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    latents, masked = encoded(image), encoded(image * (pixels < 0.5))
    store = {"image": image, "posterior_noise": posterior_noise, "latents": latents, "noise": noise, "mask": pixels,
             "mask_latents": mask, "masked_latents": masked}
    call = {"prompt_embeds": context[1:], "negative_prompt_embeds": context[:1], "guidance_scale": GUIDANCE,
            "num_inference_steps": 10, "output_type": "latent"}
    for sampler in ("ddim", "dpm++2m"):
        edit = diffusers.StableDiffusionImg2ImgPipeline(**components(pipe, scheduler=scheduler_of(name, sampler)))
        edit.set_progress_bar_config(disable=True)
        with randn_from(PIPELINES + "_img2img", [noise]):
            store["img2img/" + sampler] = edit(image=latents, strength=0.6, **call).images
    for key, net, strength in (("inpaint/ddim", pipe.unet, 1.0), ("inpaint/ddim.0.6", pipe.unet, 0.6),
                               ("inpaint9/ddim", inpainting_unet, 1.0)):
        if net is None:
            continue
        fill = diffusers.StableDiffusionInpaintPipeline(
            **components(pipe, unet=net, scheduler=scheduler_of(name, "ddim")))
        fill.set_progress_bar_config(disable=True)
        with randn_from(PIPELINES + "_inpaint", [noise]):
            store[key] = fill(image=latents, mask_image=pixels, masked_image_latents=masked, strength=strength,
                              height=side, width=side, **call).images
    outside = (mask == 0).expand_as(latents)
    assert torch.equal(store["inpaint/ddim"][outside], latents[outside])
    return {"editing/" + k: v for k, v in store.items()}, \
        {"strength": 0.6, "steps": 10, "height": side, "width": side}


# --- what is added to a model ----------------------------------------------------------------------------------------

def merged(pipe, parts, scale):
    """Copies of the U-Net and the text encoder with W + scale * alpha / rank * up @ down, made by hand in float32."""
    nets = {"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}
    for network, layer, down, up, alpha in parts:
        factor = scale * (1 if alpha is None else alpha / len(down))
        weight = nets[network].get_submodule(layer).weight
        weight += factor * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return nets


def lora(pipe, shapes, folder, rng):
    x = normal(rng, 2, 4, 8, 8)
    ids = ids_of(pipe, CONTEXT)
    context = pipe.text_encoder(ids).last_hidden_state
    base = pipe.unet(x, 500, context).sample
    store = {"lora/x": x, "lora/context": context, "lora/base": base}
    facts = {"t": 500, "prompts": CONTEXT, "files": {}}
    for kind in tiny_sd.LORAS:
        path, parts = folder / (kind + ".safetensors"), tiny_sd.lora_parts(kind, shapes)
        tiny_sd.write_lora(kind, path, shapes)
        note = facts["files"][kind] = {"parts": len(parts), "diffusers_differs_by": {}, "effect": {}}
        note["norm_of_the_change"] = {network: sum(
            ((1 if a is None else a / len(d)) * (u.flatten(1) @ d.flatten(1))).double().square().sum().item()
            for n, _, d, u, a in parts if n == network) ** 0.5 for network in ("unet", "text_encoder")}
        if kind == "kohya":  # diffusers gives a layer without alpha the commonest alpha of the file, not its rank
            tensors = load_file(path)
            key = "lora_unet_" + tiny_sd.NO_ALPHA.replace(".", "_")
            save_file(tensors | {key + ".alpha": torch.tensor(float(len(tensors[key + ".lora_down.weight"])))},
                      folder / "complete.safetensors")
            files = {"": "complete.safetensors", " without the added alpha": path.name}
        else:
            files = {"": path.name}
        for scale in (1.0, 0.5):
            nets = merged(pipe, parts, scale)
            key = f"lora/{kind}.{scale}"
            store[key], store[key + ".text"] = nets["unet"](x, 500, context).sample, \
                nets["text_encoder"](ids).last_hidden_state
            note["effect"][scale] = {"unet": (store[key] - base).abs().max().item(),
                                     "text": (store[key + ".text"] - context).abs().max().item()}
            for title, file in files.items():
                theirs = diffusers.StableDiffusionPipeline(**components(
                    pipe, unet=copy.deepcopy(pipe.unet), text_encoder=copy.deepcopy(pipe.text_encoder)))
                theirs.load_lora_weights(folder, weight_name=file, adapter_name="x", local_files_only=True)
                theirs.set_adapters(["x"], [scale])
                note["diffusers_differs_by"][f"{scale}{title}"] = {
                    "unet": (theirs.unet(x, 500, context).sample - store[key]).abs().max().item(),
                    "text": (theirs.text_encoder(ids).last_hidden_state - store[key + ".text"]).abs().max().item()}
    return store, facts


def embedding(name, folder, shapes, out):
    pipe = open_model(name, out, shapes)
    base = pipe.text_encoder.get_input_embeddings().weight.clone()
    for kind in tiny_sd.EMBEDDINGS:
        tiny_sd.write_embedding(kind, folder / tiny_sd.EMBEDDING_FILES[kind])
        word = tiny_sd.embedding(kind)[0] if kind == "emb_params" else None
        pipe.load_textual_inversion(
            folder, weight_name=tiny_sd.EMBEDDING_FILES[kind], token=word, local_files_only=True)
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table, torch.cat([base, *(tiny_sd.embedding(kind)[1] for kind in tiny_sd.EMBEDDINGS)]))
    expanded = [pipe.maybe_convert_prompt(p, pipe.tokenizer) for p in EMBEDDING_PROMPTS]
    ids = ids_of(pipe, expanded)
    return {"embedding/ids": ids, "embedding/states": pipe.text_encoder(ids).last_hidden_state}, {
        "prompts": EMBEDDING_PROMPTS, "expanded": expanded, "order": list(tiny_sd.EMBEDDINGS),
        "words": {token: pipe.tokenizer.convert_tokens_to_ids(token) for token in pipe.tokenizer.get_added_vocab()
                  if not token.startswith("<|")}}


COMMENT = {
    "text/skip1": "the final layer norm of the state before the last layer: diffusers' clip_skip=1",
    "unet/y": "y_<size>_t<t> = unet(x_<size>, t, context); mixed: one t for each item; unet/block/<module>: its output "
              "for the first item at block_case",
    "vae": "decoded = decode(z); no scaling factor in either direction",
    "sampling": "StableDiffusionPipeline from x of unit variance, times init_noise_sigma; the i-th noise that is drawn "
                "is noises[i]; context holds the negative prompt's states, then the prompt's; states: the start, then "
                "after every call of the scheduler",
    "editing": "latents = scaling_factor * (mean + std * posterior_noise) of image; masked_latents: the same of the "
               "image whose pixels under mask are 0; mask is 1 where the picture is to be made anew; of each block of "
               "pixels diffusers takes the top left one (here all of a block are equal). img2img: start at the 5th of "
               "10 steps, latents noised with noise. inpaint: with strength 1 from noise alone, below 1 as in img2img; "
               "after each step the part where mask is 0 becomes latents noised, with the same noise, to the next "
               "step's t, after the last step latents themselves. inpaint9: the U-Net sees "
               "[x, mask_latents, masked_latents] as its 9 channels, and nothing is put back",
    "lora": "W + scale * alpha / rank * up @ down by hand, alpha = rank where the file has none; .text: the text "
            "states with the text encoder's part merged; the U-Net is given lora/context, the states without it",
    "full_size": 'sha256 of the sorted lines "name [shape]" joined by newlines, text names without "text_model."',
}


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, peft, np)}
    facts = {"versions": versions, "comment": COMMENT, "full_size": full_size()}
    facts["shapes"] = {name: shapes_of(name) for name in tiny_sd.SETTINGS}
    store = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for seed, name in enumerate(tiny_sd.NAMES):
            rng, shapes = np.random.default_rng(1000 + seed), facts["shapes"][name]
            pipe = open_model(name, folder / name, shapes)
            parts = {"text": text(pipe), "unet": unet(name, pipe, rng), "vae": vae(pipe, rng),
                     "sampling": sampling(name, pipe, rng)}
            nine = None
            if name == "sd1":
                nine = open_model("sd1_inpaint", folder / "nine", facts["shapes"]["sd1_inpaint"]).unet
            parts["editing"] = editing(name, pipe, rng, parts["sampling"][0]["sampling/context"], nine)
            if name == "sd1":
                parts["lora"] = lora(pipe, shapes, folder, rng)
                parts["embedding"] = embedding(name, folder, shapes, folder / name)
            for tensors, _ in parts.values():
                store |= {f"{name}/{key}": value.detach().contiguous().clone() for key, value in tensors.items()}
            facts[name] = {part: content for part, (_, content) in parts.items()}
    save_file(store, HERE / "stable_diffusion.safetensors")
    os.chmod(HERE / "stable_diffusion.safetensors", 0o644)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    (HERE / "stable_diffusion.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
