"""Stable Diffusion as one thing: a tokenizer, three networks and a noise schedule; load, generate, save.

    sd = nanodiff.load("stable-diffusion-v1-5")
    pictures = sd.generate("a photo of woven carbon fibre", n=4, seed=0)

A prompt becomes text states; noise is denoised towards them in the latent space of an autoencoder; the latent is
decoded. The tasks themselves, text to image, image to image and in-painting, stand in generation.py.
Source: Rombach et al. 2022 (arXiv 2112.10752); report section 4.1, figure 38.
"""

import os
import warnings

import torch
import torch.nn.functional as F

from nanodiff import fast, rng
from nanodiff.diffusion import samplers
from nanodiff.errors import Diverged, check, nearest
from nanodiff.files import DATA, nearest_file
from nanodiff.formats import embedding_file, lora_file, single_file, stable_diffusion_folder
from nanodiff.formats.diffusers_folder import sampler_options, schedule_from
from nanodiff.formats.weights import parse_dtype
from nanodiff.models import lora
from nanodiff.pipelines import generation

SHIPPED = DATA / "nano-sd"  # the small model that comes with nanodiff
AT_ONCE = 4 * 64 * 64  # latent pixels in one batch: 4 pictures of 512x512, or 64 of 16x16 latents; a quarter to decode


def load(path=None, config=None, dtype="float32", device="cpu", ema=False):
    """A StableDiffusion from a diffusers folder or a .safetensors or .ckpt file of SD 1.x or 2.x (None: SHIPPED).

    config   a diffusers folder that gives the settings and the tokenizer of a single file of unusual size
    dtype    "float32", "bfloat16" or "float16": of the U-Net and, but for float16, the autoencoder; None: the files'
    device   "cpu", "cuda", "cuda:1"
    ema      of a single file with both, take the U-Net's averaged (EMA) weights instead of its last ones
    The weights are mapped into memory and go straight into their modules. Nothing in a file is executed. UserError when
    the file is missing, damaged or of another kind, or a key of it is not used.
    """
    path, dtype = str(SHIPPED if path is None else path), parse_dtype(dtype)
    if os.path.isdir(path):
        check(config is None and not ema, f"{path} is a folder and holds its own settings; expected no config and no "
              "ema")
        checkpoint = stable_diffusion_folder.read_folder(path)
    else:
        what, near = (", the small model of nanodiff,", "") if path == str(SHIPPED) else ("", nearest_file(path))
        check(os.path.isfile(path), f"{path}{what} does not exist; expected a diffusers folder, or a .safetensors or "
              f".ckpt file{near}")
        checkpoint = single_file.read_single_file(path, config, ema)
    # Half the memory and time where the device has such arithmetic. The text model runs once a picture: float32.
    types = {"unet": dtype, "autoencoder": dtype, "text_model": torch.float32 if dtype else None}
    if dtype == torch.float16:
        types["autoencoder"] = torch.float32  # its activations go beyond float16's 65,504: black pictures
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not fast.cpu_has_bfloat16():
        checkpoint.notes.append("this CPU has no bfloat16 arithmetic (avx512_bf16 or amx_bf16): float32 is faster here")
    nets = {name: checkpoint.network(name, kind).to(device) for name, kind in types.items()}
    return StableDiffusion(checkpoint.tokenizer, **nets, settings=checkpoint.settings, notes=checkpoint.notes)


class StableDiffusion:
    """tokenizer, text_model, unet, autoencoder: the parts; schedule, kind ("noise" or "v"): what the U-Net was trained
    with; settings: the checkpoint's own words; notes: what was chosen or left out in loading, a sentence each."""

    def __init__(self, tokenizer, text_model, unet, autoencoder, settings, notes=()):
        self.tokenizer = tokenizer
        self.text_model, self.unet, self.autoencoder = (fast.speed_up(net) for net in (text_model, unet, autoencoder))
        self.settings, self.notes, self.compiled = settings, list(notes), False
        if settings["scheduler"].get("prediction_type", "epsilon") is None:
            single_file.set_prediction(settings, self._probed_prediction())
        self.schedule, self.kind = schedule_from(settings["scheduler"])
        self.guidance, self.guidance_start = settings.get("guidance", 7.5), settings.get("guidance_start", 0.0)
        check(not (self.kind == "noise" and self.schedule.ends_in_pure_noise), "the checkpoint's scheduler settings "
              "ask for zero terminal SNR and for noise prediction, which exclude each other; expected v_prediction")

    @property
    def networks(self):
        """What a LoRA can change."""
        return {"unet": self.unet, "text_model": self.text_model}

    @property
    def device(self):
        return self.text_model.final_layer_norm.weight.device

    @property
    def factor(self):
        """Pixels of a picture's side for one of its latent's."""
        return self.autoencoder.config.factor

    # --- text and pictures, in and out of the latent space -----------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts, skip_last=0):
        """Text states [B, 77, D] of a prompt or a list; skip_last: layers of the text model left out at its end."""
        ids = self.tokenizer(prompts if isinstance(prompts, str) else list(prompts))
        return self.text_model(ids.to(self.device), skip_last)[0]

    @torch.no_grad()
    def encode(self, images, generator=None):
        """Latents [B, C, H/f, W/f] of about unit variance, from the posterior of pictures [B, 3, H, W] in [-1, 1].

        generator: a torch.Generator, or a list with one for each picture.
        """
        return self.posterior(images).sample(generator) * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def posterior(self, images):
        """The autoencoder's distribution of (unscaled) latents for pictures [B, 3, H, W] in [-1, 1], in float32."""
        with fast.packed(self.autoencoder):
            posterior = self.autoencoder.encode(images.to(self.device, self.autoencoder.dtype))
        posterior.mean, posterior.logvar = posterior.mean.float(), posterior.logvar.float()
        return posterior

    @torch.no_grad()
    def decode(self, latents, tile=0):
        """Pictures [B, 3, f h, f w], about in [-1, 1], from latents as `encode` gives them; large ones one at a time.

        tile: side of the latent squares that are decoded by themselves, for large pictures (0: whole).
        """
        z = latents.to(self.device) / self.autoencoder.config.scaling_factor
        z = z.to(self.autoencoder.dtype)  # in half precision a picture would depend on its neighbours in the batch
        at_once = max(1, AT_ONCE // 4 // z[0, 0].numel()) if z.dtype == torch.float32 else 1
        with fast.packed(self.autoencoder):
            return torch.cat([self.autoencoder.decode(some, tile) for some in z.split(at_once)]).float()

    # --- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompt, *, negative="", n=1, steps=25, guidance=None, sampler="dpm++2m", seed=None, height=None,
                 width=None, image=None, strength=0.8, mask=None, latents=None, noises=None, generator=None,
                 output="pil", progress=True, first=0, skip_last=0, tile=0, batch=0, on_step=None,
                 guidance_start=None, **options):
        """Pictures of a prompt, or of each of a list of prompts: n of each, those of the first prompt first.

        negative        what to move away from: one text, or one for each prompt
        guidance        scale of classifier-free guidance (1: off; None: the model's own, 7.5 unless its folder says)
        guidance_start  share of the T time steps, from noise on, in which it does not act (None: the model's own)
        seed            picture i, counted from `first`, depends on the seed and i alone (None: a seed by chance)
        height, width   in pixels, multiples of the autoencoder's factor; default: the image's, or the U-Net's own
        image           start from this: a path, a Pillow image, pixels [B, 3, H, W] in [-1, 1], or latents [B, C, h, w]
        strength        share of the steps that are made on it, above 0 and up to 1
        mask            with image, what to paint anew: a path, a Pillow image or a tensor [.., H, W], white (1) is new.
                        U-Nets of nine channels are shown the rest; with others it is put into every estimate of x0
        latents         noise to start from, [N, C, h, w] of unit variance; noises[i]: the noise that step i adds
        generator       a torch.Generator, or a list with one a picture, instead of a seed
        output          "pil", "tensor" ([N, 3, H, W] in [-1, 1]) or "latents" ([N, C, h, w])
        skip_last       layers of the text model left out at its end
        tile            see `decode`; batch: pictures at once (0: by size)
        on_step         called as on_step(i, t, x) with every state: signal * x0 + noise * N(0, 1)
        options         of the sampler and its grid, such as eta or spacing
        UserError for wrong input, before any work; Diverged, with the step, when a latent or a pixel is not finite.
        Source: report figure 38; of the tasks, see generation.py.
        """
        prompts, negatives = generation.pair_texts(prompt, negative, n)
        guidance = self.guidance if guidance is None else guidance
        guidance_start = self.guidance_start if guidance_start is None else guidance_start
        generation.check_run(self, sampler, steps, guidance, guidance_start, strength, options)
        generation.check_output(self, output, skip_last, tile)
        total = n * len(prompts)
        noise = generation.Noise(total, self.device, seed, first, generator, noises)
        texts = [self.encode_text(each, skip_last).repeat_interleave(n, 0) for each in (prompts, negatives)]
        edit = generation.read_edit(self, image, mask, (height, width), noise)
        shape = generation.latent_shape(self, height, width) if image is None else edit[0].shape[1:]
        start = generation.first_noise(self, latents, shape, noise)

        task = (generation.text_to_image if image is None else
                generation.image_to_image if mask is None else generation.inpaint)
        options = {**sampler_options(self.settings["scheduler"], sampler), **options}
        grid, options = samplers.grid_for(sampler, self.schedule, steps, **options)
        run = generation.Run(sampler, grid, options, guidance, guidance_start, strength, on_step, progress)
        z = []
        with fast.packed(self.unet):
            at_once = batch or max(1, AT_ONCE // (shape[1] * shape[2]))
            for rows in torch.arange(total, device=self.device).split(at_once):
                some_edit = [part if part is None else part.expand(total, -1, -1, -1)[rows] for part in edit]
                z.append(task(self, run, generation.Batch([states[rows] for states in texts], start[rows],
                                                          noise.of_steps(rows, shape), *some_edit)))
        return self._as_output(torch.cat(z), output, tile)

    def _as_output(self, latents, output, tile):
        """Latents as what `generate` was asked for: "pil", "tensor" or "latents"."""
        if output == "latents":
            return latents
        pictures = self.decode(latents, tile)
        if not bool(pictures.isfinite().all()):
            raise Diverged("the decoded pixels are not finite, although the latents are: expected dtype float32 or "
                           "bfloat16, which the autoencoder does not overflow")
        if output == "tensor":
            return pictures.clamp(-1, 1)
        from nanodiff.plots import to_pil
        return [to_pil(picture) for picture in pictures]

    def compile(self, graph=False):
        """torch.compile for the U-Net; graph: also record a step as a CUDA graph, for one size of picture."""
        fast.plain(self.unet).compile(mode="reduce-overhead" if graph else None)
        self.compiled = True

    @torch.no_grad()
    def _probed_prediction(self):
        """Whether the U-Net predicts noise or v, where nothing says so.

        At the last step the picture is almost all noise. A prediction of noise gives it back; v = signal * noise -
        sigma * x0 is then almost -x0.
        """
        schedule, _ = schedule_from({**self.settings["scheduler"], "prediction_type": "epsilon"})
        dtype, config = self.unet.dtype, self.unet.config
        x = rng.normal(0, 0, torch.arange(1, device=self.device), (config.out_channels, 32, 32))
        seen = F.pad(x, (0, 0, 0, 0, 0, config.in_channels - config.out_channels))
        seen[:, config.out_channels : config.out_channels + 1] = 1  # the mask of an inpainting model: nothing is known
        y = self.unet(seen.to(dtype), schedule.T - 1, self.encode_text("").to(dtype)).float()
        likeness = float((x * y).sum() / (x.norm() * y.norm()))
        found = "epsilon" if likeness > 0.5 else "v_prediction"
        self.notes.append(f"nothing in the checkpoint says what its U-Net predicts: {found} was taken, because at the "
                          f"last step its output resembles its input by {likeness:.2f} (noise prediction: near 1)")
        return found

    # --- LoRA, words of one's own, saving ----------------------------------------------------------------------------

    def load_lora(self, path, scale=1.0, name=None):
        """Add a LoRA file (diffusers, peft or kohya names) to the networks, beside those that are there already.

        name: what to call it from now on (default: the file's own without its ending).
        Returns {"layers": {network: count}, "change": {network: size}, "overall": size}; size is the norm of the change
        over that of the weights it changes. UserError when a key is not used or a layer does not fit; nothing changes.
        """
        parts = lora_file.read_lora(path, self.networks)
        report = lora.attach(self.networks, parts, name or os.path.splitext(os.path.basename(path))[0], scale)
        for net in self.networks.values():
            fast.speed_up(net)
        if report["overall"] == 0:
            warnings.warn(f"{path} was loaded, but changes nothing: its weights or its scale are 0")
        return report

    def unload_lora(self, name=None):
        """Take a LoRA (None: all) away; the weights are those of before, bit for bit."""
        if name is not None or lora.names(self.networks):
            lora.detach(self.networks, name)

    def merge_lora(self, name=None):
        """Work a LoRA (None: all) into the weights: no cost in generation. `unload_lora` still takes it out again."""
        lora.merge(self.networks, name)

    def load_embedding(self, path, word=None):
        """Add the words of a textual-inversion file to tokenizer and text model; word: another name for its only one.

        Returns {word: ids}. UserError when a word is known already or its vectors are of another width.
        """
        found = embedding_file.read_embeddings(path, word)
        rows, width = self.text_model.config.vocab_size, next(iter(found.values())).shape[1]
        check(len(self.tokenizer) == rows, f"the tokenizer has {len(self.tokenizer)} tokens and the text model {rows}; "
              "expected as many of one as of the other before a word is added")
        check(width == self.text_model.config.width, f"{path}: its vectors have {width} numbers; expected "
              f"{self.text_model.config.width}, the width of this model's text encoder")
        ids = {}
        for one, vectors in found.items():
            ids[one] = self.tokenizer.add_word(one, len(vectors))
            self.text_model.add_rows(vectors)
        return ids

    def save(self, path, layout="diffusers", dtype=None):
        """Write the model as a diffusers folder or ("single") as one safetensors file in CompVis' names.

        dtype: of the weights in the file, such as "float16" (None: as they are). Merged LoRAs are saved in the weights.
        UserError while a LoRA is loaded and not merged.
        """
        dtype = parse_dtype(dtype)
        check(layout == "single" or not str(path).endswith(".safetensors"), f'{path} looks like a file, and the layout '
              '"diffusers" is a folder; expected layout="single", or another name')
        check(layout in ("diffusers", "single"), f'layout "{layout}" is unknown; expected diffusers or single'
              + nearest(layout, ("diffusers", "single")))
        adapters = [adapter for _, _, layer in lora.lora_layers(self.networks) for adapter in layer.adapters]
        unmerged = sorted({adapter.name for adapter in adapters if not adapter.merged})
        check(not unmerged, f'LoRA "{", ".join(unmerged)}" is loaded but not part of the weights; expected '
              "merge_lora() or unload_lora() before save()")
        settings = {**self.settings, "text_encoder": {**self.settings["text_encoder"],
                                                      "vocab_size": self.text_model.config.vocab_size}}
        weights = {name: {key: tensor.to(dtype or tensor.dtype) for key, tensor in lora.merged_state_dict(net).items()}
                   for name, net in {**self.networks, "autoencoder": self.autoencoder}.items()}
        write = stable_diffusion_folder.write_checkpoint if layout == "diffusers" else single_file.write_single_file
        write(stable_diffusion_folder.Checkpoint(settings, weights, self.tokenizer), str(path))
