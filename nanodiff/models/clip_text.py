"""CLIP's text transformer, which tells Stable Diffusion what to draw: token ids become one vector a token.

Attribute names are the keys of a transformers CLIPTextModel without "text_model.", so that loading one needs no table.
Sources: Radford et al. 2021 (arXiv 2103.00020), section 2.4; Rombach et al. 2022 (arXiv 2112.10752), section 3.3;
report section 4.1. SD 1.x takes OpenAI's CLIP-L, SD 2.x OpenCLIP-H (arXiv 2212.07143) without its last layer.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError, nearest
from nanodiff.models.tokenizer import Tokenizer  # noqa: F401  the first half of the text encoder, by its usual address


def quick_gelu(x):
    """The approximation of GELU that OpenAI trained CLIP with: x * sigmoid(1.702 x)."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass
class ClipTextConfig:
    """The sizes of a CLIP text transformer; as it stands, those of CLIP-L in SD 1.x."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072  # width inside the feed-forward layers
    positions: int = 77
    activation: str = "quick_gelu"  # or "gelu"
    eps: float = 1e-5  # of the layer norms
    eos_id: int = 49407  # the end token, where the pooled vector is taken; 2: at the largest id of the prompt

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "mlp", "positions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} {value!r} is not possible: expected a whole number from 1")
        if type(self.eos_id) is not int:
            raise UserError(f"eos_id {self.eos_id!r} is not possible: expected one whole number")
        if type(self.eps) not in (int, float) or not self.eps > 0:
            raise UserError(f"eps {self.eps!r} is not possible: expected a small number above 0")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f'activation "{self.activation}" is unknown: expected one of {known}'
                            + nearest(self.activation, ACTIVATIONS))


class Embeddings(nn.Module):
    """What a token is plus where it stands: ids [B, N] -> [B, N, width]."""

    def __init__(self, config):
        super().__init__()
        # empty: drawing them on the meta device would make PyTorch import its compiler, two seconds of every start
        self.token_embedding = nn.Embedding(
            config.vocab_size, config.width, _weight=torch.empty(config.vocab_size, config.width))
        self.position_embedding = nn.Embedding(
            config.positions, config.width, _weight=torch.empty(config.positions, config.width))

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class CausalAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it: [B, N, width] -> [B, N, width]."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x):
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, width / heads]
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers on each token by itself."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention, then feed-forward, each normalised before and added to what came in (pre-norm)."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = CausalAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])


class ClipText(nn.Module):
    """Token ids [B, N] (N <= positions) to states [B, N, width] and one pooled vector a prompt [B, width].

    generator: draws the initial weights (None: torch's own); under torch.device("meta") there are none to draw.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps)
        if not self.final_layer_norm.weight.is_meta:
            initialise(self, generator)

    def forward(self, ids, skip_last=0):
        """(states, pooled): the final norm of what the layers gave, and of these states the one at the end token.

        skip_last    layers left out at the end, 0 to all: 1 is diffusers' clip_skip=1, which others call "clip skip 2"
        UserError for ids that the embedding table does not have or for more of them than there are positions.
        """
        layers = len(self.encoder.layers)
        if not 0 <= skip_last <= layers:
            raise UserError(f"skip_last {skip_last} is not possible: expected 0 to {layers}, the number of layers")
        self._check(ids)
        x = self.embeddings(ids)
        for layer in self.encoder.layers[:layers - skip_last]:
            x = layer(x)
        states = self.final_layer_norm(x)
        return states, states[torch.arange(len(ids), device=ids.device), self.pooled_position(ids)]

    def pooled_position(self, ids):
        """int64 [B]: where the end token of each row of ids [B, N] is, by the rule of transformers.

        With eos_id 2, which folders of SD 1.x and 2.x hold, that is the largest id: an added word's, if there is one.
        """
        return (ids if self.config.eos_id == 2 else (ids == self.config.eos_id).int()).argmax(1)  # the first of equals

    def _check(self, ids):
        if ids.ndim != 2 or ids.is_floating_point() or ids.element_size() < 4:
            raise UserError(f"ids {list(ids.shape)} {ids.dtype} are not token ids: expected whole numbers [B, N]")
        if ids.shape[1] > self.config.positions:
            raise UserError(f"{ids.shape[1]} tokens are too many: the text model has {self.config.positions} positions")
        rows = self.embeddings.token_embedding.num_embeddings
        if ids.numel() and not ids.is_meta and not 0 <= ids.min() <= ids.max() < rows:
            worst = int(ids.max()) if ids.max() >= rows else int(ids.min())
            raise UserError(f"token id {worst} is not in the text model, which has {rows} rows: "
                            "a word that was added to the tokenizer needs its rows here too")

    @torch.no_grad()
    def add_rows(self, rows):
        """Grow the embedding table for new words; the old rows stay bit for bit. Returns the new ids, a range.

        rows    float [n, width], or the number of rows of zeros
        The table becomes a new parameter: an optimiser made before still holds the old one.
        UserError for rows of another width.
        """
        table = self.embeddings.token_embedding
        old, width = table.weight.shape
        if isinstance(rows, int):
            rows = table.weight.new_zeros(rows, width)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(f"the vectors of new words have shape {list(rows.shape)}, expected [n, {width}]: "
                            f"the text model is {width} wide")
        grown = torch.cat([table.weight, rows.to(table.weight)])
        table.weight = nn.Parameter(grown, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(grown)
        self.config = replace(self.config, vocab_size=len(grown))
        return range(old, len(grown))


@torch.no_grad()
def initialise(net, generator=None):
    """Fresh weights in place, as CLIP's own code draws them: normal, narrower where a layer adds to the path; biases 0.

    CLIP's code leaves the biases of the feed-forward layers as PyTorch makes them; 0 here, as in transformers.
    generator: a torch.Generator (None: torch's own). Returns net. Source: Radford et al. 2021, the released code.
    """
    width, layers = net.config.width, net.config.layers
    into_path = width**-0.5 * (2 * layers)**-0.5
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    net.embeddings.token_embedding.weight.normal_(0, 0.02, generator=generator)
    net.embeddings.position_embedding.weight.normal_(0, 0.01, generator=generator)
    for layer in net.encoder.layers:
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            project.weight.normal_(0, width**-0.5, generator=generator)
        layer.self_attn.out_proj.weight.normal_(0, into_path, generator=generator)
        layer.mlp.fc1.weight.normal_(0, (2 * width)**-0.5, generator=generator)
        layer.mlp.fc2.weight.normal_(0, into_path, generator=generator)
    return net


# --- transformers' config.json --------------------------------------------------------------------------------------

# A CLIPTextModel's settings that are our config's under another name: (theirs, ours, their default).
NAMES = [
    ("vocab_size", "vocab_size", 49408),
    ("hidden_size", "width", 512),
    ("num_hidden_layers", "layers", 12),
    ("num_attention_heads", "heads", 8),
    ("intermediate_size", "mlp", 2048),
    ("max_position_embeddings", "positions", 77),
    ("hidden_act", "activation", "quick_gelu"),
    ("layer_norm_eps", "eps", 1e-5),
    ("eos_token_id", "eos_id", 49407),
]
# Settings of which we know one value only, their default; any other would be another network.
FIXED = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "dropout": 0.0,
         "is_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
# Settings that change nothing in this network: how it was begun, other networks' sizes, how a library answers.
OTHER = ["bos_token_id", "pad_token_id", "projection_dim", "initializer_range", "initializer_factor", "dtype",
         "torch_dtype", "transformers_version", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
         "torchscript", "tie_word_embeddings", "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id",
         "problem_type", "gradient_checkpointing",
         # what older libraries wrote for networks that generate text
         "output_scores", "return_dict_in_generate", "top_k", "top_p", "typical_p", "temperature", "num_beams",
         "num_beam_groups", "num_return_sequences", "do_sample", "early_stopping", "bad_words_ids", "max_length",
         "min_length", "length_penalty", "repetition_penalty", "diversity_penalty", "no_repeat_ngram_size",
         "encoder_no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
         "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "prefix", "sep_token_id",
         "decoder_start_token_id", "task_specific_params", "finetuning_task", "tokenizer_class", "tf_legacy_loss",
         "use_bfloat16", "cross_attention_hidden_size"]


def clip_text_config_from(settings, where="config.json"):
    """ClipTextConfig from the settings of a CLIPTextModel (its config.json); UserError for what we cannot do."""
    known = [theirs for theirs, _, _ in NAMES] + list(FIXED) + OTHER
    for key, value in settings.items():
        if key in FIXED and value != FIXED[key] and value is not None:
            raise UserError(f"{where}: {key} {value!r} is not supported, only {FIXED[key]!r} is")
        if key not in known and not key.startswith("_"):
            raise UserError(f'{where}: setting "{key}" is unknown{nearest(key, known)}')
    try:
        values = {ours: settings.get(theirs, default) for theirs, ours, default in NAMES}
        values["eos_id"] = 49407 if values["eos_id"] is None else values["eos_id"]
        return ClipTextConfig(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def clip_text_config_to(config):
    """The settings of the CLIPTextModel that equals our config, as its config.json has them."""
    settings = {theirs: getattr(config, ours) for theirs, ours, _ in NAMES}
    fixed = {key: FIXED[key] for key in ("model_type", "architectures", "attention_dropout")}
    return {**fixed, **settings, "bos_token_id": 0, "pad_token_id": 1, "projection_dim": config.width}
