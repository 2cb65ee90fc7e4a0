"""Models and adapters for images, by diffusers' own savers and under the names of the trainers that have their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import trainers
from tests.formats.laid_out import of_files
from tests.formats.trained import Build, Trained, drift, mean
from tests.trainers import STEPS, note

BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}


def unet() -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(sample_size=8, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **BLOCKS)


def controlnet() -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.ControlNetModel(conditioning_embedding_out_channels=(8,), **BLOCKS)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def denoised(model: Any) -> Tensor:
    given = noise(1, 4, 8, 8).to(model.dtype), torch.tensor([3]), noise(1, 5, 8).to(model.dtype)
    found: Tensor = model.eval()(*given).sample
    return found


def controlled(model: Any) -> Tensor:
    given = noise(1, 4, 8, 8).to(model.dtype), torch.tensor([3]), noise(1, 5, 8).to(model.dtype)
    found: Tensor = model.eval()(*given, controlnet_cond=noise(1, 3, 8, 8).to(model.dtype)).mid_block_res_sample
    return found


def state_of_accelerate(here: Path) -> None:
    """What `Accelerator.save_state` leaves beside the models that a hook of the example scripts saves."""
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt"):
        torch.save({"state": {}}, here / name)


def example_script(make: Callable[[], Any], folder: str, outputs: Callable[[Any], Tensor]) -> Build:
    def build(root: Path) -> Trained:
        trained = Trained(outputs=outputs, model=make())
        for step in STEPS:
            drift(trained.model, step)
            here = root / f"checkpoint-{step}"
            trained.model.save_pretrained(here / folder)
            if folder == "unet":
                average = copy.deepcopy(trained.model)
                average.save_pretrained(here / "unet_ema")
            state_of_accelerate(here)
            trained.keep(here)
        return trained

    return build


def variant(root: Path) -> Trained:
    """Weights under the name of their dtype, in shards."""
    trained = Trained(outputs=denoised, model=unet())
    for step in STEPS:
        drift(trained.model, step)
        here = root / f"checkpoint-{step}"
        trained.model.save_pretrained(here / "unet", variant="fp16", max_shard_size="20KB")
        trained.keep(here)
    return trained


def pipeline(root: Path) -> Trained:
    import diffusers
    import transformers

    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
        max_position_embeddings=8,
    )
    root.mkdir(parents=True, exist_ok=True)
    note(
        root.parent / "vocab.json",
        {word: place for place, word in enumerate(("<|startoftext|>", "<|endoftext|>", "a"))},
    )
    note(root.parent / "merges.txt", "#version: 0.2\n")
    trained = Trained(outputs=denoised, model=unet())
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(str(root.parent / "vocab.json"), str(root.parent / "merges.txt")),
        unet=trained.model,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    trained.outputs = lambda each: denoised(getattr(each, "unet", each))
    for step in STEPS:
        drift(trained.model, step)
        here = root / f"checkpoint-{step}"
        made.save_pretrained(here)
        trained.keep(here)
    return trained


def lora(alpha: int) -> Any:
    import peft

    return peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v"])


def merged(model: Any, factors: dict[str, Tensor], scale: float) -> Any:
    """The model with low-rank updates added to its weights, in float64."""
    model = copy.deepcopy(model).double()
    downs = [name for name in factors if ".lora_A." in name]
    assert downs
    with torch.no_grad():
        for name in downs:
            up = factors[name.replace(".lora_A.", ".lora_B.")].double()
            module = model.get_submodule(name.removesuffix(".lora_A.weight").removeprefix("unet."))
            module.weight += scale * up @ factors[name].double()
    return model


def diffusers_lora(root: Path) -> Trained:
    """DreamBooth's and the text-to-image example's own saver, with an alpha that the header alone tells."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    plain, model = unet(), unet()
    model.add_adapter(lora(alpha=32))
    trained = Trained()
    states: list[dict[str, Tensor]] = []
    for step in STEPS:
        drift(model, step)
        here = root / f"checkpoint-{step}"
        state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}
        diffusers.StableDiffusionPipeline.save_lora_weights(
            here, unet_lora_layers=state, **_collate_lora_metadata({"unet": model})
        )
        state_of_accelerate(here)
        states.append(state)
        trained.checkpoints.append(here)

    def also(out: Path) -> None:
        loaded = unet()
        loaded.load_lora_adapter(out, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        average = {name: mean([each[name] for each in states]) for name in states[0]}
        with torch.no_grad():
            expected = denoised(merged(plain, average, 32 / 4))
            torch.testing.assert_close(denoised(loaded).double(), expected, rtol=1e-4, atol=1e-5)

    trained.also = also
    return trained


def of_linear_modules(places: list[str]) -> Any:
    """A model for diffusers' loader, with linear modules in these places; it applies one after the other."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.loaders import PeftAdapterMixin
    from torch import nn

    class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(self) -> None:
            super().__init__()
            for place in places:
                above: nn.Module = self
                *folders, name = place.split(".")
                for folder in folders:
                    if folder not in above._modules:
                        above.add_module(folder, nn.Module())
                    above = above.get_submodule(folder)
                above.add_module(name, nn.Linear(16, 16, bias=False))

        def forward(self, given: Tensor) -> Tensor:
            for place in places:
                given = self.get_submodule(place)(given)
            return given

    torch.manual_seed(0)
    return Model()


def kohya_epochs(root: Path) -> Trained:
    """By epoch, with alphas that the loader of diffusers takes into account."""
    from diffusers import StableDiffusionPipeline

    name = "mylora.safetensors"
    trained = of_files(trainers.kohya_epochs, "mylora-000001", "mylora-000002", "mylora-000003", "mylora")(root)

    def also(out: Path) -> None:
        stored = [load_file(each) for each in trained.checkpoints]
        average = {tensor: mean([each[tensor] for each in stored]) for tensor in stored[0]}
        places = [each.removesuffix(".lora_down.weight") for each in average if "lora_down" in each]
        modules = [each.removeprefix("lora_unet_").replace("_", ".") for each in places]
        model = of_linear_modules(modules)
        given = torch.linspace(-1, 1, 48).view(3, 16)
        expected, plain = given.double(), model(given)
        for place, module in zip(places, modules, strict=True):
            update = average[f"{place}.lora_up.weight"] @ average[f"{place}.lora_down.weight"]
            scaled = average[f"{place}.alpha"] / 4 * update
            expected = expected @ (model.get_submodule(module).weight.double() + scaled).T
        state, alphas = StableDiffusionPipeline.lora_state_dict(out, weight_name=name)
        model.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
        torch.testing.assert_close(model(given).double(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert (plain - expected).abs().max() > 1e-3

    trained.also = also
    return trained


BUILDERS: dict[str, Build] = {
    "diffusers, text-to-image": example_script(unet, "unet", denoised),
    "diffusers, ControlNet": example_script(controlnet, "controlnet", controlled),
    "diffusers, a variant in shards": variant,
    "diffusers, whole pipelines": pipeline,
    "diffusers, LoRA": diffusers_lora,
    "sd-scripts, musubi-tuner, by epoch": kohya_epochs,
}
