"""nanodiff: generative modelling of materials, from scratch in plain PyTorch.

`import nanodiff` imports nothing but torch; every room is imported when it is first used:
`from nanodiff.diffusion import Schedule, process, elbo, gaussian, samplers, guidance`.
`nanodiff.load(path)` opens a Stable Diffusion checkpoint, `nanodiff.load()` the small one that comes with nanodiff (see
`nanodiff.stable_diffusion`).
"""

__version__ = "0.1.0"


def load(path=None, config=None, dtype="float32", device="cpu", ema=False):
    """A StableDiffusion from a diffusers folder or a single .safetensors or .ckpt file of SD 1.x or 2.x; without a path
    the small model that comes with nanodiff.

    See `nanodiff.stable_diffusion.load` for the arguments.
    """
    from nanodiff import stable_diffusion
    return stable_diffusion.load(path, config, dtype, device, ema)
