"""Where a word of the prompt acts: the cross-attention of Stable Diffusion's U-Net as maps over the picture.

    picture, maps = attention_maps(sd, "a photo of woven carbon fibre", ["woven", "carbon"])
    sheet([(picture, maps)]).save("attention.png")

In every transformer layer each pixel divides its attention among the 77 tokens: softmax(q k^T / sqrt(d)). Averaged over
heads, layers and calls of the network, a token's share of every pixel is its map.
Sources: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Hertz et al. 2022 (arXiv 2208.01626) and Tang et al. 2022
(arXiv 2210.04885) for the averages; report figure 43.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from nanodiff import plots
from nanodiff.errors import check, nearest
from nanodiff.models.cond_unet import SpatialTransformer
from nanodiff.models.tokenizer import WORD_END


def attention_maps(sd, prompt, words, seed=0, **options):
    """One picture of a prompt [3, H, W] in [-1, 1], as `sd.generate` draws it, and {word: its map [h, w]}.

    words    a list of words of the prompt (or runs of words, or added words); capitals do not matter
    options  further keywords of `sd.generate`, such as steps, guidance, sampler, negative, first, height or image
    h, w are the latent's height and width. A map is the share (0 to 1) of a pixel's attention that a token of the word
    has, averaged over its tokens and its occurrences, and over heads, layers and calls of the network with the prompt.
    UserError for a word that is not in the prompt or behind its end at 77 tokens, and for a compiled or unconditional
    network, before any work.
    """
    places = word_places(sd.tokenizer, prompt, words)
    check(not sd.compiled, "the U-Net is compiled, which hides its attention; expected a model without compile()")
    check(any(isinstance(module, SpatialTransformer) for module in sd.unet.modules()), "this U-Net has no transformers "
          "and looks at no word; expected one with cross-attention")
    with recorded(sd.unet) as sums:
        picture = sd.generate(prompt, n=1, seed=seed, output="tensor", **options)[0]
    shares = token_maps(sums, [side // sd.factor for side in picture.shape[1:]])
    return picture, {word: shares[where].mean(0) for word, where in places.items()}


@contextlib.contextmanager
def recorded(unet):
    """While open, a U-Net's cross-attention is added up; its results, and the U-Net afterwards, are untouched.

    Yields the dict {(height, width): [sum of probabilities [77, height, width], how many]} with an entry for each size
    at which there are layers; see `token_maps`. Of every call the last picture of the batch counts: with guidance, the
    half that sees the prompt follows the half that does not.
    """
    sums, handles = {}, []

    def watch(transformer):
        size = []

        def start(_, inputs):
            size[:] = inputs[0].shape[2:]

        def add(attention, inputs, _):
            maps = probabilities(attention, *inputs)[0].mean(0).T.unflatten(1, size)  # [77, height, width]
            entry = sums.setdefault(tuple(size), [torch.zeros_like(maps), 0])
            entry[0] += maps
            entry[1] += 1

        handles.append(transformer.register_forward_pre_hook(start))
        handles.extend(block.attn2.register_forward_hook(add) for block in transformer.transformer_blocks)

    try:
        for module in unet.modules():
            if isinstance(module, SpatialTransformer):
                watch(module)
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probabilities(attention, x, context):
    """How the last picture's pixels x [B, N, channels] divide their attention among M tokens: [1, heads, N, M].

    context: what the layer is given, [B, M, context_channels]. The result is float32.
    """
    k = attention.in_heads(attention.to_k(context[-1:])).float()
    q = attention.in_heads(attention.to_q(x[-1:])).float()
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def token_maps(sums, size):
    """Maps [77, *size] of all tokens from what `recorded` gave: the mean of all layers and calls, resized to `size`.

    Their sum over the tokens is 1 at every pixel, since the weights of bilinear resizing add up to 1.
    """
    total = sum(F.interpolate(one[None], tuple(size), mode="bilinear")[0] for one, _ in sums.values())
    return total / sum(count for _, count in sums.values())


def word_places(tokenizer, prompt, words):
    """{word: where its tokens stand among the 77 of a prompt, all occurrences}; 0 is the start token.

    words: a list, or one word. One of several tokens counts where all of them stand in a row and begin as a word does.
    UserError for a word that is not there.
    """
    check(isinstance(prompt, str), f"the prompt is of type {type(prompt).__name__}; expected one text")
    words = [words] if isinstance(words, str) else list(words)
    check(words, "no word was named; expected one or more words of the prompt")
    tokens = tokenizer.split(prompt)
    begins = [True] + [token.endswith(WORD_END) or token not in tokenizer.vocab for token in tokens]
    held = list(dict.fromkeys(filter(None, (word.strip(".,;:!?\"'()[]").lower() for word in prompt.split()))))
    places = {}
    for word in words:
        part = tokenizer.split(word)
        starts = [i for i in range(len(tokens) - len(part) + 1) if begins[i] and tokens[i : i + len(part)] == part]
        check(part and starts, f'"{word}" is not in the prompt; expected one of {", ".join(held) or "its words"}'
              + nearest(word.lower(), held))
        starts = [i for i in starts if i + len(part) <= tokenizer.length - 2]
        check(starts, f'"{word}" stands behind the {tokenizer.length - 2} tokens of the prompt that fit; expected a '
              "word that is among them")
        places[word] = [1 + i + j for i in starts for j in range(len(part))]
    return places


def sheet(drawn):
    """A Pillow image with a row for each (picture [3, H, W], {word: map}): the picture, and every map over it.

    Every map is scaled to its own lowest and highest value: black, red, yellow, white.
    """
    rows = [[picture.cpu(), *(over(picture.cpu(), one.cpu()) for one in maps.values())] for picture, maps in drawn]
    return plots.sheet(rows, column_labels=["", *drawn[0][1]], scale=max(1, 160 // drawn[0][0].shape[2]), gap=4)


def over(picture, table):
    """A map [h, w] as heat over the grey of a picture [3, H, W], both by half: [3, H, W] in [-1, 1]."""
    table = F.interpolate(table[None, None].float(), picture.shape[1:], mode="bilinear")[0, 0]
    heat = (plots.heat(table)[0] + 1) / 2
    colours = torch.stack([3 * heat, 3 * heat - 1, 3 * heat - 2]).clamp(0, 1)
    return (picture.mean(0) + 2 * colours - 1) / 2
