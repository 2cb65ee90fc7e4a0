"""Small runs as real trainers leave them (tests/trainers.py): what each must come to, loaded by the real loaders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ckavg
from ckavg.errors import MixedOrderError, UnsupportedFormatError
from tests import trainers
from tests.formats.test_read import MADE_HERE, files
from tests.formats.trained import mean
from tests.trainers import KOHYA, STEPS, UNET_LORA

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("without_pictures")]


def averaged(root: Path) -> Path:
    return ckavg.average(ckavg.open_run(root), ckavg.Mean()).directory


def assert_mean(out: Path, name: str, sources: list[Path]) -> dict[str, Tensor]:
    """The tensors of the result in float64, which are the means of those of the files."""
    found, stored = load_file(out / name), [load_file(each) for each in sources]
    want = {tensor: mean([each[tensor] for each in stored]) for tensor in stored[-1]}
    assert found.keys() == want.keys()
    for tensor, expected in want.items():
        torch.testing.assert_close(found[tensor].double(), expected.double(), rtol=1e-6, atol=1e-7)
    return want


def of_adapted_modules(places: list[str]) -> Any:
    """A model for diffusers' loader, with linear modules in these places; it applies one after the other."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.loaders import PeftAdapterMixin

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


def assert_adapts(load: Callable[[Any], object], updates: dict[str, Tensor]) -> None:
    """The model with the loaded adapter computes what one with the updates of its weights does."""
    model, given = of_adapted_modules([*updates]), torch.linspace(-1, 1, 48).view(3, 16)
    expected = given.double()
    for place, update in updates.items():
        expected = expected @ (model.get_submodule(place).weight.double() + update).T
    plain = model(given)
    load(model)
    torch.testing.assert_close(model(given).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert (plain - expected).abs().max() > 1e-3


def diffusers_lora(root: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    out = averaged(root)
    want = assert_mean(out, name, [root / f"checkpoint-{step}" / name for step in STEPS])
    scale = 32 / 4
    places = [each.removesuffix(".lora_A.weight") for each in UNET_LORA if "lora_A" in each]
    updates = {
        place.removeprefix("unet."): scale * want[f"{place}.lora_B.weight"] @ want[f"{place}.lora_A.weight"]
        for place in places
    }
    assert_adapts(lambda model: model.load_lora_adapter(out, prefix="unet", weight_name=name), updates)


def kohya_epochs(root: Path) -> None:
    from diffusers import StableDiffusionPipeline

    assert len(ckavg.open_run(root).steps) == 4
    out, name = averaged(root), "mylora.safetensors"
    want = assert_mean(out, name, [*(root / f"mylora-00000{epoch}.safetensors" for epoch in (1, 2, 3)), root / name])
    places = [each.removesuffix(".lora_down.weight") for each in KOHYA if "lora_down" in each]
    updates = {
        place.removeprefix("lora_unet_").replace("_", "."): (
            want[f"{place}.alpha"] / 4 * want[f"{place}.lora_up.weight"] @ want[f"{place}.lora_down.weight"]
        )
        for place in places
    }
    state, alphas = StableDiffusionPipeline.lora_state_dict(out, weight_name=name)
    assert_adapts(lambda model: model.load_lora_adapter(state, prefix="unet", network_alphas=alphas), updates)


def kohya_steps_and_epochs(root: Path) -> None:
    run = ckavg.open_run(root)
    assert run.steps == (100, 150, 200, 300)
    assert any("mylora.safetensors holds the same weights as mylora-000002" in each for each in run.warnings)


def two_runs_by_name(root: Path) -> None:
    with pytest.raises(MixedOrderError, match=r"styleA.*styleB") as met:
        ckavg.open_run(root)
    assert "--match 'styleA*'" in met.value.hint
    assert ckavg.open_run(root, match="styleA*").steps == (500, 1000)


def lerobot(root: Path) -> None:
    out = averaged(root)
    assert_mean(
        out, "pretrained_model/model.safetensors", [root / f"{s:06d}/pretrained_model/model.safetensors" for s in STEPS]
    )
    last = root / "000300/pretrained_model"
    assert files(out) - MADE_HERE == {f"pretrained_model/{name}" for name in files(last)}


def sentence_transformer_dense(root: Path) -> None:
    """The Bert of this run is a table of words alone, so its modules are loaded one by one; a whole model of this
    layout is a row of docs/formats.md.
    """
    from sentence_transformers.models import Dense, Pooling

    out = averaged(root)
    own = files(root / "checkpoint-300") - {"trainer_state.json"}
    assert files(out) - MADE_HERE == own
    checkpoints = [root / f"checkpoint-{step}" for step in STEPS]
    words = assert_mean(out, "model.safetensors", [each / "model.safetensors" for each in checkpoints])
    dense = assert_mean(out, "2_Dense/model.safetensors", [each / "2_Dense/model.safetensors" for each in checkpoints])
    ids, table = torch.tensor([[3, 5, 7]]), "embeddings.word_embeddings.weight"
    features = {
        "token_embeddings": load_file(out / "model.safetensors")[table][ids],
        "attention_mask": torch.ones_like(ids),
    }
    found = Dense.load(str(out), subfolder="2_Dense")(Pooling.load(str(out), subfolder="1_Pooling")(features))
    expected = torch.tanh(words[table][ids].mean(1) @ dense["linear.weight"].T + dense["linear.bias"])
    torch.testing.assert_close(found["sentence_embedding"].detach().double(), expected, rtol=1e-5, atol=1e-6)


def zero3_empty(root: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"embed\.weight") as met:
        ckavg.open_run(root)
    assert "zero_to_fp32.py" in met.value.hint


def batch_norm(root: Path) -> None:
    run = ckavg.open_run(root)
    stored = [load_file(each.path / "model.safetensors") for each in run.checkpoints]
    for scheme in (ckavg.BEMA(), ckavg.OUEMA(), ckavg.DEMA()):
        result = ckavg.average(run, scheme)
        found = load_file(result.directory / "model.safetensors")
        for name in ("bn.running_mean", "bn.running_var"):
            of_all = torch.stack([each[name] for each in stored])
            assert (of_all.amin(0) <= found[name]).all()
            assert (found[name] <= of_all.amax(0)).all()
        assert "bn.running_var" in json.loads((result.directory / "ckavg.json").read_text())["uncorrected"]
        assert any("bn.running_var" in each for each in result.warnings)


def tied_head(root: Path) -> None:
    assert any("'lm_head.weight'" in each and "tied" in each for each in ckavg.open_run(root).warnings)
    assert load_file(averaged(root) / "model.safetensors").keys() == {"model.embed_tokens.weight", "model.norm.weight"}


def constant_complex(root: Path) -> None:
    found = load_file(averaged(root) / "model.safetensors")["freqs_cis"]
    assert torch.equal(found, load_file(root / "checkpoint-100/model.safetensors")["freqs_cis"])


def accelerate_without_config(root: Path) -> None:
    assert {"config.json", "tokenizer_config.json"} <= files(averaged(root))


CASES = (
    diffusers_lora, kohya_epochs, kohya_steps_and_epochs, two_runs_by_name, lerobot, sentence_transformer_dense,
    zero3_empty, batch_norm, tied_head, constant_complex, accelerate_without_config,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_case(tmp_path: Path, case: Callable[[Path], None]) -> None:
    getattr(trainers, case.__name__)(tmp_path)
    case(tmp_path)
