"""A trained DDPM as one thing: the network, its schedule, what it predicts and the range of values it knows.

    model = ddpm.load("runs/ddpm-001")
    pictures = model.generate(16, sampler="dpm++2m", steps=25, seed=0)      # [16, C, H, W] in [-1, 1]
"""

from pathlib import Path

import torch

from nanodiff import fast, rng
from nanodiff.diffusion import guidance, samplers
from nanodiff.errors import UserError, check, nearest
from nanodiff.files import read_json
from nanodiff.formats import diffusers_folder


class DDPM:
    """net: a UNet; schedule and kind ("noise", "x0", "v"): what it was trained with; shape: (C, H, W) of its pictures.

    scale, shift [C]: the network sees scale * x + shift of a picture x in [-1, 1] (1 and 0 unless the report's
    other ranges were asked for); classes: names, empty for an unconditional network; guidance: the scale that it is
    usually sampled with; data: the data set's name.
    """

    def __init__(self, net, schedule, kind="noise", shape=(1, 28, 28), scale=None, shift=None, classes=(), guidance=1.0,
                 data=""):
        self.net, self.schedule, self.kind, self.shape = fast.speed_up(net), schedule, kind, tuple(shape)
        self.scale = torch.as_tensor(scale if scale is not None else [1.0] * shape[0]).float().view(-1, 1, 1)
        self.shift = torch.as_tensor(shift if shift is not None else [0.0] * shape[0]).float().view(-1, 1, 1)
        self.classes, self.guidance, self.data = list(classes), guidance, data

    @property
    def device(self):
        return next(self.net.parameters()).device

    @property
    def batch(self):
        """Pictures at once that fit a small machine: 250 of 32x32, 4 of 256x256."""
        return max(1, 250 * 32**2 // (self.shape[1] * self.shape[2]))

    def to_network(self, x):
        """Pictures in [-1, 1] as the network knows them."""
        return x * self.scale.to(x.device) + self.shift.to(x.device)

    def to_picture(self, y):
        """What the network knows as pictures in [-1, 1]."""
        return (y - self.shift.to(y.device)) / self.scale.to(y.device)

    def denoiser(self, label=None, guidance_scale=1.0):
        """The function denoise(x, t) that samplers and the bound take; with a label [B], guided towards it."""
        if label is None:
            return lambda x, t: self.net(x, t)
        nothing = torch.full_like(label, self.net.config.num_classes)
        return guidance.classifier_free(self.net, label, nothing, guidance_scale)

    @torch.no_grad()
    def generate(self, n, sampler="ddim", steps=50, seed=0, label=None, guidance_scale=None, first=0, batch=None,
                 on_step=None, **options):
        """Pictures first ... first+n-1 of `seed`: [n, C, H, W] on the CPU, [-1, 1] up to the model's overshoot.

        label            int64 [n]; None takes all classes in turn
        guidance_scale   None is the model's own, 1 off
        on_step(i, t, x) sees each batch's states, in the network's range
        options          of the sampler and its grid, such as eta or spacing
        A picture depends on its number and the seed, not on n or batch (up to the rounding of the convolutions).
        """
        check(sampler in samplers.by_name, f'sampler "{sampler}" is unknown; expected one of '
              f"{', '.join(samplers.by_name)}{nearest(sampler, samplers.by_name)}")
        check(1 <= steps <= self.schedule.T, f"--steps is {steps}; expected 1 to the schedule's {self.schedule.T}")
        guidance_scale = self.guidance if guidance_scale is None else guidance_scale
        if label is None and self.classes:
            label = torch.arange(first, first + n) % len(self.classes)
        batch = batch or self.batch
        if sampler == "heun" and self.schedule.snr[-1] < 1e-6:
            # Cosine schedules end at a sigma of 20,000: from there to the next of few evenly spaced t, the mean of two
            # slopes errs by thousands. Karras' levels fall evenly.
            options.setdefault("karras", True)
        drawn = []
        with fast.packed(self.net):
            for start in range(first, first + n, batch):
                index = torch.arange(start, min(start + batch, first + n), device=self.device)
                x = rng.normal(seed, 0, index, self.shape, stream=rng.SAMPLING)
                labels = None if label is None else label[index.cpu() - first].to(self.device)
                noises = rng.StepNoises(seed, index, self.shape)
                x = samplers.sample(sampler, self.denoiser(labels, guidance_scale), x, self.schedule, steps,
                                    kind=self.kind, noises=noises, on_step=on_step, **options)
                drawn.append(self.to_picture(x).cpu())
        return torch.cat(drawn)

    def save(self, folder):
        """Writes a model folder: unet/ and scheduler/ in diffusers' layout (a DDPMPipeline), nanodiff.json beside."""
        folder = Path(folder)
        size = [side // self.net.config.patch for side in self.shape[1:]]
        diffusers_folder.save_unet(self.net, folder / "unet", sample_size=size)
        diffusers_folder.save_schedule(self.schedule, self.kind, folder / "scheduler")
        index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
                 "unet": ["diffusers", "UNet2DModel"]}
        ours = {"shape": self.shape, "scale": self.scale.flatten().tolist(), "shift": self.shift.flatten().tolist(),
                "classes": self.classes, "guidance": self.guidance, "data": self.data}
        diffusers_folder.write_folder(folder, {"model_index.json": index, "nanodiff.json": ours}, {})


def load(path, weights="ema", device="cpu"):
    """A DDPM from a run folder of train_ddpm.py, its model/ folder, or a diffusers DDPM folder (flat or not).

    weights: "ema", what a model folder holds, or "raw", the last checkpoint's own (run folders alone).
    Raises UserError when the folder is none of these.
    """
    run = Path(path)
    folder = run / "model" if (run / "model").is_dir() else run
    check(folder.is_dir(), f"{path} is no folder; expected a run of train_ddpm.py or a model folder")
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    check((unet / "config.json").is_file() and (unet / diffusers_folder.WEIGHTS).is_file(),
          f"{path} holds no model; expected a run of train_ddpm.py that has drawn its first picture, or a diffusers "
          "folder with unet/config.json")
    net = diffusers_folder.load_unet(unet)
    schedule, kind = diffusers_folder.load_schedule(folder)
    extra = {}
    if (folder / "nanodiff.json").is_file():
        extra = read_json(folder, "nanodiff.json")
    else:
        size = read_json(unet, "config.json").get("sample_size") or 32
        extra = {"shape": (net.config.in_channels, *(size if isinstance(size, list) else [size, size]))}
    if weights == "raw":
        from nanodiff.training.checkpoint import last_checkpoint, load_checkpoint
        net.load_state_dict(load_checkpoint(last_checkpoint(run))["net"])
    elif weights != "ema":
        raise UserError(f'weights "{weights}" are unknown; expected ema or raw')
    return DDPM(net.to(device).eval(), schedule, kind, **extra)
