"""The transformers of models/cond_unet.py and the feed-forward layers of CLIP, with fewer and smaller new tensors.

Replaces SpatialTransformer and TransformerBlock (sums in place), FeedForward (1,024 pixels at a time without gradients,
so that its wide results stay in memory that is there already), GEGLU and CLIP's FeedForward (in place without them).
The fresh memory of large tensors costs more than what is computed in it. Gain: a tenth of a layer of SD 1.5 at 64x64.
Measured by: python tests/benchmarks/bench_fast.py --only transformer
"""

import torch

from nanodiff.models import clip_text, cond_unet


class GEGLU(cond_unet.GEGLU):
    """A gated linear unit, in place where no gradient is wanted."""

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        y, gate = self.proj(x).chunk(2, dim=-1)
        return y.mul_(torch.ops.aten.gelu.out(gate, out=gate))


class FeedForward(cond_unet.FeedForward):
    """Two linear layers on each pixel by itself, by rows of pixels where no gradient is wanted."""

    ROWS = 1024  # pixels at a time

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # its rows are views of it
        for rows, out in zip(x.flatten(0, 1).split(self.ROWS), y.flatten(0, 1).split(self.ROWS)):
            out.copy_(super().forward(rows))
        return y


class TransformerBlock(cond_unet.TransformerBlock):
    """Self-attention, cross-attention and feed-forward, each added in place to what came in."""

    def forward(self, x, context):
        x = self.attn1(self.norm1(x)).add_(x)  # in place: the left side is a fresh tensor
        x = self.attn2(self.norm2(x), context).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(cond_unet.SpatialTransformer):
    """Transformer layers over the pixels of a feature map, added to it in place."""

    def forward(self, x, context):
        return self.change(x, context).add_(x)


class ClipFeedForward(clip_text.FeedForward):
    """CLIP's two linear layers, with quick_gelu in place where no gradient is wanted."""

    def forward(self, x):
        if self.activation is not clip_text.quick_gelu:
            return super().forward(x)
        h = self.fc1(x)
        gate = (1.702 * h).sigmoid_()
        return self.fc2(h * gate if torch.is_grad_enabled() else gate.mul_(h))
