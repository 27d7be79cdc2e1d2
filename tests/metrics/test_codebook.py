"""Measures of codes against closed forms and definitions, on a network whose codes are known."""

import math

import pytest
import torch

from nanodiff import plots
from nanodiff.data.images import Images
from nanodiff.errors import UserError
from nanodiff.metrics import codebook as measures
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.pixels import from_uint8


def net():
    made = VQVAE(VQVAEConfig(1, 8, 1, 4, 7, 5), torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = made.pre_quant(from_uint8(some_pictures().pixels))  # codes where the encoder's vectors are
        made.codebook.embedding.weight.copy_(h.permute(0, 2, 3, 1).flatten(0, 2)[::17][:7])
    return made.eval()


def some_pictures(n=30):
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 2, ["a", "b"])


def test_the_variance_is_that_of_all_numbers_together():
    data = some_pictures()
    assert measures.pixel_variance(data) == pytest.approx(from_uint8(data.pixels).double().var(correction=0).item())
    with pytest.raises(UserError, match="all 5 training pictures are of one grey level"):
        measures.pixel_variance(Images(torch.full((5, 1, 8, 8), 37, dtype=torch.uint8)))


def test_measures_follow_their_definitions_whatever_the_batch():
    model, pictures = net(), some_pictures()
    numbers, codes = measures.measure(model, pictures, 0.5, batch=7)
    x = from_uint8(pictures.pixels)
    with torch.no_grad():
        assert torch.equal(codes, model.encode(x))
        error = (model.decode_codes(codes).clamp(-1, 1) - x).double().square().mean().item()
    share = codes.flatten().bincount(minlength=7).double() / codes.numel()
    entropy = -sum(p * math.log2(p) for p in share.tolist() if p)
    assert numbers["n"] == 30 and numbers["nmse"] == pytest.approx(error / 0.5, rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(2**entropy) and numbers["bits"] == pytest.approx(4 * entropy)
    assert numbers["used"] == (share > 0).double().mean() and 1 < len(codes.unique()) <= 7
    assert f"{numbers['nmse']:.4f}" in measures.sentence(numbers, 7)


def test_the_codebook_picture_shows_used_codes_alone_the_most_used_first_as_the_mean_of_where_they_are(monkeypatch):
    model, sheets = net(), []
    monkeypatch.setattr(plots, "sheet", lambda rows, **options: sheets.append((rows, options["title"])))
    codes = torch.tensor([[[4, 6], [4, 1]], [[6, 4], [4, 4]]])
    measures.codebook_picture(model, codes)
    (rows, title), = sheets
    with torch.no_grad():
        x = model.decode_codes(codes).clamp(-1, 1)  # [2, 1, 8, 8]
    at = {4: [(0, 0, 0), (0, 4, 0), (1, 0, 4), (1, 4, 0), (1, 4, 4)], 6: [(0, 0, 4), (1, 0, 0)], 1: [(0, 4, 4)]}
    expected = [torch.stack([x[n, :, i:i + 4, j:j + 4] for n, i, j in places]).mean(0) for places in at.values()]
    torch.testing.assert_close(torch.stack(rows[0]), torch.stack(expected))
    assert title.startswith("3 of 7 codes")


def test_bits_of_a_table_are_the_cross_entropy_of_the_shares():
    codes = torch.tensor([[0, 1], [0, 2], [0, 1]])  # shares with one more each: 4, 3, 2 of 9
    assert measures.table_bits(codes, codes, 3) == pytest.approx(
        (3 * math.log2(9 / 4) + 2 * math.log2(9 / 3) + math.log2(9 / 2)) / 6)
    by_place = [[4 / 6, 1 / 6, 1 / 6], [1 / 6, 3 / 6, 2 / 6]]
    assert measures.table_bits(codes, torch.tensor([[0, 0]]), 3, by_place=True) == pytest.approx(
        -(math.log2(by_place[0][0]) + math.log2(by_place[1][0])) / 2)
    many = torch.randint(16, (5000, 4), generator=torch.Generator().manual_seed(0))
    assert measures.table_bits(many, many, 16) == pytest.approx(4, abs=0.01)


def test_bits_of_a_gpt_that_says_nothing_are_log2_k_and_asking_leaves_its_mode():
    gpt = GPT(GPTConfig(16, 4, 2, 8, 1, 2, dropout=0.5)).train()
    torch.nn.init.zeros_(gpt.head.weight)
    codes = torch.randint(16, (10, 4), generator=torch.Generator().manual_seed(0))
    assert measures.gpt_bits(gpt, codes, torch.zeros(10, dtype=torch.int64), batch=3) == pytest.approx(4)
    assert gpt.training
