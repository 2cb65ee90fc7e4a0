"""Models of transformers and adapters of PEFT whose files say more, or other things, than the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.formats.of_language import adapted, in_shards, saved
from tests.formats.trained import IDS, TINY, Build, Trained, drift, logits, tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def noise(model: Any, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def of(name: str, config: str, **sizes: object) -> Callable[[Path], Any]:
    """A class of transformers with this config."""

    def make(root: Path) -> Any:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**sizes))

    return make


def with_tokenizer(model: Any, here: Path) -> None:
    model.save_pretrained(here)
    tokenizer().save_pretrained(here)


def with_processor(name: str, **settings: object) -> Callable[[Any, Path], None]:
    def save(model: Any, here: Path) -> None:
        import transformers

        model.save_pretrained(here)
        getattr(transformers, name)(**settings).save_pretrained(here)

    return save


def routed(model: Any) -> Tensor:
    model.set_experts_implementation("eager")  # the others know no float64
    return logits(model)


def translated(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
    return found


def heard(model: Any) -> Tensor:
    found: Tensor = model.eval()(noise(model, 1, 8, 20), decoder_input_ids=IDS[:, :3]).logits
    return found


def seen(model: Any) -> Tensor:
    found: Tensor = model.eval()(noise(model, 1, 3, 8, 8)).logits
    return found


def compared(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS, pixel_values=noise(model, 1, 3, 8, 8)).logits_per_image
    return found


def looked_at(model: Any) -> Tensor:
    ids = torch.cat([torch.full((1, 4), 23), IDS], 1)  # the 4 patches of an image, then words
    found: Tensor = model.eval()(input_ids=ids, pixel_values=noise(model, 1, 3, 8, 8)).logits
    return found


def llava(root: Path) -> Any:
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SMALL | {"num_hidden_layers": 2}, image_size=8, patch_size=4)
    text = transformers.LlamaConfig(**TINY)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=23, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-ones-own"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(4, 4)
        self.post_init()

    def forward(self, given):
        return self.layer(given)
"""


def of_ones_own(root: Path) -> Trained:
    """A model whose code lies beside its weights."""
    import json

    here: dict[str, Any] = {"__name__": "modeling_tiny"}
    exec(CODE, here)
    torch.manual_seed(0)
    trained = Trained(
        model=here["TinyModel"](here["TinyConfig"]()),
        outputs=lambda model: model.eval()(noise(model, 2, 4)),
    )
    for step in (1, 2, 3):
        drift(trained.model, step, by=0.3)
        place = root / f"checkpoint-{step}"
        trained.model.save_pretrained(place)
        (place / "modeling_tiny.py").write_text(CODE)
        config = json.loads((place / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
        (place / "config.json").write_text(json.dumps(config))
        trained.keep(place)
    return trained


def peft_of(name: str, **settings: Any) -> Build:
    """An adapter of this kind, on a model for tokens."""

    def make(root: Path) -> Any:
        import peft

        return adapted(lambda: getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **settings))(root)

    build: Build = saved(make, lambda model, here: model.save_pretrained(here), by=1.0)
    return build


def two_adapters(root: Path) -> Any:
    import peft

    model = adapted(lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))(root)
    model.add_adapter("reference", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
CLIP = {"text_config": SMALL | {"vocab_size": 24}, "vision_config": SMALL | {"image_size": 8, "patch_size": 4}}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
BERT = SMALL | {"vocab_size": 24, "pad_token_id": 0}
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 10, "vocab_size": 24,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip

BUILDERS: dict[str, Build] = {
    "a variant by its dtype": saved(
        of("LlamaForCausalLM", "LlamaConfig", **TINY), lambda model, here: model.save_pretrained(here, variant="bf16")
    ),
    "T5, tied embeddings": saved(of("T5ForConditionalGeneration", "T5Config", **T5), with_tokenizer, translated),
    "BERT, tied decoder": saved(of("BertForMaskedLM", "BertConfig", **BERT), with_tokenizer),
    "GPT-2": saved(of("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=1, n_head=2, vocab_size=24), with_tokenizer),
    "mixture of experts, in shards": saved(
        of(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **TINY,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            head_dim=8,
        ),
        in_shards,
        routed,
    ),
    "Whisper": saved(
        of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        with_processor("WhisperFeatureExtractor", feature_size=8),
        heard,
    ),
    "ViT": saved(
        of("ViTForImageClassification", "ViTConfig", **SMALL, image_size=8, patch_size=4, num_labels=3),
        with_processor("ViTImageProcessorPil", size={"height": 8, "width": 8}),
        seen,
    ),
    "CLIP": saved(of("CLIPModel", "CLIPConfig", **CLIP), with_tokenizer, compared),
    "LLaVA": saved(llava, with_tokenizer, looked_at),
    "a model with code of its own": of_ones_own,
    "PEFT, DoRA": peft_of("Lora", r=2, use_dora=True, **TARGETS),
    "PEFT, IA³": peft_of("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "PEFT, VeRA": peft_of("Vera", r=2, target_modules=["q_proj"]),
    "PEFT, LoHa": peft_of("LoHa", r=2, **TARGETS),
    "PEFT, OFT": peft_of("OFT", oft_block_size=4, **TARGETS),
    "PEFT, prefix tuning": peft_of("PrefixTuning", num_virtual_tokens=3),
    "PEFT, tokens that are trained": peft_of("Lora", r=2, trainable_token_indices=[3, 4], **TARGETS),
    "PEFT, two adapters": saved(two_adapters, lambda model, here: model.save_pretrained(here)),
}
