"""A small GPT: writes a picture's codes one after the other, each from all those before it and the picture's class.

Sources: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3, for the layers; Esser
et al. 2021 (arXiv 2012.09841), section 3.2, for codes in place of words and a class token in front.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError


@dataclass
class GPTConfig:
    """Every size of the GPT."""

    codes: int = 128  # different codes: K of the codebook
    length: int = 49  # codes of a picture
    classes: int = 10  # different class tokens; 1 for pictures without classes
    width: int = 128  # numbers that stand for a code between the layers
    layers: int = 4  # transformer layers
    heads: int = 4  # attention heads
    dropout: float = 0.0  # share of activations dropped behind each half of a layer

    def __post_init__(self):
        for name in ("codes", "length", "classes", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.width % self.heads:
            raise UserError(f"width {self.width} cannot be split among {self.heads} heads: heads must divide width")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; expected a share from 0 to below 1")


class Layer(nn.Module):
    """Attention to what came before, then a perceptron, each added to its input: x [B, n, width] -> [B, n, width]."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x, cache=None):
        """cache: a `Cache`, which holds the keys and values of the places before x and takes in those of x."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, n, width / heads]
                   for part in self.to_qkv(self.norm1(x)).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(k, v)
        # one place asks at a time, of all that were before; or all places ask, each of those up to itself
        h = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.drop(self.to_out(h.transpose(1, 2).flatten(2)))
        return x + self.drop(self.narrow(F.gelu(self.widen(self.norm2(x)))))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Cache:
    """The keys and values of one layer, [B, heads, n, d] each, for the n places so far out of `length`."""

    def __init__(self, length):
        self.length, self.n, self.keys, self.values = length, 0, None, None

    def extend(self, k, v):
        """Takes in those of the next place, [B, heads, 1, d]; returns all so far."""
        if self.keys is None:
            self.keys, self.values = (part.new_empty(*part.shape[:2], self.length, part.shape[3]) for part in (k, v))
        self.keys[:, :, self.n:self.n + 1], self.values[:, :, self.n:self.n + 1] = k, v
        self.n += 1
        return self.keys[:, :, :self.n], self.values[:, :, :self.n]


class GPT(nn.Module):
    """forward(codes, label) -> logits of every next code.

    codes   int64 [B, n], n < length: the first codes of each picture, in 0 ... K-1
    label   int64 [B]: its class
    logits  [B, n + 1, K]: of code 0 given the class, of code 1 given the class and code 0, and so on
    generator: draws the initial weights (None: torch's own).
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = c = config
        self.class_embedding = nn.Embedding(c.classes, c.width)
        self.code_embedding = nn.Embedding(c.codes, c.width)
        self.position_embedding = nn.Embedding(c.length, c.width)
        self.layers = nn.ModuleList(Layer(c.width, c.heads, c.dropout) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.codes, bias=False)
        initialise(self, generator)

    def forward(self, codes, label):
        self.check(codes, label)
        x = torch.cat([self.class_embedding(label)[:, None], self.code_embedding(codes)], 1)  # [B, n + 1, width]
        x = x + self.position_embedding.weight[:x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def next(self, token, place, caches):
        """Logits [B, K] of code `place`, when `token` [B, width] is the embedding of what stands before it."""
        x = (token + self.position_embedding.weight[place])[:, None]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache)
        return self.head(self.norm(x))[:, 0]

    @torch.no_grad()
    def sample(self, label, length=None, temperature=1.0, top_k=0, generator=None, cache=True):
        """Codes int64 [B, length] of pictures of the classes `label` int64 [B], one drawn after the other.

        temperature  divides the logits: below 1 the likely becomes likelier, 0 takes the likeliest
        top_k        draws among the k likeliest codes alone (0: among all)
        generator    a torch.Generator on the CPU, or a list with one for each picture: then a picture does not depend
                     on its neighbours in the batch
        cache        keep the keys and values of the places before; without it they are computed again for each code
        """
        length = self.config.length if length is None else length
        if not 1 <= length <= self.config.length:
            raise UserError(f"{length} codes cannot be drawn; expected 1 to {self.config.length}, the GPT's positions")
        if not temperature >= 0 or top_k < 0:
            raise UserError(f"temperature {temperature} and top_k {top_k} are not possible; expected 0 or more of both")
        self.check(label.new_zeros(len(label), 0), label)
        draws = uniform(len(label), length, generator).to(label.device)
        codes = label.new_zeros(len(label), length)
        caches, training = [Cache(length) for _ in self.layers], self.training
        self.eval()  # nothing is dropped
        for place in range(length):
            if cache:
                before = self.class_embedding(label) if place == 0 else self.code_embedding(codes[:, place - 1])
                logits = self.next(before, place, caches)
            else:
                logits = self(codes[:, :place], label)[:, -1]
            codes[:, place] = chosen(logits, draws[:, place], temperature, top_k)
        self.train(training)
        return codes

    def check(self, codes, label):
        """Raises UserError for more codes than positions, and for codes or classes that the GPT does not have."""
        c = self.config
        if codes.ndim != 2 or codes.shape[1] >= c.length or label.shape != codes.shape[:1]:
            raise UserError(f"codes {list(codes.shape)} and labels {list(label.shape)} do not fit this GPT; expected "
                            f"[B, n] with n below {c.length}, its positions, and [B]")
        for name, numbers, known in (("code", codes, c.codes), ("class", label, c.classes)):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < known:
                worst = int(numbers.max()) if numbers.max() >= known else int(numbers.min())
                raise UserError(f"{name} {worst} is unknown to this GPT; expected 0 to {known - 1}")


def uniform(n, length, generator):
    """float64 [n, length] in [0, 1); of a list of generators each draws one row."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != n:
            raise UserError(f"{len(generator)} generators were given for {n} samples; expected one for each")
        return torch.stack([torch.rand(length, generator=one, dtype=torch.float64) for one in generator])
    return torch.rand(n, length, generator=generator, dtype=torch.float64)


def chosen(logits, draw, temperature, top_k):
    """One code [B] from logits [B, K]: where the cumulated probabilities pass the uniform number draw [B]."""
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    edges = logits.softmax(1).cumsum(1)  # [B, K]
    draw = draw[:, None] * edges[:, -1:]  # rounding leaves the last edge near 1, not at it
    return torch.searchsorted(edges, draw, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def initialise(net, generator=None):
    """Fresh weights in place, as GPT-2's: normal of 0.02, narrower where a layer adds to its input; biases 0."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.02, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for layer in net.layers:
        for last in (layer.to_out, layer.narrow):
            last.weight /= (2 * len(net.layers)) ** 0.5
    return net
