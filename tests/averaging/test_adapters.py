"""Averages of low-rank adapters by their products, against PEFT's own merging and whole matrices in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ckavg
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages
from ckavg.engine.context import Context
from ckavg.errors import CkavgError, MismatchError, NonFiniteError, SettingError, UnsupportedFormatError
from tests.cli.runner import run_cli
from tests.reference import Array, path_length

STEPS = (10, 20, 30, 40)
PEFT: Mapping[str, dict[str, Any]] = {
    "one rank": {"r": 2, "lora_alpha": 3, "modules_to_save": ["head"], "bias": "lora_only"},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"wide": 3}, "alpha_pattern": {"deep.wide": 7, "conv": 1}},
    "rsLoRA": {"r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"^wide": 3}, "lora_bias": False},
}
WIDE = {"one rank": (8, 8), "patterns": (12, 12), "rsLoRA": (12, 8)}
"""Ranks of the two layers of one name in exact averages of four checkpoints."""

SCHEMES = (ckavg.Mean(), ckavg.BEMA(eta=0.05, lag=1), ckavg.DEMA())


class Net(nn.Module):
    """Every kind of layer that PEFT adapts with two factors; one name is a suffix of another."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(11, 12)
        self.wide = nn.Linear(12, 16)
        self.deep = nn.ModuleDict({"wide": nn.Linear(12, 16)})
        self.transposed = Conv1D(9, 16)
        self.conv = nn.Conv2d(2, 6, (3, 2))
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def write_peft(root: Path, **config: Any) -> Path:
    """A run as PEFT saves it, every factor of it random."""
    import peft

    targets = ["embedding", "wide", "transposed", "conv"]
    for step in STEPS:
        torch.manual_seed(0)
        model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=targets, **config))
        torch.manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        model.save_pretrained(root / f"checkpoint-{step}")
    return root


def merged(adapter: Path) -> dict[str, Array]:
    """The difference between the model with the adapter merged by PEFT and the model without it."""
    import peft

    torch.manual_seed(0)
    base = Net()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return {name: (model[name].double() - before[name].double()).numpy() for name in before}


def assert_close(got: Mapping[str, Array], want: Mapping[str, Array], relative: float = 2e-6) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        apart = float(np.linalg.norm(got[name] - expected))
        assert apart <= relative * (1 + float(np.linalg.norm(expected))), f"{name}: {apart:.2g}"


def weighted(models: list[dict[str, Array]], weights: tuple[float, ...]) -> dict[str, Array]:
    pairs = list(zip(weights, models, strict=True))
    return {name: np.asarray(sum(weight * model[name] for weight, model in pairs)) for name in models[0]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", PEFT)
def test_merging_the_average_is_averaging_the_merged(tmp_path: Path, kind: str) -> None:
    import peft

    source = write_peft(tmp_path / "run", **PEFT[kind])
    models = [merged(source / f"checkpoint-{step}") for step in STEPS]
    run = ckavg.open_run(source)
    plans = plan_averages([(run, each, tmp_path / each.name) for each in SCHEMES], Options(lora="product"))
    for record in carry_out(plans, Context()).records:
        assert_close(merged(record.directory), weighted(models, record.weights))
        model = peft.PeftModel.from_pretrained(Net(), record.directory)
        assert model.peft_config["default"].r == 4 * 2
        ranks = sorted(module.r["default"] for module in model.modules() if hasattr(module, "r"))
        assert ranks == sorted([8, 8, 8, *WIDE[kind]])
        assert record.output.discarded_energy is None
        assert any(weight < 0 for weight in record.weights) == (record.scheme == "bema")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "rank"), [("one rank", 2), ("patterns", 3), ("rsLoRA", 5)])
def test_a_cut_product_is_the_best_of_its_rank(tmp_path: Path, kind: str, rank: int) -> None:
    source = write_peft(tmp_path / "run", **PEFT[kind])
    record = ckavg.average(ckavg.open_run(source), SCHEMES[1], lora="product", rank=rank)
    want = weighted([merged(source / f"checkpoint-{step}") for step in STEPS], record.weights)
    got, total, lost = merged(record.directory), 0.0, 0.0
    for name in ("embedding.weight", "wide.weight", "deep.wide.weight", "transposed.weight", "conv.weight"):
        u, values, v = np.linalg.svd(want[name].reshape(len(want[name]), -1), full_matrices=False)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert_close({name: got[name].reshape(best.shape)}, {name: best})
        total, lost = total + float((values**2).sum()), lost + float((values[rank:] ** 2).sum())
    assert record.output.discarded_energy == pytest.approx(lost / total, rel=1e-5)
    assert 0.001 < lost / total < 1
    config = json.loads((record.directory / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (rank, {})


# --- files of sd-scripts and diffusers ---


def write_files(root: Path, tensors: Mapping[int, Mapping[str, Tensor]], metadata: dict[str, str], file: str) -> Path:
    for step, each in tensors.items():
        path = root / file.format(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(each), path, metadata)
    return root


def kohya(step: int, alpha: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"lora_unet_q.lora_down": (2, 8), "lora_unet_q.lora_up": (6, 2), "lora_te_c.lora_down": (3, 2, 3, 3)}
    shapes |= {"lora_te_c.lora_up": (5, 3, 1, 1)}
    tensors = {f"{name}.weight": torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"lora_unet_q.alpha": alpha, "bias.diff_b": torch.full((3,), float(step), dtype=dtype)}


def product(tensors: Mapping[str, Tensor], module: str) -> Array:
    """s·BA as in sd-scripts: s is α divided by the rank, or 1 without α."""
    down, up = (tensors[f"{module}.lora_{half}.weight"].double().flatten(1).numpy() for half in ("down", "up"))
    alpha = tensors.get(f"{module}.alpha")
    scaling = 1.0 if alpha is None else float(alpha) / len(down)
    return np.asarray(scaling * up @ down)


@pytest.mark.parametrize(
    ("alpha", "dtype", "relative"),
    [
        (torch.tensor(3.0), torch.float32, 2e-6),
        (torch.tensor(3), torch.float32, 2e-6),
        (torch.tensor(0.3, dtype=torch.float16), torch.float16, 2e-3),
    ],
)
@pytest.mark.parametrize("rank", [None, 4])
def test_alpha_of_sd_scripts(
    tmp_path: Path, alpha: Tensor, dtype: torch.dtype, relative: float, rank: int | None
) -> None:
    tensors = {step: kohya(step, alpha, dtype) for step in STEPS}
    header = {"ss_network_dim": "2", "ss_network_alpha": "3.0"}
    source = write_files(tmp_path, tensors, header, "mylora-step000000{}.safetensors")
    record = ckavg.average(ckavg.open_run(source), ckavg.Mean(), lora="product", rank=rank)
    got = load_file(record.directory / "mylora.safetensors")
    ranks = {"lora_unet_q": rank or 8, "lora_te_c": rank or 12}
    for module, stated in ranks.items():
        assert got[f"{module}.lora_down.weight"].shape == (stated, *tensors[10][f"{module}.lora_down.weight"].shape[1:])
        want = np.mean([product(each, module) for each in tensors.values()], axis=0)
        if rank is not None:
            u, values, v = np.linalg.svd(want, full_matrices=False)
            want = (u[:, :rank] * values[:rank]) @ v[:rank]
        assert_close({"": product(got, module)}, {"": want}, relative)
    assert float(got["lora_unet_q.alpha"]) == pytest.approx(float(alpha) / 2 * ranks["lora_unet_q"], rel=1e-6)
    assert torch.equal(got["bias.diff_b"], torch.full((3,), 25.0, dtype=dtype))
    with safe_open(record.directory / "mylora.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == (
            str(ranks["lora_unet_q"]),
            str(1.5 * ranks["lora_unet_q"]),
        )
    assert ckavg.verify_result(record.directory, replay=True, sources=True).problems == ()


def test_configs_in_headers_of_diffusers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"unet.q.lora_A": (2, 8), "unet.q.lora_B": (6, 2), "text_encoder.k.lora_A": (3, 4)}
    shapes |= {"text_encoder.k.lora_B": (5, 3)}
    tensors = {
        step: {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
        for step in STEPS
    }
    config = {"unet.r": 2, "unet.lora_alpha": 5, "text_encoder.r": 2, "text_encoder.rank_pattern": {"k": 3}}
    config |= {"text_encoder.lora_alpha": 1, "text_encoder.use_rslora": True}
    header = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    source = write_files(tmp_path, tensors, header, "checkpoint-{}/pytorch_lora_weights.safetensors")
    record = ckavg.average(ckavg.open_run(source), ckavg.Mean(), lora="product")
    with safe_open(record.directory / "pytorch_lora_weights.safetensors", "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    assert stated["unet.lora_alpha"] / stated["unet.r"] == 5 / 2
    assert (stated["unet.r"], stated["text_encoder.r"], stated["text_encoder.rank_pattern"]) == (8, 12, {})
    assert stated["text_encoder.lora_alpha"] / 12**0.5 == pytest.approx(1 / 3**0.5, rel=1e-15)
    got = load_file(record.directory / "pytorch_lora_weights.safetensors")
    for module in ("unet.q", "text_encoder.k"):
        products = [
            (each[f"{module}.lora_B.weight"].double() @ each[f"{module}.lora_A.weight"].double()).numpy()
            for each in (*tensors.values(), got)
        ]
        assert_close({"": products[-1]}, {"": np.mean(products[:-1], axis=0)})


# --- weights, snapshots, sweeps ---

FILE = "adapter_model.safetensors"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": True}
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def write_adapters(root: Path, config: Mapping[str, Any] = CONFIG, more: Mapping[str, Tensor] | None = None) -> Path:
    """A run of one pair of factors, or with more tensors in it."""
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        tensors = {A: torch.randn(2, 8, generator=generator), B: torch.randn(6, 2, generator=generator)}
        write_files(root, {step: tensors | dict(more or {})}, {"format": "pt"}, f"checkpoint-{{}}/{FILE}")
        (root / f"checkpoint-{step}" / "adapter_config.json").write_text(json.dumps(config))
    return root


def factors(directory: Path) -> tuple[Array, Array]:
    found = load_file(directory / FILE)
    return found[A].double().numpy(), found[B].double().numpy()


def test_weights_of_zero_take_no_columns(tmp_path: Path) -> None:
    run = ckavg.open_run(write_adapters(tmp_path))
    last = ckavg.average(run, ckavg.Last(), lora="product")
    assert load_file(last.directory / FILE)[A].equal(load_file(tmp_path / "checkpoint-40" / FILE)[A])
    record = ckavg.average(run, ckavg.PEMA(pairing="next"), lora="product")
    assert record.weights[0] == 0
    assert len(factors(record.directory)[0]) == 3 * 2
    assert json.loads((record.directory / "adapter_config.json").read_text())["r"] == 3 * 2


def test_the_weights_of_a_pair_are_those_of_its_a(tmp_path: Path) -> None:
    source = write_adapters(tmp_path)
    record = ckavg.average(ckavg.open_run(source), ckavg.PEMA(scope="tensor"), lora="product")
    pairs = [factors(source / f"checkpoint-{step}") for step in STEPS]
    whole, _, _ = path_length([{"a": a, "b": b} for a, b in pairs])
    own, _, _ = path_length([{"a": a} for a, _ in pairs])
    want = pairs[0][1] @ pairs[0][0]
    for (a, b), length in zip(pairs[1:], own[1:], strict=True):
        beta = (1 + 30 * whole[-1] ** 2 * length / own[-1]) ** -0.15
        want = (1 - beta) * want + beta * b @ a
    a, b = factors(record.directory)
    assert_close({"": b @ a}, {"": want})
    assert ckavg.verify_result(record.directory, replay=True).problems == ()


@pytest.mark.parametrize("rank", [None, 3])
def test_snapshots_and_sweeps(tmp_path: Path, rank: int | None) -> None:
    source = write_adapters(tmp_path / "run")
    run, options = ckavg.open_run(source), Options(lora="product", rank=rank, snapshot_every=10)
    schemes = (ckavg.Mean(), ckavg.EMA())
    records = carry_out(
        plan_averages([(run, each, tmp_path / each.name) for each in schemes], options), Context()
    ).records
    alone = ckavg.average(run, ckavg.EMA(), out=tmp_path / "alone", lora="product", rank=rank, snapshot_every=10)
    assert [each.sha256[FILE] for each in alone.outputs] == [each.sha256[FILE] for each in records[1].outputs]
    pairs = [factors(source / f"checkpoint-{step}") for step in STEPS]
    for output, count in zip(records[0].outputs, (2, 3, 4), strict=True):
        a, b = factors(output.directory)
        config = json.loads((output.directory / "adapter_config.json").read_text())
        assert config["r"] == len(a) == (rank or 2 * count)
        assert config["lora_alpha"] == 2 * config["r"]
        u, values, v = np.linalg.svd(np.mean([b @ a for a, b in pairs[:count]], axis=0))
        best = (u[:, : len(a)] * values[: len(a)]) @ v[: len(values)][: len(a)]
        assert_close({"": b @ a}, {"": best})
        lost = float((values[len(a) :] ** 2).sum() / (values**2).sum())
        assert output.discarded_energy == (None if rank is None else pytest.approx(lost, rel=1e-5))
    assert ckavg.verify_result(records[0].directory, replay=True, sources=True).problems == ()


def test_a_product_that_is_wrong_is_found(tmp_path: Path) -> None:
    record = ckavg.average(ckavg.open_run(write_adapters(tmp_path)), ckavg.Mean(), lora="product", rank=2)
    file = record.directory / FILE
    tensors = load_file(file)
    tensors[B][0, 0] *= 1.01
    save_file(tensors, file, {"format": "pt"})
    found = ckavg.verify_result(record.directory, replay=True).problems
    assert any("1 of 1 products BA are not the averages of the sources: q is" in each for each in found)
    config = record.directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    assert any("q is" in each for each in ckavg.verify_result(record.directory, replay=True).problems)


def test_the_command_line(tmp_path: Path) -> None:
    source = write_adapters(tmp_path)
    result = run_cli("mean", source, "--lora", "product", "--rank", "2")
    assert result.exit_code == 0, result.output
    record = json.loads((source / "averaged/mean-product-rank2/ckavg.json").read_text())
    lost = f"{100 * record['outputs'][0]['discarded_energy']:.2g} %"
    assert f"adapters products s·BA averaged and cut to rank 2, {lost} of their energy discarded" in result.stdout
    card = (source / "averaged/mean-product-rank2/README.md").read_text()
    assert f"averaged and cut to rank 2, {lost} of their energy discarded" in card
    assert "ckavg mean --lora product --rank 2" in card
    assert "each by itself" not in result.stderr
    assert run_cli("verify", source / "averaged/mean-product-rank2", "--replay").exit_code == 0


def test_selections_of_a_sweep_are_those_of_their_own_commands(tmp_path: Path) -> None:
    source = write_adapters(tmp_path)
    assert run_cli("sweep", source, "mean:last=2,3", "ema:from-step=20", "--lora", "product").exit_code == 0
    for words in (("mean", "--last", "3"), ("mean", "--last", "2"), ("ema", "--from-step", "20")):
        assert (
            run_cli(words[0], source, *words[1:], "--lora", "product", "--out", tmp_path / "alone", "--force").exit_code
            == 0
        )
        label = {"mean": f"mean-last{words[2]}-product", "ema": "ema-gamma0.15-from-step20-product"}[words[0]]
        alone, swept = tmp_path / "alone" / FILE, source / "averaged" / label / FILE
        assert alone.read_bytes() == swept.read_bytes()
        assert ckavg.verify_result(swept.parent, replay=True, sources=True).problems == ()


# --- what is refused ---


def refused(run: Path, **options: Any) -> CkavgError:
    with pytest.raises(CkavgError) as found:
        ckavg.average(ckavg.open_run(run), ckavg.Mean(), **({"lora": "product"} | options))
    assert found.value.hint
    assert not (run / "averaged").exists()
    return found.value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"use_dora": True}, "its config states use_dora, which is not a product of two factors"),
        (CONFIG | {"peft_type": "ADALORA"}, "its config states ADALORA"),
        (CONFIG | {"r": 4}, "the factors of q have rank 2; its config has r 4 and lora_alpha 4"),
        (
            CONFIG | {"init_lora_weights": "pissa"},
            "initialized with pissa: PEFT then removes a part of rank 2 from the",
        ),
        (CONFIG | {"alpha_pattern": {"(q+)+k": 1}}, "its config repeats a group in the pattern '(q+)+k'"),
        ({}, "has no adapter_config.json beside it"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert message in refused(write_adapters(tmp_path, config)).message


def test_a_base_without_a_part_of_its_own_keeps_the_rank(tmp_path: Path) -> None:
    source = write_adapters(tmp_path, CONFIG | {"init_lora_weights": "pissa"})
    record = ckavg.average(ckavg.open_run(source), ckavg.Mean(), lora="product", rank=2)
    assert len(factors(record.directory)[0]) == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.q.lora_magnitude_vector.weight", (6,)),
        ("base_model.model.k.hada_w1_a", (6, 2)),
        ("base_model.model.k.lokr_w1", (6, 2)),
        ("base_model.model.vera_lambda_b", (6,)),
        ("base_model.model.k.lora_mid.weight", (2, 2, 3, 3)),
        ("base_model.model.k.lora_E", (2, 1)),
    ],
)
def test_other_products_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    found = refused(write_adapters(tmp_path, more={name: torch.ones(shape)}))
    assert isinstance(found, UnsupportedFormatError)
    assert f"because of tensor {name!r} it is not a product of two factors" in found.message


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    alone = write_adapters(tmp_path / "alone", more={"base_model.model.k.lora_A.weight": torch.ones(2, 8)})
    assert "'base_model.model.k.lora_A.weight' has no partner" in refused(alone).message
    grouped = {
        "base_model.model.k.lora_A.weight": torch.ones(2, 8),
        "base_model.model.k.lora_B.weight": torch.ones(6, 1),
    }
    assert "are (2, 8) and (6, 1)" in refused(write_adapters(tmp_path / "grouped", more=grouped)).message


def test_scalings_that_differ_are_refused(tmp_path: Path) -> None:
    tensors = {step: kohya(step, torch.tensor(3.0 if step > 10 else 2.0)) for step in STEPS}
    source = write_files(tmp_path / "files", tensors, {}, "mylora-step000000{}.safetensors")
    found = refused(source)
    assert isinstance(found, MismatchError)
    assert found.message == "lora_unet_q: the product BA is scaled by 1.0 at step 10, but by 1.5 at step 40."
    peft = write_adapters(tmp_path / "peft")
    (peft / "checkpoint-10/adapter_config.json").write_text(
        json.dumps({key: value for key, value in CONFIG.items() if key != "lora_alpha"} | {"alpha_pattern": {"q": 6}})
    )
    assert "q: the product BA is scaled by 3.0 at step 10, but by 2.0 at step 40." in refused(peft).message


def test_runs_without_an_adapter_are_refused(tmp_path: Path) -> None:
    source = write_files(
        tmp_path, {step: {"w": torch.ones(3)} for step in STEPS}, {}, "checkpoint-{}/model.safetensors"
    )
    for lora in ("factors", "product"):
        found = refused(source, lora=lora)
        assert isinstance(found, UnsupportedFormatError)
        assert "holds no low-rank adapter" in found.message
        assert run_cli("mean", source, "--lora", lora).exit_code == 1


def test_ranks_that_cut_nothing_are_refused(tmp_path: Path) -> None:
    source = write_adapters(tmp_path)
    for options in ({"lora": None, "rank": 4}, {"lora": "factors", "rank": 4}, {"rank": 0}):
        assert isinstance(refused(source, **options), SettingError)


def test_nan_is_refused(tmp_path: Path) -> None:
    source = write_adapters(tmp_path)
    tensors = load_file(source / "checkpoint-20" / FILE)
    tensors[B][3, 1] = float("nan")
    save_file(tensors, source / "checkpoint-20" / FILE)
    found = refused(source, allow_nonfinite=True)
    assert isinstance(found, NonFiniteError)
    assert found.message.startswith(f"step 20: tensor {B!r} holds NaN or infinity")
