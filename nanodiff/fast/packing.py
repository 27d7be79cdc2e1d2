"""A convolution that is faster on a CPU where nothing is trained, with the weights and the answers of nn.Conv2d.

Replaces nn.Conv2d. PyTorch hands convolutions to oneDNN, which wants the weights in an order of its own and reorders
them at every call. Inside `with packed(net):` frozen weights are reordered once: the packed weight takes the place of
the plain one, so that memory holds one of them. Layers with many pixels take Winograd's way instead (winograd.py), very
small ones that of a plain matrix product. Everything else about the layer stays as it was: whoever asks for the weight,
trains, moves, copies or loads it sees a plain one. Frozen layers that gradients pass through go the ways of frozen.py.
Gain: half the time of a convolution of SD 1.5's middle.
Measured by: python tests/benchmarks/bench_fast.py --only packing
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.fast import frozen, winograd

LEAST = 2**15  # numbers in a weight that is worth packing
FEW = 2**21  # products below which oneDNN's preparations take longer than the sum itself
# Internal names of PyTorch: where they are missing, every layer runs as nn.Conv2d.
AVAILABLE = (torch.backends.mkldnn.is_available() and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
             and hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(torch._C._nn, "thnn_conv2d"))


@contextlib.contextmanager
def packed(net):
    """While open, large frozen convolutions of a fast net hold packed weights, from their first call without gradients.

    When it closes, also by an error, they are plain again, bit for bit. Nested ones share their weights: the outermost
    puts them back. Yields net.
    """
    layers = [module for module in net.modules() if isinstance(module, Conv2d) and not module.may_pack]
    for layer in layers:
        layer.may_pack = True
    try:
        yield net
    finally:
        for layer in layers:
            layer.unpack()
            del layer.may_pack


def is_unusual(conv):
    """Whether a convolution pads in a way that the kernels here do not know."""
    return conv.padding_mode != "zeros" or isinstance(conv.padding, str)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that, inside `packed`, packs its weight at the first call without gradients, if it is frozen and large.

    The Parameter that is packed is the very one that was there, which an optimiser may hold. It stands in _parameters;
    `weight`, under which everybody else knows it, unpacks it first.
    """

    may_pack = False  # inside `packed`
    packed_for = None  # (height, width) that the weight is packed for: for others the order may be a very slow one
    strides = None  # of the plain weight that was packed: its order in memory

    @property
    def weight(self):
        self.unpack()
        return self.held

    @property
    def held(self):
        """The weight as it is held, plain or packed."""
        return super().__getattr__("weight")

    @property
    def packed(self):
        return self.held.layout == torch._mkldnn

    @property
    def trains(self):
        return self.held.requires_grad

    def forward(self, x):
        if torch.is_grad_enabled() or self.trains:  # training has begun since the weight was packed
            self.unpack()
        if torch.is_grad_enabled() and self.groups == 1 and self.dilation == (1, 1) and frozen.applies(self, x):
            self.put_channels_last()
            return frozen.FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding)
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or not AVAILABLE:
            return F.conv2d(x, self.plain_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)
        if not self.packed and self.is_small(x):
            return torch._C._nn.thnn_conv2d(x, self.weight, self.kernel_size, self.bias, self.stride, self.padding)
        if self.takes_winograd(x):
            return winograd.convolve(x, self.plain_weight(), self.bias)
        if not self.may_pack or self.trains or self.held.numel() < LEAST:
            return super().forward(x)
        if not self.packed or self.packed_for != tuple(x.shape[2:]):
            self.pack(x.shape)
        return torch.ops.mkldnn._convolution_pointwise(x, self.held, self.bias, self.padding, self.stride,
                                                       self.dilation, self.groups, "none", [], "")

    def is_small(self, x):
        """Whether x [B, C, H, W] asks for so few products that a plain matrix product is the fastest."""
        products = len(x) * x.shape[2] * x.shape[3] * self.held.numel() // (self.stride[0] * self.stride[1])
        return products < FEW and self.groups == 1 and self.dilation == (1, 1)

    def takes_winograd(self, x, shape=None):
        """Whether this layer convolves x [B, C, H, W], or one like it of another shape, by Winograd's method."""
        plain = (self.kernel_size, self.stride, self.padding, self.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        fits = x.device.type == "cpu" and x.dtype == self.held.dtype == torch.float32
        learns = torch.is_grad_enabled() and self.trains
        return not learns and plain and fits and self.groups == 1 and winograd.pays(shape or x.shape, self.out_channels)

    def plain_weight(self):
        """The weight [O, C, kH, kW] in the standard order; a copy where it is packed, which it stays."""
        return self.held.to_dense() if self.packed and not self.trains else self.weight

    @torch.inference_mode(False)  # else nobody could train the layer afterwards
    def pack(self, shape):
        """Reorder the weight for inputs of this shape [B, C, H, W], with any B; drops the plain one."""
        plain = self.weight.detach()
        self.strides = plain.stride()
        self.hold(torch._C._nn.mkldnn_reorder_conv2d_weight(
            plain.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, list(shape)))
        self.packed_for = tuple(shape[2:])

    def unpack(self):
        """Back to the plain weight, bit for bit; nothing happens where it is plain already."""
        if self.packed:
            plain = self.held.detach().to_dense()
            self.hold(torch.empty_strided(plain.shape, self.strides).copy_(plain))
            del self.packed_for, self.strides

    def put_channels_last(self):
        """Plain weights in the order that frozen.py wants: the same tensor to everybody else, and no second copy."""
        if not self.weight.is_contiguous(memory_format=torch.channels_last):
            self.weight.data = self.weight.detach().contiguous(memory_format=torch.channels_last)

    def hold(self, tensor):
        """Put other contents into the very Parameter that is there, which an optimiser may hold already."""
        new = nn.Parameter(tensor, self.trains)
        try:
            torch.utils.swap_tensors(self.held, new)
        except RuntimeError:  # something else in PyTorch holds on to it, such as a graph before its backward pass
            self._parameters["weight"] = new

    def train(self, mode=True):
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # moving to another device or type
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, *args, **kwargs):
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo):
        self.unpack()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "may_pack"})
        return new
