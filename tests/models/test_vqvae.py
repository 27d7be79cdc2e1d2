"""The VQ-VAE's codebooks against their equations, its network against the authors', and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanodiff import rng
from nanodiff.errors import UserError
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from nanodiff.models.vqvae import Codebook, MovingCodebook, VQVAE, VQVAEConfig, perplexity, rows_of, used


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codebook(codes=6, channels=3, beta=0.25, kind=Codebook, **options):
    book = kind(codes, channels, beta, **options)
    with torch.no_grad():
        book.embedding.weight.copy_(noise(codes, channels, seed=3))
    return book


def moving(codes=6, channels=3, **options):
    """A moving codebook whose means stand at random vectors, all of them just used."""
    book = codebook(codes, channels, kind=MovingCodebook, **options)
    book.sums.copy_(book.embedding.weight)
    book.idle.zero_()
    return book


def small(**changes):
    return VQVAEConfig(**{"in_channels": 1, "channels": 8, "residual_layers": 1, "residual_channels": 4, "codes": 7,
                          "code_channels": 5, **changes})


# --- the codebook that learns by gradient ----------------------------------------------------------------------------

def test_the_nearest_code_is_chosen_for_every_pixel():
    book, h = codebook(50), noise(2, 3, 20, 21, seed=4)
    chosen, loss, codes = book(h)
    away = (h.permute(0, 2, 3, 1)[..., None, :].double() - book.embedding.weight.double()).square().sum(-1)
    assert codes.dtype == torch.int64 and codes.shape == (2, 20, 21)
    torch.testing.assert_close(away.gather(-1, codes[..., None])[..., 0], away.amin(-1), rtol=0, atol=1e-5)
    assert len(codes.unique()) > 30
    torch.testing.assert_close(chosen.permute(0, 2, 3, 1), book.embedding.weight[codes], rtol=0, atol=1e-6)
    assert loss.item() == pytest.approx(1.25 * away.amin(-1).mean().item() / 3, rel=1e-5)


def test_codes_that_lie_close_together_far_from_the_pixels_are_told_apart():
    book, h = Codebook(64, 8, generator=torch.Generator().manual_seed(0)), 30 * noise(1, 8, 16, 16)
    away = (rows_of(h)[:, None].double() - book.embedding.weight.double()).square().sum(-1)  # all nearly equal
    assert torch.equal(book.nearest(h).flatten(), away.argmin(1))


def test_the_gradient_of_what_follows_goes_straight_through_to_the_encoder():
    book, h, direction = codebook(), noise(2, 3, 4, 4).requires_grad_(), noise(2, 3, 4, 4, seed=5)
    chosen, _, _ = book(h)
    (chosen * direction).sum().backward()
    assert torch.equal(h.grad, direction) and book.embedding.weight.grad is None


def test_the_codebooks_gradient_does_not_depend_on_beta_and_the_encoders_is_proportional_to_it():
    gradients = {}
    for beta in (0.25, 0.5, 1.0):
        book, h = codebook(beta=beta), noise(2, 3, 4, 4).requires_grad_()
        _, loss, codes = book(h)
        loss.backward()
        gradients[beta] = book.embedding.weight.grad, h.grad / beta
        expected = torch.zeros(6, 3)
        with torch.no_grad():
            pulls = 2 * (book.embedding.weight[codes.flatten()] - rows_of(h)) / h.numel()
        torch.testing.assert_close(book.embedding.weight.grad, expected.index_add(0, codes.flatten(), pulls))
        torch.testing.assert_close(h.grad / beta, -pulls.view(2, 4, 4, 3).permute(0, 3, 1, 2))
    assert all(g.abs().max() > 0 for pair in gradients.values() for g in pair)
    for beta in (0.5, 1.0):
        for a, b in zip(gradients[beta], gradients[0.25]):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [Codebook, MovingCodebook])
def test_a_fresh_codebook_is_uniform_within_1_over_its_size_and_drawn_by_its_generator(kind):
    w, again = (kind(200, 16, generator=torch.Generator().manual_seed(1)).embedding.weight for _ in range(2))
    assert w.abs().max() <= 1 / 200 and w.std().item() == pytest.approx(1 / 200 / math.sqrt(3), rel=0.1)
    assert torch.equal(w, again)


# --- the codebook of running means -----------------------------------------------------------------------------------

def test_the_codes_follow_the_running_means_of_what_chose_them():
    book = moving(decay=0.9, patience=1000)
    counts, sums = [1.0] * 6, list(book.embedding.weight.double())
    for step in range(5):
        h = noise(2, 3, 6, 6, seed=10 + step)
        codes = book.nearest(h).flatten()
        for code in range(6):
            mine = rows_of(h)[codes == code].double()
            counts[code], sums[code] = 0.9 * counts[code] + 0.1 * len(mine), 0.9 * sums[code] + 0.1 * mine.sum(0)
        book.ema_update(h, codes.view(2, 6, 6), rng.generator(0))
        expected = torch.stack([total / count for total, count in zip(sums, counts)])
        torch.testing.assert_close(book.embedding.weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_means_that_stand_where_they_belong_stay_there():
    """Sums and counts begin on one scale: means of the very data move by nothing, from the first step on."""
    h, book = noise(2, 3, 6, 6), moving(patience=1000)
    with torch.no_grad():
        for _ in range(20):  # k-means, until every code is the mean of what chose it
            codes = book.nearest(h).flatten()
            for code in codes.unique():
                book.embedding.weight[code] = rows_of(h)[codes == code].mean(0)
    book.sums.copy_(book.embedding.weight)
    before = book.embedding.weight.clone()
    for step in range(3):
        book.ema_update(h, book.nearest(h), rng.generator(step))
        assert (book.embedding.weight - before).norm(dim=1).max() < 0.01 * before.norm(dim=1).min()


def test_looking_moves_no_mean_in_training_or_in_eval_mode():
    for mode in (True, False):
        book = moving().train(mode)
        before = {name: tensor.clone() for name, tensor in book.state_dict().items()}
        book(noise(2, 3, 4, 4))
        assert all(torch.equal(tensor, before[name]) for name, tensor in book.state_dict().items())


def test_an_unused_code_stays_where_it_is_and_finite_however_long():
    book = moving(patience=10**9, decay=0.5)
    with torch.no_grad():
        book.embedding.weight[0] = 1e6
    h = noise(1, 3, 4, 4)
    for step in range(200):  # its count fades below the least float
        book.ema_update(h, torch.ones(1, 4, 4, dtype=torch.int64), None)
        if step == 0 or step == 199:
            assert book.embedding.weight[0].tolist() == [1e6] * 3
    assert all(bool(tensor.isfinite().all()) for tensor in book.state_dict().values())
    assert book.counts[0] == 0
    torch.testing.assert_close(book.embedding.weight[1], rows_of(h).mean(0))


def test_a_dead_code_starts_anew_from_a_vector_of_the_batch_that_the_generator_chooses():
    h, ones = noise(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.int64)
    book, before = moving(patience=3), moving().embedding.weight.clone()
    for step in range(2):
        book.ema_update(h, ones, rng.generator(step))
        assert torch.equal(book.embedding.weight[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])
    twin = moving(patience=3)
    twin.load_state_dict(book.state_dict())
    other = moving(patience=3)
    other.load_state_dict(book.state_dict())
    for one, number in ((book, 7), (twin, 7), (other, 8)):
        one.ema_update(h, ones, rng.generator(number))
    assert all(torch.equal(a, b) for a, b in zip(book.state_dict().values(), twin.state_dict().values()))
    assert not torch.equal(book.embedding.weight, other.embedding.weight)
    for code in (0, 2, 3, 4, 5):
        assert (rows_of(h) == book.embedding.weight[code]).all(1).any()
    assert book.idle.tolist() == [0.0] * 6 and book.counts[[0, 2, 3, 4, 5]].tolist() == [1.0] * 5
    assert torch.equal(book.sums[[0, 2, 3, 4, 5]], book.embedding.weight[[0, 2, 3, 4, 5]])


def test_what_the_first_batch_leaves_unused_starts_from_it():
    h, book = noise(2, 3, 8, 8), MovingCodebook(6, 3, patience=50, generator=torch.Generator().manual_seed(0))
    book.ema_update(h, torch.zeros(2, 8, 8, dtype=torch.int64), rng.generator(0))  # all chose code 0
    assert all((rows_of(h) == e).all(1).any() for e in book.embedding.weight[1:])
    assert len(book.embedding.weight.unique(dim=0)) > 4 and book.idle.tolist() == [0.0] * 6


def test_the_moving_codebook_asks_of_the_encoder_alone():
    book, h = moving(), noise(2, 3, 4, 4).requires_grad_()
    _, loss, codes = book(h)
    loss.backward()
    away = h.detach() - book.look_up(codes)
    assert loss.item() == pytest.approx(0.25 * away.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(h.grad, 0.25 * 2 * away / h.numel())
    assert book.embedding.weight.grad is None


# --- how much of it is used ------------------------------------------------------------------------------------------

def test_perplexity_counts_the_codes_that_are_used_equally_often():
    assert perplexity(torch.arange(8).repeat(3), 8) == pytest.approx(8)
    assert perplexity(torch.full((4, 5, 5), 2), 8) == pytest.approx(1)
    assert perplexity(torch.tensor([0, 0, 1, 5]), 8) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert used(torch.tensor([[0, 0], [1, 5]]), 8) == 3 / 8


# --- the network -----------------------------------------------------------------------------------------------------

def test_the_default_network_has_the_authors_parameters_part_by_part():
    net = VQVAE(VQVAEConfig())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert counts == {"encoder": 363_840, "into_code": 8_256, "codebook": 32_768, "decoder": 289_987}
    assert sum(counts.values()) == 694_851


@pytest.mark.parametrize("channels, height, width", [(1, 8, 12), (3, 4, 4), (4, 16, 8)])
def test_codes_stand_for_4x4_pixels_of_any_number_of_channels(channels, height, width):
    net = VQVAE(small(in_channels=channels), torch.Generator().manual_seed(0))
    x = noise(2, channels, height, width)
    codes = net.encode(x)
    assert codes.shape == (2, height // 4, width // 4) and codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 7
    chosen, _, same = net.codebook(net.pre_quant(x))
    assert torch.equal(same, codes)
    assert net.decode_codes(codes).shape == x.shape
    torch.testing.assert_close(net.decode(chosen), net.decode_codes(codes), rtol=0, atol=1e-6)


def test_every_weight_hears_of_the_loss_and_the_generator_draws_them_all():
    net, twin = (VQVAE(small(), torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
    x = noise(2, 1, 8, 8)
    chosen, loss, _ = net.codebook(net.pre_quant(x))
    (F.mse_loss(net.decode(chosen), x) + loss).backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_convolutions_begin_within_1_over_the_root_of_what_feeds_them():
    net = VQVAE(VQVAEConfig(), torch.Generator().manual_seed(0))
    for conv, fan in ((net.encoder[2], 64 * 16), (net.decoder[0], 64 * 9), (net.encoder[5].conv1, 128 * 9)):
        assert conv.weight.abs().max() <= fan**-0.5
        assert conv.weight.std().item() == pytest.approx(fan**-0.5 / math.sqrt(3), rel=0.05)


def test_pictures_of_another_shape_and_codes_of_another_book_are_refused_with_both_named():
    net = VQVAE(small())
    with pytest.raises(UserError, match="pictures of 3x8x8 .* which wants 1 channel: expected .* such as 1x8x8"):
        net.encode(noise(2, 3, 8, 8))
    with pytest.raises(UserError, match="pictures of 1x30x8 .* such as 1x32x8"):
        net.encode(noise(2, 1, 30, 8))
    with pytest.raises(UserError, match="codes from 0 to 7 are not in this codebook of 7"):
        net.decode_codes(torch.tensor([[[0, 7]]]))


def test_a_saved_vq_vae_gives_the_same_codes_and_another_models_folder_is_refused(tmp_path):
    net, x = VQVAE(small(decay=0.9), torch.Generator().manual_seed(0)), noise(2, 1, 8, 8)
    net.codebook.ema_update(net.pre_quant(x), net.encode(x), rng.generator(0))
    save_model(net, tmp_path / "vq")
    again = load_model(tmp_path / "vq", VQVAE, VQVAEConfig)
    assert torch.equal(again.encode(x), net.encode(x))
    assert torch.equal(again.decode_codes(net.encode(x)), net.decode_codes(net.encode(x)))
    save_model(KLAutoencoder(KLAutoencoderConfig(channels=(4, 8), groups=2, blocks=1)), tmp_path / "kl")
    with pytest.raises(UserError, match="holds a KLAutoencoder; expected a VQVAE"):
        load_model(tmp_path / "kl", VQVAE, VQVAEConfig)


def test_weights_of_a_codebook_of_another_size_are_refused_with_both_shapes(tmp_path):
    save_model(VQVAE(small()), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"codes": 7', '"codes": 9'))
    with pytest.raises(UserError, match=r'"codebook.embedding.weight" has shape \[7, 5\], expected \[9, 5\]'):
        load_model(tmp_path, VQVAE, VQVAEConfig)


@pytest.mark.parametrize("change, expected", [({"codes": 0}, "codes is 0"), ({"channels": 7}, "an even width"),
                                              ({"decay": 1.0}, "decay 1.0"), ({"beta": -1}, "beta -1"),
                                              ({"patience": 0}, "patience is 0")])
def test_sizes_that_cannot_be_are_refused(change, expected):
    with pytest.raises(UserError, match=expected):
        small(**change)
