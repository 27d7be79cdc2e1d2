"""Stable Diffusion as one thing: a tokenizer, three networks and a noise schedule; load, generate, save.

    sd = nanodiff.load("stable-diffusion-v1-5")
    pictures = sd.generate("a photo of woven carbon fibre", n=4, seed=0)

A prompt becomes text states; noise is denoised towards them in the latent space of an autoencoder; the latent is decoded.
Source: Rombach et al. 2022 (arXiv 2112.10752); report section 4.1, figure 38.
"""

import os
import sys
import time
import warnings

import torch
import torch.nn.functional as F

from nanodiff import fast, rng
from nanodiff.diffusion import guidance as guiding, process, samplers
from nanodiff.errors import Diverged, check, check_finite, nearest
from nanodiff.files import DATA, nearest_file
from nanodiff.formats import embedding_file, lora_file, single_file, stable_diffusion_folder
from nanodiff.formats.diffusers_folder import sampler_options, schedule_from
from nanodiff.formats.weights import parse_dtype
from nanodiff.models import lora

SHIPPED = DATA / "nano-sd"  # the small model that comes with nanodiff
AT_ONCE = 4 * 64 * 64  # latent pixels in one batch: 4 pictures of 512x512, or 64 of 16x16 latents; a quarter to decode


def load(path=None, config=None, dtype="float32", device="cpu", ema=False):
    """A StableDiffusion from a diffusers folder or a .safetensors or .ckpt file of SD 1.x or 2.x (None: SHIPPED).

    config   a diffusers folder that gives the settings and the tokenizer of a single file of unusual size
    dtype    "float32", "bfloat16" or "float16": of the U-Net and, but for float16, the autoencoder; None: as in the files
    device   "cpu", "cuda", "cuda:1"
    ema      of a single file with both, take the U-Net's averaged (EMA) weights instead of its last ones
    The weights are mapped into memory and go straight into their modules. Nothing in a file is executed. UserError when
    the file is missing, damaged or of another kind, or a key of it is not used.
    """
    path, dtype = str(SHIPPED if path is None else path), parse_dtype(dtype)
    if os.path.isdir(path):
        check(config is None and not ema, f"{path} is a folder and holds its own settings; expected no config and no ema")
        checkpoint = stable_diffusion_folder.read_folder(path)
    else:
        what, near = (", the small model of nanodiff,", "") if path == str(SHIPPED) else ("", nearest_file(path))
        check(os.path.isfile(path), f"{path}{what} does not exist; expected a diffusers folder, or a .safetensors or "
              f".ckpt file{near}")
        checkpoint = single_file.read_single_file(path, config, ema)
    # Half the memory and time where the device has such arithmetic. The text model stays float32: it runs once a picture.
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
        check(not (self.kind == "noise" and self.schedule.ends_in_pure_noise), "the checkpoint's scheduler settings ask "
              "for zero terminal SNR and for noise prediction, which exclude each other; expected v_prediction")

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

    # --- text and pictures, in and out of the latent space --------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts, skip_last=0):
        """Text states [B, 77, D] of a prompt or a list; skip_last: layers of the text model left out at its end."""
        ids = self.tokenizer(prompts if isinstance(prompts, str) else list(prompts))
        return self.text_model(ids.to(self.device), skip_last)[0]

    @torch.no_grad()
    def encode(self, images, generator=None):
        """Latents [B, C, H/f, W/f] of about unit variance from pictures [B, 3, H, W] in [-1, 1]: a draw from the posterior.

        generator: a torch.Generator, or a list with one for each picture.
        """
        return self._posterior(images).sample(generator) * self.autoencoder.config.scaling_factor

    def _posterior(self, images):
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

    # --- generation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompt, *, negative="", n=1, steps=25, guidance=None, sampler="dpm++2m", seed=None, height=None,
                 width=None, image=None, strength=0.8, mask=None, latents=None, noises=None, generator=None, output="pil",
                 progress=True, first=0, skip_last=0, tile=0, batch=0, on_step=None, guidance_start=None, **options):
        """Pictures of a prompt, or of each of a list of prompts: n of each, those of the first prompt first.

        negative        what to move away from: one text, or one for each prompt
        guidance        scale of classifier-free guidance (1: off; None: the model's own, 7.5 unless its folder has another)
        guidance_start  share of the T time steps, from noise on, in which it does not act (None: the model's own)
        seed            picture i, counted from `first`, depends on the seed and i alone (None: a seed by chance)
        height, width   in pixels, multiples of the autoencoder's factor; default: the image's, or the U-Net's own
        image           start from this picture: a path, a Pillow image, [B, 3, H, W] in [-1, 1], or latents [B, C, h, w]
        strength        share of the steps that are made on it, above 0 and up to 1
        mask            with image, what to paint anew: a path, a Pillow image or a tensor [.., H, W], white (1) is new.
                        U-Nets of nine channels are shown the rest; with others it is put into every estimate of x0
        latents         noise to start from, [N, C, h, w] of unit variance; noises[i]: the noise that step i adds
        generator       a torch.Generator, or a list with one a picture, instead of a seed
        output          "pil", "tensor" ([N, 3, H, W] in [-1, 1]) or "latents" ([N, C, h, w])
        skip_last       layers of the text model left out at its end; tile: see `decode`; batch: pictures at once (0: by size)
        on_step         called as on_step(i, t, x) with every state, in the sampler's own space
        options         go to the sampler, such as eta or spacing
        UserError for wrong input, before any work; Diverged, with the step, when a latent or a pixel is not finite.
        Source: report figure 38; Meng et al. 2021 (arXiv 2108.01073) for strength; Lugmayr et al. 2022 (arXiv 2201.09865)
        for the mask.
        """
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        negatives = list(negative) if isinstance(negative, (list, tuple)) else [negative or ""] * len(prompts)
        check(prompts and n >= 1, f"{len(prompts)} prompts and n = {n} were given; expected at least one of each")
        check(len(negatives) == len(prompts), f"{len(negatives)} negative texts were given for {len(prompts)} prompts; "
              "expected one for all, or one for each")
        guidance = self.guidance if guidance is None else guidance
        begin = self.guidance_start if guidance_start is None else guidance_start
        self.check_run(sampler, steps, guidance, strength, output, skip_last, tile, options, begin)
        check(seed is None or generator is None, "a seed and a generator were given; expected one of them")
        total, several = n * len(prompts), isinstance(generator, (list, tuple))
        check(not several or len(generator) == total, f"{len(generator) if several else 1} generators were given for "
              f"{total} pictures; expected one, or one each")
        options = {**sampler_options(self.settings["scheduler"], sampler), **options, "kind": self.kind}
        seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        number = torch.arange(first, first + total, device=self.device)

        def draw(shape, stream):
            if generator is None:
                return rng.normal(seed, 0, number, shape, stream)
            return process.randn_like(torch.empty(total, *shape, device=self.device), generator)

        texts = [self.encode_text(one, skip_last).repeat_interleave(n, 0) for one in (prompts, negatives)]
        known, keep, shown = self._known(image, mask, height, width, total, draw)
        shape = self._latent_shape(height, width) if known is None else known.shape[1:]
        if latents is not None:
            check(latents.shape == (total, *shape), f"latents have shape {list(latents.shape)}; expected "
                  f"{[total, *shape]} for {total} pictures of {shape[1] * self.factor}x{shape[2] * self.factor}")
        start = draw(shape, 4) if latents is None else latents.to(self.device, torch.float32)
        done = []
        for some in torch.arange(total, device=self.device).split(batch or max(1, AT_ONCE // (shape[1] * shape[2]))):
            if noises is not None:
                options["noises"] = [one.to(self.device).expand(total, *shape)[some] for one in noises]
            elif generator is not None:
                options["generator"] = [generator[i] for i in some] if several else generator
            else:
                options["noises"] = rng.StepNoises(seed, number[some], shape)
            picked = [None if one is None else one.expand(total, -1, -1, -1)[some] for one in (known, keep, shown)]
            done.append(self._sample(samplers.by_name[sampler], start[some], steps, [text[some] for text in texts],
                                     guidance, begin, *picked, strength, on_step, progress, options))
        latents = torch.cat(done)
        if output == "latents":
            return latents
        pictures = self.decode(latents, tile)
        if not bool(pictures.isfinite().all()):
            raise Diverged("the decoded pixels are not finite, although the latents are: expected dtype float32 or "
                           "bfloat16, which the autoencoder does not overflow")
        if output == "tensor":
            return pictures.clamp(-1, 1)
        from nanodiff.plots import to_pil
        return [to_pil(one) for one in pictures]

    def _sample(self, run, x, steps, texts, scale, begin, known, keep, shown, strength, on_step, progress, options):
        """One batch of latents from noise x [B, C, h, w]; known, keep (1: known stays), shown: see _known."""
        options, first = dict(options), []
        if known is not None and (keep is None or strength < 1):
            options |= {"image": known, "strength": strength}
        calls = samplers.visited(run, self.schedule, steps, x, **options)
        if known is not None and shown is None and keep is not None:
            options["clip"] = lambda x0: keep * known + (1 - keep) * x0
            if strength == 1:  # the first call sees noise alone, but what stays starts from its own level
                level, first = torch.full((len(x),), round(float(calls[0])), device=x.device), [x]
                x = (1 - keep) * x + keep * process.q_sample(self.schedule, known, level, x)
        acts = (torch.cat(calls) < (1 - begin) * self.schedule.T).tolist() if begin else None
        times, dtype = torch.cat(calls).tolist(), self.unet.dtype
        predict, coming = fast.once_a_run(self.unet, times), iter(times)

        def network(x, t, context):
            x = x if shown is None else torch.cat([x, shown.repeat(len(x) // len(shown), 1, 1, 1)], 1)
            return predict(x.to(dtype), t if self.compiled else next(coming), context).float()  # the state stays float32

        guided = guiding.classifier_free(network, *(text.to(dtype) for text in texts), scale, acts=acts)
        finite, start = [], time.time()

        def watch(i, t, x):
            finite.append(x.isfinite().all())
            if x.device.type == "cpu":  # a GPU is not made to wait for this at every step
                check_finite(finite, i)
            if progress and sys.stderr.isatty():
                left = (time.time() - start) / (i + 1) * (len(calls) - i - 1)
                print(f"\rstep {i + 1} of {len(calls)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
            if on_step:
                on_step(i, t, x)

        with fast.packed(self.unet):
            x = run(lambda x, t: guided(first.pop() if first else x, t), x, self.schedule, steps, on_step=watch, **options)
        check_finite(finite)
        if progress and sys.stderr.isatty():
            print("\r" + 40 * " " + "\r", end="", file=sys.stderr, flush=True)
        return options["clip"](x) if callable(options.get("clip")) else x

    def check_run(self, sampler, steps, guidance=1.0, strength=1.0, output="pil", skip_last=0, tile=0, options=(),
                  guidance_start=0.0):
        """UserError unless this model can be run so; options: further keywords for the sampler."""
        check(sampler in samplers.by_name, f'sampler "{sampler}" is unknown; expected one of '
              f"{', '.join(samplers.by_name)}{nearest(sampler, samplers.by_name)}")
        check(isinstance(steps, int) and 1 <= steps <= self.schedule.T, f"steps is {steps}; expected 1 to the schedule's "
              f"{self.schedule.T}")
        check(isinstance(guidance, (int, float)) and abs(guidance) < 1e4, f"guidance is {guidance}; expected about 7.5")
        check(0 <= guidance_start < 1, f"guidance_start is {guidance_start}; expected a share from 0 to below 1, as 0.2")
        layers = len(self.text_model.encoder.layers)
        check(0 <= skip_last <= layers, f"skip_last is {skip_last}; expected 0 to {layers}, the text model's layers")
        takes = samplers.options_of(sampler)
        for name in options:
            check(name in takes, f'"{name}" is no option of {sampler}; expected one of {", ".join(sorted(takes))}'
                  + nearest(name, takes))
        check(0 < strength <= 1, f"strength is {strength}; expected above 0 and up to 1, such as 0.8")
        check(tile == 0 or tile >= 2, f"tile is {tile}; expected 0, or at least 2 latent pixels, such as 64")
        kinds = ("pil", "tensor", "latents")
        check(output in kinds, f'output "{output}" is unknown; expected {", ".join(kinds)}{nearest(output, kinds)}')

    def _latent_shape(self, height, width):
        size = self.settings["unet"].get("sample_size") or 64
        sides = [size, size] if isinstance(size, int) else list(size)
        for i, pixels in enumerate((height, width)):
            if pixels is not None:
                near = max(1, round(pixels / self.factor)) * self.factor
                check(0 < pixels <= 2**14 and pixels % self.factor == 0, f"{('height', 'width')[i]} is {pixels}; expected a "
                      f"multiple of {self.factor} pixels up to {2**14}, nearest: {min(near, 2**14)}")
                sides[i] = pixels // self.factor
        return (self.unet.config.out_channels, *sides)

    def _known(self, image, mask, height, width, n, draw):
        """What generate knows of the picture: latents [B, C, h, w], where they stay as they are [B, 1, h, w] (1: there),
        and what a U-Net of nine channels is shown [B, 5, h, w]; None for what there is not. draw: see _drawn."""
        takes, gives = self.unet.config.in_channels, self.unet.config.out_channels
        check(takes in (gives, 2 * gives + 1), f"this U-Net takes {takes} channels; expected {gives}, or {2 * gives + 1} "
              "of an inpainting model")
        check(takes == gives or mask is not None, f"this U-Net takes {takes} channels: an inpainting model wants a mask")
        check(mask is None or image is not None, "a mask was given without an image; expected the picture it belongs to")
        if image is None:
            return None, None, None
        from nanodiff.data import images
        x = images.given(image)
        check(x.shape[1] in (3, gives) and x.is_floating_point(), f"the image has {x.shape[1]} channels of {x.dtype}; "
              f"expected 3, or {gives} of a latent, of floating-point numbers")
        check(len(x) in (1, n), f"{len(x)} images were given for {n} pictures; expected 1, or one each")
        if x.shape[1] == 3:
            check(-1.01 <= float(x.min()) and float(x.max()) <= 1.01, f"the image goes from {float(x.min()):g} to "
                  f"{float(x.max()):g}; expected -1 to 1")
            sides = [max(1, round(side / self.factor)) * self.factor for side in x.shape[2:]]
            shape = self._latent_shape(height or sides[0], width or sides[1])
            x = images.resize(x, shape[1] * self.factor, shape[2] * self.factor).to(self.device)
            known = self._drawn(self._posterior(x), draw, 5)
        else:
            sides = [self.factor * side for side in x.shape[2:]]
            check([height or sides[0], width or sides[1]] == sides, "the image is latents of another height and width "
                  f"than were asked for; expected none, or {sides[0]} and {sides[1]}")
            check(takes == gives, "an inpainting model of nine channels wants the picture itself; expected no latents")
            known = x.to(self.device, torch.float32)
        if mask is None:
            return known, None, None
        mask = images.given_mask(mask).to(self.device)
        new = F.interpolate(mask, known.shape[2:], mode="nearest")
        check(len(new) in (1, n), f"{len(new)} masks were given for {n} pictures; expected 1, or one each")
        if takes == gives:
            return known, 1 - new, None
        whole = F.interpolate(mask, x.shape[2:], mode="nearest")
        rest = self._drawn(self._posterior(x * (1 - whole)), draw, 6)
        return known, 1 - new, torch.cat([new.expand(n, -1, -1, -1), rest], 1)

    def _drawn(self, posterior, draw, stream):
        """Scaled latents [N, C, h, w] from a posterior [1 or N, C, h, w]; draw(shape, stream): noise [N, *shape]."""
        noise = draw(posterior.mean.shape[1:], stream)
        return (posterior.mean + (0.5 * posterior.logvar).exp() * noise) * self.autoencoder.config.scaling_factor

    def compile(self, graph=False):
        """torch.compile for the U-Net; graph: also record a step as a CUDA graph, for one size of picture."""
        fast.plain(self.unet).compile(mode="reduce-overhead" if graph else None)
        self.compiled = True

    @torch.no_grad()
    def _probed_prediction(self):
        """Whether the U-Net predicts noise or v, where nothing says so: at the last step the picture is almost all noise,
        and a noise prediction gives it back; v = signal * noise - sigma * x0 is then almost -x0."""
        schedule, _ = schedule_from({**self.settings["scheduler"], "prediction_type": "epsilon"})
        dtype, config = self.unet.dtype, self.unet.config
        x = rng.normal(0, 0, torch.arange(1, device=self.device), (config.out_channels, 32, 32))
        seen = F.pad(x, (0, 0, 0, 0, 0, config.in_channels - config.out_channels))
        seen[:, config.out_channels : config.out_channels + 1] = 1  # the mask of an inpainting model: nothing is known
        y = self.unet(seen.to(dtype), schedule.T - 1, self.encode_text("").to(dtype)).float()
        likeness = float((x * y).sum() / (x.norm() * y.norm()))
        found = "epsilon" if likeness > 0.5 else "v_prediction"
        self.notes.append(f"nothing in the checkpoint says what its U-Net predicts: {found} was taken, because at the last "
                          f"step its output resembles its input by {likeness:.2f} (noise prediction: near 1)")
        return found

    # --- LoRA, words of one's own, saving -------------------------------------------------------------------------------

    def load_lora(self, path, scale=1.0, name=None):
        """Add a LoRA file (diffusers, peft or kohya names) to the networks, beside those that are there already.

        name: what to call it from now on (default: the file's own without its ending).
        Returns {"layers": {network: count}, "change": {network: size}, "overall": size}; size is the norm of the change
        over that of the weights it changes. UserError when a key is not used or a layer does not fit; nothing is changed.
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
        unmerged = sorted({a.name for _, _, layer in lora.lora_layers(self.networks) for a in layer.adapters if not a.merged})
        check(not unmerged, f'LoRA "{", ".join(unmerged)}" is loaded but not part of the weights; expected merge_lora() or '
              "unload_lora() before save()")
        settings = {**self.settings, "text_encoder": {**self.settings["text_encoder"],
                                                      "vocab_size": self.text_model.config.vocab_size}}
        weights = {name: {key: tensor.to(dtype or tensor.dtype) for key, tensor in lora.merged_state_dict(net).items()}
                   for name, net in {**self.networks, "autoencoder": self.autoencoder}.items()}
        write = stable_diffusion_folder.write_checkpoint if layout == "diffusers" else single_file.write_single_file
        write(stable_diffusion_folder.Checkpoint(settings, weights, self.tokenizer), str(path))
