"""Samplers, guidance and step noises read no value of a tensor: a run on a GPU does not wait for the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanodiff import rng
from nanodiff.diffusion import Schedule, guidance, samplers
from nanodiff.models.unet import UNet, UNetConfig

NAMES = list(samplers.by_name)
KINDS = ("noise", "x0", "v")
SD = Schedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()


class NoHostReads(TorchDispatchMode):
    """Fails on whatever makes a GPU run wait: values read by Python, sizes that depend on values, device copies."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name in self.FORBIDDEN:
            raise AssertionError(f"{name} reads values on the host")
        if name in ("_to_copy", "copy_", "_copy_from", "to"):
            devices = {a.device.type for a in args if isinstance(a, torch.Tensor)}
            if kwargs.get("device") is not None:
                devices.add(torch.device(kwargs["device"]).type)
            if len(devices) > 1:
                raise AssertionError(f"{name} copies between {devices}")
        return func(*args, **kwargs)


def every_way(name, x):
    """Runs of the sampler with each kind and option that takes a path of its own."""
    def denoise(x, t):
        return x * (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)  # uses the t that it is given, on its device

    def sampler(*args, **options):
        return samplers.sample(name, *args, **options)

    image = torch.zeros_like(x)
    for kind in KINDS:
        sampler(denoise, x, SD, 5, kind=kind)
    noises = [torch.zeros_like(x) for _ in range(5)]
    for options in (dict(noises=noises), dict(image=image, strength=0.5), dict(clip=1.0),
                    dict(sigmas=[9.0, 5.0, 2.0, 1.0, 0.5, 0.1]), dict(spacing="trailing")):
        sampler(denoise, x, SD, 5, on_step=lambda i, t, x: None, **options)
    if name == "ddim":
        sampler(denoise, x, SD, 5, eta=1.0)
    if name in ("euler", "heun", "dpm++2m", "unipc"):
        sampler(denoise, x, SD, 5, karras=True)
    sampler(denoise, x, ZERO_SNR, 5, kind="v", spacing="trailing")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samplers_run_on_meta_tensors_where_nothing_can_be_read(name):
    every_way(name, torch.empty(2, 1, 4, 4, device="meta"))
    end = samplers.sample(name, lambda x, t: x, torch.empty(2, 1, 4, 4, device="meta"), SD, 5)
    assert end.device.type == "meta" and end.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_samplers_never_read_a_value_or_copy_between_devices(name, device):
    with NoHostReads():
        every_way(name, torch.empty(2, 1, 4, 4, device=device).fill_(0.5))


@pytest.mark.parametrize("sin", [
    lambda x, t: x * x.mean().item(), lambda x, t: x if x.sum() > 0 else -x, lambda x, t: x[x > 0].sum() * x,
    lambda x, t: x * float(t[0]), lambda x, t: x.to("meta"), lambda x, t: x * torch.ones(1).to("meta").sum(),
    lambda x, t: torch.empty_like(x, device="meta").copy_(x),
])
def test_the_watch_for_host_reads_does_catch_a_bad_model(sin):
    with pytest.raises(AssertionError, match="reads values|copies between"):
        with NoHostReads():
            samplers.sample("euler", sin, torch.ones(2, 1, 4, 4), SD, 5)


@pytest.mark.parametrize("name", NAMES)
def test_our_network_guidance_and_step_noises_never_wait_for_the_host(name):
    net = UNet(UNetConfig(1, 1, (8, 16), groups=4, num_classes=3)).eval()
    label = torch.tensor([0, 2])
    guided = guidance.classifier_free(net, label, torch.full_like(label, 3), 2.0)
    with torch.no_grad(), NoHostReads():
        end = samplers.sample(name, guided, torch.zeros(2, 1, 8, 8), SD, 5,
                              noises=rng.StepNoises(0, torch.arange(2), (1, 8, 8)))
    assert torch.isfinite(end).all()
