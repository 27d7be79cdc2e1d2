"""CLIP's text transformer against transformers' (tests/golden/make_stable_diffusion.py) and its own promises."""

import math
import warnings

import pytest
import tiny_sd
import torch
import torch.nn.functional as F

from nanodiff.errors import UserError
from nanodiff.formats.weights import load_strictly
from nanodiff.models.clip_text import (ClipText, ClipTextConfig, Tokenizer, clip_text_config_from,
                                       clip_text_config_to, initialise, quick_gelu)

SETTINGS = {name: tiny_sd.SETTINGS[name]["text_encoder"] for name in tiny_sd.NAMES}
START, END = 49406, 49407


def golden_net(name, **changes):
    """The tiny model with the reference's weights, built without memory and given the tensors themselves."""
    drawn = tiny_sd.draw_model(name)["text_encoder"]
    weights = {key.removeprefix("text_model."): tensor for key, tensor in drawn.items() if "position_ids" not in key}
    with torch.device("meta"):
        net = ClipText(clip_text_config_from({**SETTINGS[name], **changes}))
    load_strictly(net, weights, "the tiny model", assign=True)
    return net.eval()


def small(**changes):
    return ClipTextConfig(**{"vocab_size": 50, "width": 16, "layers": 3, "heads": 4, "mlp": 24, "positions": 10,
                             "eos_id": 49, **changes})


def small_net(seed=0, **changes):
    net = ClipText(small(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
    return net.eval()


def some_ids(rows=2, n=10, seed=1):
    return torch.randint(0, 48, (rows, n), generator=torch.Generator().manual_seed(seed))


def error(a, reference):
    """The largest difference, as a share of the reference's largest magnitude."""
    assert a.shape == reference.shape
    return ((a - reference).abs().max() / reference.abs().max()).item()


# --- against transformers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny_sd.NAMES)
@torch.no_grad()
def test_states_and_pooled_equal_the_reference(name):
    golden, net = tiny_sd.golden(), golden_net(name)
    states, pooled = net(golden[f"{name}/text/ids"])
    assert error(states, golden[f"{name}/text/states"]) <= 2e-6
    assert error(pooled, golden[f"{name}/text/pooled"]) <= 2e-6


@pytest.mark.parametrize("name", tiny_sd.NAMES)
@torch.no_grad()
def test_leaving_out_the_last_layer_equals_the_references_clip_skip(name):
    golden, net = tiny_sd.golden(), golden_net(name)
    skipped, _ = net(golden[f"{name}/text/ids"], skip_last=1)
    assert error(skipped, golden[f"{name}/text/skip1"]) <= 2e-6
    assert error(skipped, golden[f"{name}/text/states"]) > 0.1


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_tokenizer_gives_the_ids_the_reference_saw(name, tmp_path):
    tiny_sd.write_tokenizer(tmp_path, tiny_sd.PAD[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the prompts is too long
        ids = Tokenizer.from_folder(tmp_path)(tiny_sd.info()[name]["text"]["prompts"])
    assert torch.equal(ids, tiny_sd.golden()[f"{name}/text/ids"])


@torch.no_grad()
def test_added_words_equal_the_reference():
    golden, net, tokenizer = tiny_sd.golden(), golden_net("sd1"), Tokenizer.shipped()
    for kind in tiny_sd.EMBEDDINGS:
        word, vectors = tiny_sd.embedding(kind)
        assert list(net.add_rows(vectors)) == tokenizer.add_word(word, len(vectors))
    ids = tokenizer(tiny_sd.info()["sd1"]["embedding"]["prompts"])
    assert torch.equal(ids, golden["sd1/embedding/ids"])
    assert error(net(ids)[0], golden["sd1/embedding/states"]) <= 2e-6


@pytest.mark.parametrize("name, parameters", [("SD15", 123_060_480), ("SD21", 340_387_840)])
def test_full_size_networks_have_the_names_and_sizes_of_the_released_ones(name, parameters):
    facts = tiny_sd.info()["full_size"][name]
    with torch.device("meta"):
        net = ClipText(clip_text_config_from(facts["settings"]["text_encoder"]))
    assert sum(p.numel() for p in net.parameters()) == parameters == facts["text_encoder"]["parameters"]
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    assert tiny_sd.fingerprint(shapes) == facts["text_encoder"]["sha256"]


def test_the_config_as_it_stands_is_clip_l():
    with torch.device("meta"):
        net = ClipText(ClipTextConfig())
    assert sum(p.numel() for p in net.parameters()) == 123_060_480


# --- what the network promises --------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_token_sees_itself_and_those_before_it_alone():
    net, ids = small_net(), some_ids()
    other = ids.clone()
    other[:, 6] = (ids[:, 6] + 1) % 48
    before, after = net(ids)[0], net(other)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before - after)[:, 6:].abs().amax(2) > 1e-3).all()
    assert (net(ids[:, :6])[0] - before[:, :6]).abs().max() < 1e-5


@torch.no_grad()
def test_skip_last_is_the_final_norm_of_an_earlier_state():
    net, ids = small_net(), some_ids()
    x = net.embeddings(ids)
    for done, layer in enumerate([None, *net.encoder.layers]):
        x = x if layer is None else layer(x)
        states, pooled = net(ids, skip_last=3 - done)
        assert torch.equal(states, net.final_layer_norm(x))
        assert torch.equal(pooled, states[torch.arange(2), net.pooled_position(ids)])


@pytest.mark.parametrize("skip", [-1, 4])
def test_more_layers_cannot_be_left_out_than_there_are(skip):
    with pytest.raises(UserError, match=f"skip_last {skip} is not possible: expected 0 to 3, the number of layers"):
        small_net()(some_ids(), skip_last=skip)


@torch.no_grad()
def test_attention_is_the_softmax_of_the_paper():
    net = small_net()
    layer, x = net.encoder.layers[0].self_attn, torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2))
    q, k, v = (project(x)[0].view(5, 4, 4) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(4)
    logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    h = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).reshape(1, 5, 16)
    assert (layer(x) - layer.out_proj(h)).abs().max() < 1e-5


@torch.no_grad()
def test_activation_comes_from_the_config():
    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), atol=1e-6)
    quick, exact = small_net(activation="quick_gelu"), small_net(activation="gelu")
    assert torch.equal(quick.encoder.layers[0].mlp.fc1.weight, exact.encoder.layers[0].mlp.fc1.weight)
    h = some_ids().float()[..., None].expand(2, 10, 16) / 48
    mlp = exact.encoder.layers[0].mlp
    assert torch.equal(mlp(h), mlp.fc2(F.gelu(mlp.fc1(h))))
    assert (quick(some_ids())[0] - exact(some_ids())[0]).abs().max() > 1e-3


def test_every_norm_has_the_eps_of_the_config():
    norms = [m for m in small_net(eps=1e-3).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 7 and all(m.eps == 1e-3 for m in norms)
    assert golden_net("sd2").final_layer_norm.eps == SETTINGS["sd2"]["layer_norm_eps"] != 1e-5


@pytest.mark.parametrize("end, expected", [(2, [2, 3, 1]), (49, [4, 5, 1])])
def test_pooled_is_taken_at_the_largest_id_or_at_the_first_end_token(end, expected):
    ids = torch.tensor([[48, 1, 52, 3, 49, 49, 49], [48, 1, 3, 51, 50, 49, 0], [48, 49, 49, 49, 49, 49, 49]])
    net = small_net(vocab_size=53, eos_id=end)
    assert net.pooled_position(ids).tolist() == expected
    states, pooled = net(ids)
    assert torch.equal(pooled, torch.stack([states[i, at] for i, at in enumerate(expected)]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_other_precisions_agree_within_theirs(dtype, tolerance):
    net, ids = small_net(), some_ids()
    reference = net(ids)[0]
    states = net.to(dtype)(ids)[0]
    assert states.dtype == dtype and error(states.float(), reference) < tolerance


@torch.no_grad()
def test_norms_compute_in_float32_in_half_precision():
    norm = torch.nn.LayerNorm(512, 1e-5).half()
    x = 300 * torch.randn(1, 512, generator=torch.Generator().manual_seed(3))  # its square is beyond float16
    assert error(norm(x.half()).float(), F.layer_norm(x, (512,))) < 2e-3
    norm = torch.nn.LayerNorm(512, 1e-5).bfloat16()
    x = 100 + torch.randn(1, 512, generator=torch.Generator().manual_seed(3))
    assert error(norm(x.bfloat16()).float(), F.layer_norm(x.bfloat16().float(), (512,))) < 5e-3


def test_every_weight_counts():
    net = small_net()
    ids = some_ids(8)
    states, pooled = net(ids)
    ((states * torch.linspace(-1, 2, 16)).sum() + pooled.square().sum()).backward()
    used = set(ids.flatten().tolist())
    for name, p in net.named_parameters():
        if "token_embedding" in name:
            assert {i for i, row in enumerate(p.grad) if row.any()} == used
        elif not name.endswith("k_proj.bias"):  # which moves all logits of a query alike
            assert p.grad.abs().max() > 1e-3, name


# --- new rows -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_new_rows_leave_the_old_ones_as_they_were():
    net, ids = small_net(), some_ids()
    table, states = net.embeddings.token_embedding.weight.clone(), net(ids)[0]
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    assert net.add_rows(vectors) == range(50, 53)
    assert torch.equal(net.embeddings.token_embedding.weight, torch.cat([table, vectors]))
    assert net.config.vocab_size == net.embeddings.token_embedding.num_embeddings == 53
    assert torch.equal(net(ids)[0], states)
    first = net.embeddings.position_embedding.weight[:1]
    assert torch.equal(net.embeddings(torch.tensor([[51]]))[0], vectors[1:2] + first)


def test_every_vector_of_a_word_gets_a_gradient():
    net, tokenizer = golden_net("sd1"), Tokenizer.shipped()
    new = tokenizer.add_word("1a1", 3)
    assert list(net.add_rows(torch.full((3, net.config.width), 0.1))) == new
    net(tokenizer("a photo of 1a1"))[0].square()[..., 0].sum().backward()
    gradient = net.embeddings.token_embedding.weight.grad
    assert (gradient[new].abs().amax(1) > 1e-4).all()


def test_new_rows_keep_type_and_training_of_the_table_and_can_be_zeros():
    net = small_net().half().requires_grad_(False)
    assert net.add_rows(2) == range(50, 52)
    weight = net.embeddings.token_embedding.weight
    assert weight.dtype == torch.float16 and not weight.requires_grad and not weight[50:].any()
    net.requires_grad_(True).add_rows(torch.ones(1, 16))
    weight = net.embeddings.token_embedding.weight
    assert weight.dtype == torch.float16 and weight.requires_grad and (weight[52] == 1).all() and len(weight) == 53


def test_a_grown_network_fits_a_config_of_its_size():
    net = small_net()
    net.add_rows(2)
    again = ClipText(clip_text_config_from(clip_text_config_to(net.config)))
    load_strictly(again, net.state_dict(), "the grown one")
    ids = torch.tensor([[1, 51, 50]])
    assert torch.equal(again.eval()(ids)[0], net(ids)[0])


@pytest.mark.parametrize("shape", [(2, 17), (16,), (1, 2, 16)])
def test_vectors_of_another_width_are_refused_with_both_numbers(shape):
    net = small_net()
    with pytest.raises(UserError, match=rf"shape \{list(shape)}, expected \[n, 16\]"):
        net.add_rows(torch.zeros(shape))
    assert len(net.embeddings.token_embedding.weight) == 50


# --- fresh weights --------------------------------------------------------------------------------------------------

def test_fresh_weights_have_the_spread_of_clip():
    with torch.device("meta"):
        net = ClipText(ClipTextConfig(vocab_size=2000, width=128, layers=4, heads=2, mlp=512))
    net.to_empty(device="cpu")
    for p in net.parameters():
        p.data.fill_(math.nan)
    assert initialise(net, torch.Generator().manual_seed(0)) is net
    into_path = 128**-0.5 * 8**-0.5
    spread = {"token_embedding": 0.02, "position_embedding": 0.01, "q_proj": 128**-0.5, "k_proj": 128**-0.5,
              "v_proj": 128**-0.5, "out_proj": into_path, "fc1": 256**-0.5, "fc2": into_path}
    for name, p in net.named_parameters():
        if "norm" in name:
            assert (p == name.endswith("weight")).all(), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std().item() == pytest.approx(spread[name.split(".")[-2]], rel=0.03), name
            assert abs(p.mean().item()) < 5 * p.std().item() / math.sqrt(p.numel()), name


def test_fresh_weights_follow_from_the_generator():
    a, b, c = (initialise(ClipText(small()), torch.Generator().manual_seed(seed)).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["encoder.layers.0.mlp.fc1.weight"], c["encoder.layers.0.mlp.fc1.weight"])


# --- settings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_settings_survive_the_way_there_and_back(name):
    config = clip_text_config_from(SETTINGS[name])
    written = clip_text_config_to(config)
    assert clip_text_config_from(written) == config
    known = {"architectures", "hidden_act", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
             "num_hidden_layers", "layer_norm_eps", "eos_token_id", "max_position_embeddings", "model_type"}
    assert {key: written[key] for key in known} == {key: SETTINGS[name][key] for key in known}


def test_missing_settings_are_those_of_transformers():
    assert clip_text_config_from({}) == ClipTextConfig(49408, 512, 12, 8, 2048, 77, "quick_gelu", 1e-5, 49407)


@pytest.mark.parametrize("changes, said", [
    ({"hidden_act": "gelu_new"}, 'activation "gelu_new" is unknown: expected one of quick_gelu, gelu, nearest: gelu'),
    ({"hidden_size": 30, "num_attention_heads": 4}, "width 30 does not divide into 4 heads"),
    ({"num_hidden_layers": 0}, "layers 0 is not possible"),
    ({"hidden_size": "24"}, "width '24' is not possible: expected a whole number"),
    ({"eos_token_id": [1, 2]}, r"eos_id \[1, 2\] is not possible: expected one whole number"),
    ({"layer_norm_eps": -1}, "eps -1 is not possible"),
    ({"hiden_size": 24}, 'setting "hiden_size" is unknown, nearest: hidden_size'),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported, only 0.0 is"),
    ({"architectures": ["CLIPVisionModel"]}, "architectures .* is not supported"),
    ({"model_type": "bert"}, "model_type 'bert' is not supported, only 'clip_text_model' is")])
def test_settings_of_another_network_are_refused_by_name(changes, said):
    with pytest.raises(UserError, match=said) as refused:
        clip_text_config_from({**SETTINGS["sd1"], **changes}, "somewhere/config.json")
    assert str(refused.value).startswith("somewhere/config.json: ")


# --- bad ids --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ids, said", [
    (torch.tensor([[1, 50]]), "token id 50 is not in the text model, which has 50 rows: a word that was added"),
    (torch.tensor([[-1, 2]]), "token id -1 is not in the text model"),
    (torch.zeros(1, 11, dtype=torch.int64), "11 tokens are too many: the text model has 10 positions"),
    (torch.zeros(4, dtype=torch.int64), "expected whole numbers"), (torch.zeros(1, 4), "expected whole numbers")])
def test_ids_that_do_not_fit_are_refused(ids, said):
    with pytest.raises(UserError, match=said):
        small_net()(ids)
