"""nanodiff: generative modelling of materials, from scratch in plain PyTorch.

`import nanodiff` imports nothing but torch; every room is imported when it is first used:
`from nanodiff.diffusion import Schedule, process, elbo, gaussian, samplers, guidance`.
"""

__version__ = "0.1.0"
