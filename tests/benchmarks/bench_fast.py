"""What each file of nanodiff/fast gains: a layer of Stable Diffusion's sizes, plain and fast, in turn.

    python tests/benchmarks/bench_fast.py [--pairs 7] [--only packing winograd ...]

Nothing else should run. Prints the ratio of seconds, fast to plain (median of the pairs), and of a ResNet block the bytes
that are kept for the backward pass.
"""

import argparse
import contextlib
import copy
import statistics
import time

import torch
from torch import nn

import nanodiff
from nanodiff import fast
from nanodiff.models import lora
from nanodiff.models.blocks import ResnetBlock, Upsample
from nanodiff.models.cond_unet import TransformerBlock
from nanodiff.models.unet import UNet, UNetConfig


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pair(net, train=False, frozen=False):
    """(plain, fast) of a network."""
    net.train(train).requires_grad_(not frozen)
    return net, fast.speed_up(copy.deepcopy(net))


def forward(net, *inputs):
    """A function that calls net without gradients, its packed weights held open."""
    stack = contextlib.ExitStack()
    stack.enter_context(fast.packed(net))

    def call():
        with torch.no_grad():
            net(*inputs)
    call.stack = stack  # open as long as the function lives
    return call


def backward(net, *inputs):
    """A function that calls net and its backward pass."""
    inputs = [inputs[0].clone().requires_grad_(), *inputs[1:]]
    return lambda: net(*inputs).sum().backward()


def kept(net, *inputs):
    """Bytes that net's forward pass keeps for its backward pass, without its weights."""
    weights, storages = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = net(inputs[0].clone().requires_grad_(), *inputs[1:])
    del y
    return sum(size for place, (size, _) in storages.items() if place not in weights)


def with_adapter():
    """A small frozen layer with a LoRA."""
    net = nn.Sequential(nn.Linear(96, 96)).requires_grad_(False)
    lora.add({"unet": net}, {"unet": ["0"]}, 4, 4.0)
    return net


def once():
    """A step of the model that ships, with and without what a run makes once."""
    sd = nanodiff.load()
    x, context = noise(2, 4, 16, 16), sd.encode_text(["", "a red texture"])
    network = fast.once_a_run(sd.unet, [500])
    return forward(sd.unet, x, torch.tensor(500), context), lambda: one_step(network, x, context)


def one_step(network, x, context):
    with torch.no_grad():
        network(x, 500, context)


CASES = {
    "packing": ("3x3 convolution, 1280 channels, 8x8", lambda: [
        forward(net, noise(2, 1280, 8, 8)) for net in pair(nn.Conv2d(1280, 1280, 3, padding=1), frozen=True)]),
    "winograd": ("3x3 convolution, 320 channels, 64x64", lambda: [
        forward(net, noise(1, 320, 64, 64)) for net in pair(nn.Conv2d(320, 320, 3, padding=1), frozen=True)]),
    "frozen": ("3x3 convolution that is not trained, 1280 channels, 8x8, forward and backward", lambda: [
        backward(net, noise(2, 1280, 8, 8)) for net in pair(nn.Conv2d(1280, 1280, 3, padding=1), frozen=True)]),
    "blocks": ("upsampling that is trained, 128 channels, 16x16 to 32x32, forward and backward", lambda: [
        backward(net, noise(8, 128, 16, 16)) for net in pair(Upsample(128), train=True)]),
    "transformer": ("transformer layer, 320 channels, 4096 pixels", lambda: [
        forward(net, noise(2, 4096, 320), noise(2, 77, 768)) for net in pair(TransformerBlock(320, 8, 768))]),
    "once": ("step of the model that ships, two pictures", once),
    "lora": ("linear layer with a LoRA, 96 channels, 256 pixels of 8 pictures, forward and backward", lambda: [
        backward(net, noise(8, 256, 96)) for net in (with_adapter(), fast.speed_up(with_adapter()))]),
    "networks": ("training step of a DDPM of 64 and 128 channels, 32x32", lambda: [
        backward(net, noise(4, 3, 32, 32), torch.arange(4)) for net in pair(
            UNet(UNetConfig(channels=(64, 128), groups=32)), train=True)]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    for name in args.only:
        title, make = CASES[name]
        calls, seconds = make(), []
        for i in range(args.pairs + 1):
            times = [time.perf_counter()]
            for call in calls:
                call()
                times.append(time.perf_counter())
            seconds += [(times[1] - times[0], times[2] - times[1])] if i else []
        print(f"{name}: {title}: fast / plain {statistics.median(b / a for a, b in seconds):.2f}  "
              f"(plain {1000 * statistics.median(a for a, _ in seconds):.1f} ms)", flush=True)
    block = ResnetBlock(128, 128, 512)
    sizes = [kept(net, noise(4, 128, 32, 32), noise(4, 512)) for net in pair(block, train=True)]
    print("blocks: kept by a ResNet block in training: {:.1f} MiB plain, {:.1f} MiB fast".format(*(
        size / 2**20 for size in sizes)))


if __name__ == "__main__":
    main()
