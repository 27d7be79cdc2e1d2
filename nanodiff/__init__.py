"""nanodiff: generative modelling of materials, from scratch in plain PyTorch.

`import nanodiff` imports nothing yet, not even torch; every room is imported when it is first used:
`from nanodiff.diffusion import Schedule, process, elbo, gaussian, samplers, guidance`.
`nanodiff.load(path)` opens a Stable Diffusion checkpoint, `nanodiff.load()` the small one that comes with nanodiff (see
`nanodiff.pipelines.stable_diffusion`).
"""

import os

__version__ = "0.1.0"

# Intel's MKL else takes another order of sums where a matrix lies differently in memory: a run that was stopped and resumed
# then ended on other last digits (seen on a Xeon with AVX-512). MKL reads it at its first product: import nanodiff before any.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def load(path=None, config=None, dtype="float32", device="cpu", ema=False):
    """A StableDiffusion from a diffusers folder or a single .safetensors or .ckpt file of SD 1.x or 2.x; without a path
    the small model that comes with nanodiff.

    See `nanodiff.pipelines.stable_diffusion.load` for the arguments.
    """
    from nanodiff.pipelines import stable_diffusion
    return stable_diffusion.load(path, config, dtype, device, ema)
