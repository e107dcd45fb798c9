"""Plans: published parameter counts and step numbers, and bytes that autograd really saves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import DistributedType
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from encoders.backends.open_clip import OpenClipEncoder
from encoders.backends.timm import TimmEncoder
from mof.adapter import InterleavedMoF
from mof.language_models import MINI_LM
from study.memory import GIB, Layer
from study.plan import Plan, _adapter_bytes, fits, plan
from study.plan_hours import ASSUMED, LINES, RESULTS, hours, measured_shares
from study.plan_tables import plan_tables
from study.settings import Setting, Stage, read_setting
from vig.training.preparation import add_lora

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llava() -> dict[str, Plan]:
    return {size: plan(read_setting(CONFIGS / f"llava15_{size}.yaml"), devices=8) for size in ("7b", "13b")}


def small(**changes: object) -> Setting:
    stage = Stage(1e-3, 8)
    encoders = {"a": {"name": "tiny-a"}, "b": {"name": "tiny-b"}}
    return Setting(
        **({"name": "small", "encoders": encoders, "llm": "x", "align": stage, "finetune": stage, "llm_config": LLAMA} | changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "llm", "hidden"), [("7b", 6_738_415_616, 4096), ("13b", 13_015_864_320, 5120)])
def test_published_sizes(llava: dict[str, Plan], size: str, llm: int, hidden: int):
    llava_plan = llava[size]
    assert llava_plan.llm == llm
    assert llava_plan.adapters == 2 * (1024 * hidden + hidden + hidden * hidden + hidden)
    # OpenAI's CLIP ViT-L/14-336 vision tower, its projection counted; DINOv2's 304.37M with 577 positions for its 1,370.
    assert llava_plan.encoders == {"clip": 303_507_456 + 1024 * 768, "dinov2": 304_367_616 - (1370 - 577) * 1024}
    assert llava_plan.trainable == {"align": llava_plan.adapters, "finetune": llava_plan.adapters + llm}
    assert llava_plan.total == sum(llava_plan.encoders.values()) + llava_plan.adapters + llm


@pytest.mark.slow
def test_published_visual_tokens_and_steps(llava: dict[str, Plan]):
    for llava_plan in llava.values():
        assert llava_plan.tokens_per_image == 1152
        assert llava_plan.tokens == {"align": 1152 + 128, "finetune": 2048}
        # 558,128 records by 256, 665,298 by 128; VIG: 70 % of the 624,610 with an image, and the 40,688 without.
        assert llava_plan.steps == {"align": 2181, "finetune": 5198, "finetune, VIG": 3734}


@pytest.mark.slow
def test_memory_of_the_published_setting(llava: dict[str, Plan]):
    llava_plan = llava["7b"]
    states = 16 * (6_738_415_616 + llava_plan.adapters)  # fp32 weights, gradients and two moments
    whole, sharded = (llava_plan.memory("finetune", sharded, checkpointed=True) for sharded in (False, True))
    frozen = 2 * sum(llava_plan.encoders.values())
    assert whole["weights"] + whole["gradients"] + whole["optimizer"] == states + frozen
    assert sharded["weights"] + sharded["gradients"] + sharded["optimizer"] == pytest.approx(states / 8 + frozen)
    assert not fits(whole) and fits(sharded)
    tokens = 16 * 2048
    # A recomputed layer: two norms, queries, keys, values and output of attention, gate, up and two products of the MLP. The logits
    # of 1,024 tokens at a time take less.
    layer = tokens * (2 * 4096 * (4 + 2 * 2) + 4 * 4096 * 2 + 4 * 11008 * 2)
    assert layer > 1024 * 32000 * 14
    boundaries, adapters = tokens * 32 * 4096 * 2, 16 * llava_plan.adapter_bytes
    assert sharded["activations"] == boundaries + layer + adapters and sum(sharded.values()) < 60 * GIB
    assert fits(plan(read_setting(CONFIGS / "qwen3_4b_siglip2_dinov3.yaml")).memory("finetune", True, checkpointed=True))
    assert llava_plan.memory("finetune", True, checkpointed=False)["activations"] > 2 * sharded["activations"]
    assert llava_plan.memory("align", False, checkpointed=False)["optimizer"] == 8 * llava_plan.adapters


@pytest.mark.slow
def test_operations_of_the_encoders_are_those_published(llava: dict[str, Plan]):
    """timm counts 191.1 GMACs for CLIP ViT-L/14-336's 24 blocks, of which LLaVA runs 23, and 0.6 for its patches; DINOv2's are alike."""
    clip, dino = 2e9 * ((191.1 - 0.6) * 23 / 24 + 0.6), 2e9 * 191.1
    assert llava["7b"].image_operations == pytest.approx(clip + dino, rel=0.02)


@pytest.mark.slow
def test_hours_of_llava_as_published():
    """LLaVA-1.5 7B took 3.5 and 10 hours on 8 A100: stage 2 ran at a third of their peak of 312 TFLOP/s, stage 1 a little faster."""
    setting = read_setting(CONFIGS / "llava15_7b.yaml")
    clip_only = dataclasses.replace(setting, encoders={"clip": setting.encoders["clip"]})
    stages = hours(plan(clip_only), dict.fromkeys(ASSUMED, 0.33), peak=312e12)
    align, score, finetune, selected = (stage.hours for stage in stages)
    assert align == pytest.approx(3.5, rel=0.4) and finetune == pytest.approx(10, rel=0.15)
    assert score < 0.4 * finetune and selected == pytest.approx(finetune * 477_915 / 665_298, rel=0.02)
    assert [stage.records for stage in stages] == [558_128, 624_610, 665_298, 477_915]


@pytest.mark.slow
def test_measured_shares_take_the_place_of_assumed_shares(llava: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [{"part": part, "name": name, "share": 0.2} for part, name in LINES.values()]
    facts = {"about": {"device": "NVIDIA H200"}, "lines": [*lines[:2], lines[2] | {"share": None}]}
    (tmp_path / "gpu.json").write_text(json.dumps(facts))
    assert measured_shares(tmp_path / "gpu.json") == {"encoders": 0.2, "training": 0.2}
    (tmp_path / "tiny.json").write_text(json.dumps(facts | {"about": {"tiny": "yes"}}))
    assert measured_shares(tmp_path / "tiny.json") == measured_shares(tmp_path / "none.json") == {}
    slow, fast = (sum(stage.hours for stage in hours(llava["7b"], dict.fromkeys(ASSUMED, share))) for share in (0.2, 0.4))
    assert slow == pytest.approx(2 * fast)
    assert measured_shares() == {} or RESULTS.is_file()


def test_the_benchmark_has_the_lines_that_give_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(CONFIGS.parents[1] / "benchmarks" / "gpu"))
    import encoder_lines
    import language_lines
    from measure import Bench

    bench = Bench(torch.device("cpu"), False, 0.0, tmp_path)
    for add in (encoder_lines.add_pixel_lines, language_lines.add_scoring_lines, language_lines.add_training_lines):
        add(bench)
    assert {name for _, name in LINES.values()} <= set(bench.lines)


@pytest.mark.slow
def test_nothing_is_looked_up(llava: dict[str, Plan], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert plan(small()).tokens_per_image > 0


@pytest.mark.slow
def test_the_tables_show_the_numbers(llava: dict[str, Plan]):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_tables(llava["7b"]))
    text = console.export_text()
    assert "training 40% (assumed)" in " ".join(text.split()) or RESULTS.is_file()
    for shown in (
        "llava15_7b: 1,152 visual tokens per image",
        "6,738,415,616",
        "2,181",
        "5,198",
        "3,734",
        "sharded, checkpointed",
        "expected hours on 8",
    ):
        assert shown in text


def test_trainable_encoders_unknown_numbers_of_records_and_fusions():
    frozen = plan(small(), devices=1)
    trained = plan(small(encoders={"a": {"name": "tiny-a", "trainable": True}, "b": {"name": "tiny-b"}}), devices=1)
    assert trained.trainable["align"] == frozen.trainable["align"] + frozen.encoders["a"]
    assert trained.total == frozen.total
    assert frozen.steps == {"align": None, "finetune": None, "finetune, VIG": None}
    assert plan(small(fusion="concat"), devices=1).tokens_per_image * 2 == frozen.tokens_per_image


def test_tiles_and_unshuffling_count():
    whole, tiled = plan(small(), devices=1), plan(small(max_tiles=3), devices=1)
    assert (tiled.tokens_per_image, tiled.adapter_bytes) == (4 * whole.tokens_per_image, 4 * whole.adapter_bytes)
    unshuffled, pooled = (plan(small(pool=(2, 2), unshuffle=unshuffle), devices=1) for unshuffle in (True, False))
    assert whole.tokens_per_image == 4 * unshuffled.tokens_per_image == 4 * pooled.tokens_per_image
    assert pooled.adapters < unshuffled.adapters < 4 * pooled.adapters


def test_errors_say_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match="'org/model'.*llm_config"):
        plan(small(llm="org/model", llm_config=None))
    with pytest.raises(ValueError, match="max_length 4"):
        plan(small(max_length=4))
    with pytest.raises(ValueError, match="8 records.* 3 devices"):
        plan(small(), devices=3)
    with pytest.raises(ValueError, match="gpt2"):
        plan(small(llm_config={"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}))
    LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"}).save_pretrained(tmp_path)
    assert plan(small(llm=str(tmp_path), llm_config=None)).llm == plan(small()).llm


def saved_bytes(model: nn.Module, run: object) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters and their views not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (pointer := tensor.untyped_storage().data_ptr()) not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # type: ignore[operator]
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def attention_stores_scores(heads: int) -> bool:
    """Whether torch's attention stores its matrix of scores on a CPU where so many heads of keys serve four heads of queries."""
    queries, keys = (torch.randn(1, count, 8, 16, requires_grad=True) for count in (4, heads))
    output = torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=heads < 4)
    return "Flash" not in output.grad_fn.name()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_saves_what_autograd_saves(heads: int, trainable: bool, dtype: torch.dtype):
    if attention_stores_scores(heads):
        pytest.skip("torch 2.7 stores attention scores on a CPU where queries share keys; the plan is for GPUs, which do not")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": heads}
    tokens, values = 256, {key: value for key, value in LLAMA.items() if key != "model_type"} | sizes
    measured = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**values | {"num_hidden_layers": layers}, attn_implementation="sdpa")).to(dtype)
        model.requires_grad_(trainable)
        embeds = torch.randn(1, tokens, 64, dtype=dtype, requires_grad=True)
        measured.append(saved_bytes(model, lambda model=model, embeds=embeds: model.model(inputs_embeds=embeds, use_cache=False)))
    per_token = (measured[1] - measured[0]) / 2 / tokens
    layer = Layer(hidden=64, queries=64, keys=16 * heads, mlp=48)
    assert layer.saved(trainable, dtype.itemsize) == pytest.approx(per_token, rel=0.1)


def test_a_layer_with_lora_saves_what_autograd_saves():
    pytest.importorskip("peft")
    values, tokens, rank = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"hidden_size": 64}, 256, 8
    measured = []
    for layers in (2, 4):
        model = LlamaForCausalLM(LlamaConfig(**values | {"num_hidden_layers": layers}, attn_implementation="sdpa"))
        adapted = add_lora(model.requires_grad_(False), rank)
        embeds = torch.randn(1, tokens, 64, requires_grad=True)
        measured.append(saved_bytes(adapted, lambda model=model, embeds=embeds: model.model(inputs_embeds=embeds, use_cache=False)))
    layer = Layer(hidden=64, queries=64, keys=32, mlp=48)
    assert layer.saved(True, 4, rank) == pytest.approx((measured[1] - measured[0]) / 2 / tokens, rel=0.1)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == 4 * rank * sum(map(sum, layer.matrices))


@pytest.mark.slow
def test_the_plan_for_a_gpu_of_24_gib():
    setting = read_setting(CONFIGS / "llava15_7b_qlora.yaml")
    qlora = plan(setting, devices=1)
    assert setting.finetune.lora == 128 and qlora.lora == qlora.trainable["finetune"] == 2 * 159_907_840  # published for rank 64
    for name, stage in setting.stages.items():
        assert stage.gradient_checkpointing and fits(qlora.memory(name, False, checkpointed=True), 24)
    whole = plan(dataclasses.replace(setting, finetune=dataclasses.replace(setting.finetune, load_in_4bit=False)), devices=1)
    saved = whole.memory("finetune", False, True)["weights"] - qlora.memory("finetune", False, True)["weights"]
    matrices = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096  # without embeddings, head and norms
    assert saved == pytest.approx((2 - (4 + 0.127) / 8) * matrices, rel=1e-3)  # 0.127: of the scales, in the paper
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_tables(qlora, 24))
    assert "24 GiB" in (text := console.export_text()) and "LoRA beside it" in text and "sharded" not in text.split("finetune")[-1]


@pytest.mark.parametrize(
    ("changes", "message"), [({"align": {"lora": 8}}, "lora is for finetune"), ({"finetune": {"load_in_4bit": True}}, "needs lora")]
)
def test_4_bits_where_nothing_could_train(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small(**{name: Stage(1e-3, 8, **options) for name, options in changes.items()})


def test_adapters_save_what_autograd_saves(tiny_encoders: dict):
    mixer = InterleavedMoF(tiny_encoders, 32)
    features = {name: torch.randn(1, mixer.positions, encoder.width) for name, encoder in tiny_encoders.items()}
    assert _adapter_bytes(mixer, 4) == saved_bytes(mixer, lambda: [mixer.adapters[name](x) for name, x in features.items()])


@pytest.fixture
def launch_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for key in list(os.environ):
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(key)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    return monkeypatch


def test_the_fsdp2_launch_config(launch_environment: pytest.MonkeyPatch):
    config = load_config_from_file(str(CONFIGS / "launch/fsdp2.yaml"))
    assert config.distributed_type == DistributedType.FSDP and (config.num_processes, config.mixed_precision) == (8, "bf16")
    known = {"fsdp_" + name for name in FullyShardedDataParallelPlugin.__dataclass_fields__}
    # The launcher's own names for three of the plugin's fields.
    assert set(config.fsdp_config) <= known | {"fsdp_version", "fsdp_transformer_layer_cls_to_wrap", "fsdp_offload_params"}
    for key, value in config.fsdp_config.items():
        launcher = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
        launch_environment.setenv(launcher.get(key.upper(), key.upper()), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and not plugin.cpu_ram_efficient_loading
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"] and not plugin.activation_checkpointing
    assert plugin.ignored_modules == r".*mixer\.encoders"


def test_the_ignored_modules_are_the_encoders(tiny_model: nn.Module):
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    pattern = load_config_from_file(str(CONFIGS / "launch/fsdp2.yaml")).fsdp_config["fsdp_ignored_modules"]
    for model in (tiny_model, Wrapped(tiny_model)):
        ignored = get_parameters_from_modules(pattern, model, torch.device("cpu"))
        assert ignored == set(tiny_model.mixer.encoders.parameters()) and not any(p.requires_grad for p in ignored)


class Wrapped(nn.Module):
    """Puts a prefix in front of the names, as PEFT and compilation do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def test_the_zero3_launch_config(launch_environment: pytest.MonkeyPatch):
    config = load_config_from_file(str(CONFIGS / "launch/deepspeed_zero3.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED and config.num_processes == 8
    file = CONFIGS.parents[1] / config.deepspeed_config["deepspeed_config_file"]
    launch_environment.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    launch_environment.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", str(config.deepspeed_config["zero3_init_flag"]).lower())
    units = config.deepspeed_config["deepspeed_moe_layer_cls_names"]
    assert units.split(",") == [OpenClipEncoder.__name__, TimmEncoder.__name__]
    launch_environment.setenv("ACCELERATE_CONFIG_DS_FIELDS", ",".join(config.deepspeed_config))
    # What accelerate refuses beside a DeepSpeed file: it must be said there.
    assert config.mixed_precision is None
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3 and plugin.hf_ds_config.is_zero3() and not plugin.zero3_init_flag
    assert plugin.offload_optimizer_device == plugin.offload_param_device == "none" and plugin.zero3_save_16bit_model


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero3"])
def test_the_commands_in_the_launch_configs_name_files_that_exist(name: str):
    path = CONFIGS / "launch" / f"{name}.yaml"
    words = path.read_text().split()
    assert words[words.index("--config_file") + 1] == f"recipes/configs/launch/{name}.yaml"
    assert (CONFIGS.parents[1] / words[words.index("--config") + 1]).is_file()


@pytest.mark.skipif(not (MINI_LM / "config.json").is_file(), reason="needs the miniature's weights")
def test_the_embedded_default_is_planned_too():
    small_plan = plan(read_setting(CONFIGS / "miniature.yaml"), devices=1)
    assert small_plan.width == 4 and fits(small_plan.memory("finetune", False, checkpointed=False))
