"""The average of a LoRA run is an adapter that peft loads onto the base model. Runs only where peft is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ckavg

peft = pytest.importorskip("peft")

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = (0, 10, 20, 30)


@pytest.fixture(scope="module")
def run(train: Callable[..., Path]) -> Path:
    """Checkpoint 0 is the fresh adapter: every LoRA B is zero there."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return train(steps=STEPS[-1], save_steps=10, adapt=lambda model: peft.get_peft_model(model, lora))


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "adapter_model.safetensors")
    return tensors


def test_peft_loads_the_average(run: Path, tmp_path: Path, warned: list[str]) -> None:
    result = ckavg.average(ckavg.open_run(run), ckavg.BEMA(eta=0.4), out=tmp_path / "out")
    assert result.steps == STEPS
    checkpoints = [adapter(run / f"checkpoint-{step}") for step in STEPS]
    mine = adapter(tmp_path / "out")
    assert mine.keys() == checkpoints[-1].keys()
    for name, tensor in mine.items():
        expected = sum(
            (weight * values[name].double() for weight, values in zip(result.weights, checkpoints, strict=True)),
            torch.zeros(tensor.shape, dtype=torch.float64),
        )
        # Three updates in float32 on values of size 1 or less.
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(tensor, checkpoints[-1][name])

    base: Any = AutoModelForCausalLM.from_pretrained(run.with_name("base"))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    held = peft.get_peft_model_state_dict(model)
    assert held.keys() == mine.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in mine.items())
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert warned == []
