"""The first loss of the seven scripts that condition on a text, by hand: see test_first_loss.py."""

import pytest
import torch
from safetensors.torch import load_file

import nanodiff
import tiny_ldm
from nanodiff import rng, worlds
from nanodiff.classifiers.worlds import load_classifier
from nanodiff.data import captions
from nanodiff.diffusion import Schedule
from nanodiff.formats.stable_diffusion_folder import load_autoencoder, load_text_encoder
from nanodiff.models.clip_text import Tokenizer
from nanodiff.training.batches import Batches
from recorded import SEED, STILL, agree, agree_gradient, record
from test_first_loss import noised, weight_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Places:
    """A data set that says where its pictures are: what a batch of it reads are the draws of its places."""

    def __init__(self, n):
        self.n, self.in_memory, self.labels = n, True, None

    def __len__(self):
        return self.n

    def read(self, index, draw):
        return draw


def latents(autoencoder, x, draw):
    """Latents of pictures, each drawn from its own distribution by its `draw`, in the autoencoder's unit."""
    with torch.no_grad():
        q = autoencoder.encode(x)
    noise = rng.normal(0, 0, draw, q.mean.shape[1:], stream=rng.POSTERIOR)
    return autoencoder.config.scaling_factor * (q.mean + torch.exp(q.logvar / 2) * noise)


def halves(states):
    """States of a frozen text encoder, which are made once and kept in half precision."""
    return states.half().float()


# --- CLIP -------------------------------------------------------------------------------------------------------------

def test_clip_descends_the_cross_entropy_of_texts_and_of_pictures(places, tmp_path):
    found = record("clip", places, tmp_path / "run")
    drawn, reader = worlds.load("train", 64, 24, seed=SEED), load_classifier()
    with torch.no_grad():
        features = reader.features(drawn.pixels.float() / 127.5 - 1)
    features = features / features.std()
    draw, index, _ = Batches(Places(24), 8, SEED).get(0)
    said = [captions.caption(drawn.scenes[i], v) for i, v in zip(index.tolist(), (draw % 2).tolist())]
    net = found.net
    text = net.text_projection(net.text(Tokenizer.shipped()(said))[1])
    image = net.image_projection(features[index])
    cosines = (text / text.norm(dim=1, keepdim=True)) @ (image / image.norm(dim=1, keepdim=True)).T
    logits = net.scale.exp() * cosines  # the temperature starts at 1 / 0.07, below its limit of 100
    texts, pictures = (-logits.log_softmax(dim).diagonal().mean() for dim in (1, 0))
    assert abs(float(texts - pictures)) > 1e-3  # or one direction could stand for both
    agree(found, (texts + pictures) / 2, rtol=1e-3)


# --- latent diffusion from nothing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, {"prediction": "noise", "schedule": "scaled_linear", "shift": 1.0}, {"snr_gamma": 0.5}, {"noise_offset": 0.5},
    {"prediction": "noise", "snr_gamma": 0.5, "optimiser": "adamw"}, {"caption_dropout": 0.5, "variants": 3},
    {"zero_snr": True}, {"text": "scratch", "caption_dropout": 0.5}, {"train_text": True}, {"autoencoder": "none"},
    {"batch": 3, "gradient_accumulation": 2}])
def test_latent_diffusion_descends_the_weighted_error_of_its_prediction(places, tmp_path, changes):
    flags = {"batch": 6, **changes}
    found = record("ldm", places, tmp_path / "run", **flags)
    model, accumulation = nanodiff.load(tmp_path / "run/model"), changes.get("gradient_accumulation", 1)
    kind, variants = changes.get("prediction", "v"), changes.get("variants", 2)
    schedule = getattr(Schedule, changes.get("schedule", "cosine"))().shifted(changes.get("shift", 4.0))
    schedule = schedule.zero_terminal_snr() if "zero_snr" in changes else schedule
    drawn = worlds.load("train", 16, 24, tiny_ldm.NAMES.split(","), seed=SEED)
    autoencoder = load_autoencoder(places["parts"] / "vae")
    text, learns = load_text_encoder(places["parts"])[0], found.net.text is not None
    made, loss = Batches(Places(24), flags["batch"], SEED, accumulation), 0
    for micro in range(accumulation):
        draw, index, position = made.get(0, micro)
        x0 = drawn.read(index, draw)
        x0 = x0 if "autoencoder" in changes else latents(autoencoder, x0, draw)
        shared = rng.normal(SEED, 0, position, (x0.shape[1], 1, 1), stream=rng.OFFSET_NOISE)
        noise = rng.normal(SEED, 0, position, x0.shape[1:]) + changes.get("noise_offset", 0) * shared
        t = (rng.uniform(SEED, rng.TIME, 0, position) * 1000).long()
        wording = (rng.uniform(SEED, rng.WORDING, 0, position) * variants).long().tolist()
        dropped = rng.uniform(SEED, rng.DROPOUT, 0, position) < changes.get("caption_dropout", 0.1)
        said = ["" if d else captions.caption(drawn.scenes[i], v) for d, i, v in zip(dropped, index.tolist(), wording)]
        assert "caption_dropout" not in changes or dropped.any() and not dropped.all()
        ids = model.tokenizer(said)
        context = found.net.text(ids)[0] if learns else halves(text(ids)[0])
        x_t, target = noised(schedule, kind, x0, noise, t)
        error = (found.net.unet(x_t, t, context) - target).square().mean((1, 2, 3))
        name = "min-snr" if "snr_gamma" in changes else "simple"
        weight = weight_of(schedule, name, kind, t, changes.get("snr_gamma"))
        loss = loss + (weight * error).mean() / accumulation
    agree(found, loss, rtol=1e-3)


# --- fine-tuning ------------------------------------------------------------------------------------------------------

class Lesson:
    """What a fine-tuning script is shown: drawn zigzags as latents, with their captions."""

    def __init__(self, sd, batch, changes):
        self.sd, self.changes, self.batch = sd, changes, batch
        # as the two models' folders have it; sd.schedule is what the script made of it
        self.schedule = Schedule.scaled_linear(1000, *((0.001, 0.015) if "model" in changes else (0.00085, 0.012)))
        self.schedule = self.schedule.zero_terminal_snr() if "zero_snr" in changes else self.schedule
        self.side = sd.settings["unet"]["sample_size"] * sd.factor
        self.drawn = worlds.load("train", self.side, 6, ("zigzagged",), seed=SEED)

    def batch_of(self, step, micro=0):
        """(latents, noise, t, index, position) of a micro-batch."""
        made = Batches(Places(6), self.batch, SEED, self.changes.get("gradient_accumulation", 1))
        draw, index, position = made.get(step, micro)
        x0 = latents(self.sd.autoencoder, self.drawn.read(index, draw), draw)
        t = (rng.uniform(SEED, rng.TIME, step, position) * 1000).long()
        return x0, self.noise(step, position, x0.shape[1:], rng.NOISE), t, index, position

    def noise(self, step, position, shape, stream):
        offset = rng.normal(SEED, step, position, (shape[0], 1, 1), stream=stream + rng.OFFSET_NOISE)
        return rng.normal(SEED, step, position, shape, stream=stream) + self.changes.get("noise_offset", 0) * offset

    def said(self, step, position, said, stream=rng.DROPOUT, share=0.1):
        """The captions that are shown: some are left out."""
        dropped = rng.uniform(SEED, stream, step, position) < self.changes.get("caption_dropout", share)
        return ["" if gone else caption for gone, caption in zip(dropped, said)]

    def states(self, said, live):
        states = self.sd.text_model(self.sd.tokenizer(said))[0]
        return states if live else halves(states)

    def losses(self, x0, noise, t, states, target=None):
        """The weighted error [B] of the model's prediction."""
        x_t, plain = noised(self.schedule, self.sd.kind, x0, noise, t)
        error = (self.sd.unet(x_t, t, states) - (plain if target is None else target)).square().mean((1, 2, 3))
        name = "min-snr" if "snr_gamma" in self.changes else "simple"
        return weight_of(self.schedule, name, self.sd.kind, t, self.changes.get("snr_gamma")) * error


V = {"model": "{sd2}"}  # a model that predicts v; the other predicts noise


@pytest.mark.parametrize("changes", [{}, V, {"snr_gamma": 0.05}, {**V, "snr_gamma": 0.05}, {"noise_offset": 0.5},
                                     {"caption_dropout": 0.5, "batch": 6}, {"train_text": True},
                                     {**V, "zero_snr": True}, {"gradient_accumulation": 2}])
def test_full_fine_tuning_descends_the_weighted_error_of_its_prediction(places, tmp_path, changes):
    found = record("finetune", places, tmp_path / "run", **changes)
    lesson, loss = Lesson(found.result, changes.get("batch", 2), changes), 0
    accumulation = changes.get("gradient_accumulation", 1)
    for micro in range(accumulation):
        x0, noise, t, index, position = lesson.batch_of(0, micro)
        said = lesson.said(0, position, [lesson.drawn.captions[i] for i in index.tolist()])
        assert "batch" not in changes or "" in said and len(set(said)) > 1
        loss = loss + lesson.losses(x0, noise, t, lesson.states(said, "train_text" in changes)).mean() / accumulation
    agree(found, loss, rtol=1e-3)


STYLE = ["a texture in the style of <new>", "a picture in the style of <new>", "a surface in the style of <new>",
         "a material in the style of <new>", "a pattern in the style of <new>", "a photo in the style of <new>",
         "a close-up in the style of <new>", "<new>"]
OBJECT = ["a photo of a <new>", "a rendering of a <new>", "a cropped photo of the <new>", "the photo of a <new>",
          "a photo of one <new>", "a close-up photo of a <new>", "a bright photo of the <new>",
          "a good photo of a <new>", "a picture of a <new>", "a <new>"]


@pytest.mark.parametrize("changes", [{}, V, {"learnable_property": "object"}, {**V, "snr_gamma": 0.05},
                                     {"noise_offset": 0.5}])
def test_textual_inversion_descends_the_error_under_sentences_with_the_word(places, tmp_path, changes):
    found = record("textual_inversion", places, tmp_path / "run", **changes)
    lesson, sentences = Lesson(found.result, 2, changes), OBJECT if "learnable_property" in changes else STYLE
    x0, noise, t, _, position = lesson.batch_of(0)
    chosen = (rng.uniform(SEED, rng.WORDING, 0, position) * len(sentences)).long().tolist()
    states = lesson.states([sentences[i] for i in chosen], live=True)
    agree(found, lesson.losses(x0, noise, t, states).mean(), step=None)
    (vectors, gradient), = found.gradients[0].items()  # of the word's vectors alone
    assert vectors.shape == (2, states.shape[2]) and gradient.any()


def prior_losses(lesson, changes, batch, step=0, live=False):
    """The losses [B] on pictures of the drawn worlds, with noise, time steps and dropped captions of their own."""
    drawn = worlds.load("train", lesson.side, 12, seed=SEED + 1)
    plain = [i for i, caption in enumerate(drawn.captions) if captions.is_plain(caption)]
    draw, index, position = Batches(Places(len(plain)), batch, SEED + 1).get(step)
    copies, numbers, base = changes.get("teacher_predictions", 0), position, None
    if copies:  # noisy copies that are made once, whose targets are what the model answered before
        which = (rng.uniform(SEED, rng.PRIOR_COPY, step, position) * copies).long()
        assert len(index) < 4 or len(which.unique()) > 1
        draw = numbers = copies * index + which
        step, base = 0, nanodiff.load(changes["base_model"])
    x0 = latents(lesson.sd.autoencoder, drawn.read(torch.tensor(plain)[index], draw), draw)
    noise = lesson.noise(step, numbers, x0.shape[1:], rng.PRIOR_NOISE)
    t = (rng.uniform(SEED, rng.PRIOR_TIME, step, numbers) * 1000).long()
    said = lesson.said(step, numbers, [drawn.captions[plain[i]] for i in index.tolist()], rng.PRIOR_DROPOUT)
    states, target = lesson.states(said, live), None
    if copies:
        with torch.no_grad():
            x_t, _ = noised(lesson.schedule, lesson.sd.kind, x0, noise, t)
            target = base.unet(x_t, t, states.detach() if live else halves(base.text_model(base.tokenizer(said))[0]))
    return lesson.losses(x0, noise, t, states, target)


def instance_losses(lesson, said, step=0, live=False):
    x0, noise, t, _, position = lesson.batch_of(step)
    return lesson.losses(x0, noise, t, lesson.states(lesson.said(step, position, [said] * len(x0)), live))


NO_PRIOR = {"with_prior_preservation": None, "class_data": None, "num_class_images": None}


@pytest.mark.parametrize("changes", [
    {}, V, {"prior_loss_weight": 0.3}, {"prior_loss_weight": 0.3, "class_batch": 1},
    {**V, "teacher_predictions": 3, "class_batch": 4},
    {"snr_gamma": 0.05, "noise_offset": 0.5}, {"caption_dropout": 0.5, "batch": 6}, {"train_text": True},
    {**NO_PRIOR, **V}, {**NO_PRIOR, "snr_gamma": 0.05}])
def test_dreambooth_descends_the_new_pictures_error_plus_the_weighted_prior(places, tmp_path, changes):
    shares = {"caption_dropout": 0.0, **changes}
    found = record("dreambooth", places, tmp_path / "run", **shares)
    batch, live = changes.get("batch", 2), "train_text" in changes
    shares["base_model"] = places["sd2" if "model" in changes else "sd1"]
    lesson = Lesson(found.result, batch, shares)
    instance = loss = instance_losses(lesson, "a sks texture", live=live).mean()
    if "class_data" not in changes:
        prior = prior_losses(lesson, shares, changes.get("class_batch", batch), live=live).mean()
        loss = instance + changes.get("prior_loss_weight", 1.0) * prior
        agree(found, instance, "instance", step=None)
        agree(found, prior, "prior", step=None)
    agree(found, loss, rtol=1e-3)


@pytest.mark.parametrize("changes", [
    {}, V, {**V, "placeholder_token": None, "instance_prompt": "a sks texture"},
    {"prior_loss_weight": 0.3, "class_batch": 1},
    {**V, "teacher_predictions": 2, "prior_loss_weight": 0.3}, {"snr_gamma": 0.05, "noise_offset": 0.5},
    {"targets": "attention,text", "caption_dropout": 0.5, "batch": 6},
    {**NO_PRIOR, "placeholder_token": None, "instance_prompt": None, **V},
    {**NO_PRIOR, "snr_gamma": 0.05, "alpha": 3.0}])
def test_a_lora_descends_the_new_pictures_error_plus_the_weighted_prior(places, tmp_path, changes):
    flags = {"caption_dropout": 0.1, "word_lr": STILL, **changes}
    found = record("lora", places, tmp_path / "run", **flags)
    batch, word = changes.get("batch", 2), changes.get("placeholder_token", "<new>")
    prior_live = "text" in changes.get("targets", "")  # the text encoder learns
    live = prior_live or word is not None
    flags["base_model"] = places["sd2" if "model" in changes else "sd1"]
    lesson = Lesson(found.result, batch, flags)
    prompt = changes.get("instance_prompt", "a <new> texture")
    if prompt is None:
        x0, noise, t, index, position = lesson.batch_of(0)
        said = lesson.said(0, position, [lesson.drawn.captions[i] for i in index.tolist()])
        loss = lesson.losses(x0, noise, t, lesson.states(said, live)).mean()
    else:
        loss = instance_losses(lesson, prompt, live=live).mean()
    if "class_data" not in changes:
        instance, prior = loss, prior_losses(lesson, flags, changes.get("class_batch", batch), live=prior_live).mean()
        loss = instance + changes.get("prior_loss_weight", 1.0) * prior
        agree(found, instance, "instance", step=None)
        agree(found, prior, "prior", step=None)
    agree(found, loss, step=None)
    written = load_file(tmp_path / "run/lora.kohya.safetensors")  # a change counts alpha / rank times
    assert {float(value) for name, value in written.items() if name.endswith(".alpha")} == {changes.get("alpha", 5.0)}
    rows = {p for p in found.gradients[0] if p.ndim == 2 and p.shape == (1, found.result.text_model.config.width)}
    assert bool(rows) == (word is not None)  # the vector of the word learns, too
    found.gradients[0] = {p: g for p, g in found.gradients[0].items() if p not in rows}
    agree_gradient(found, loss, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"prior_loss_weight": 0.3}, V, {**V, "teacher_predictions": 1},
                                     {**NO_PRIOR, "snr_gamma": 0.05},
                                     {"noise_offset": 0.5, "caption_dropout": 0.5, "batch": 6}])
def test_pivotal_tuning_descends_the_words_error_and_then_the_loras_with_its_prior(places, tmp_path, changes):
    flags = {"caption_dropout": 0.1, "word_lr": STILL, "steps": 2, "word_steps": 1, **changes}
    found = record("pivotal", places, tmp_path / "run", **flags)
    flags["base_model"] = places["sd2" if "model" in changes else "sd1"]
    lesson = Lesson(found.result, changes.get("batch", 2), flags)
    sentences = ["a <new> texture", *STYLE]
    x0, noise, t, _, position = lesson.batch_of(0)
    chosen = (rng.uniform(SEED, rng.WORDING, 0, position) * len(sentences)).long().tolist()
    first, second = [row for row in found.log if "loss" in row]
    word = lesson.losses(x0, noise, t, lesson.states([sentences[i] for i in chosen], live=True)).mean()
    assert first["loss"] == pytest.approx(float(word), rel=1e-5)
    assert [tuple(p.shape) for p in found.gradients[0]] == [(1, found.result.text_model.config.width)]
    loss = instance = instance_losses(lesson, "a <new> texture", step=1).mean()
    if "class_data" not in changes:
        prior = prior_losses(lesson, flags, changes.get("batch", 2), step=1).mean()
        loss = instance + changes.get("prior_loss_weight", 1.0) * prior
        assert second["instance"] == pytest.approx(float(instance), rel=1e-5)
        assert second["prior"] == pytest.approx(float(prior), rel=1e-5)
    assert second["loss"] == pytest.approx(float(loss), rel=1e-5)
    agree_gradient(found, loss, step=1, rtol=1e-3)
