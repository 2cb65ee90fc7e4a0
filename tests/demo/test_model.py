from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckavg.demo.checkpoint import load_model, write_checkpoint
from ckavg.demo.model import LlamaShape, initialised_llama

SHAPE = LlamaShape(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24
)


def saved(directory: Path, shape: LlamaShape = SHAPE) -> Path:
    model = initialised_llama(shape, generator=torch.Generator().manual_seed(1))
    # Initial norms are all one and initial logits nearly equal: a mistake would hide in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0).add_(0.1 * torch.arange(parameter.numel()).view_as(parameter).sin())
    return write_checkpoint(directory, 7, model, {"global_step": 7})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(2))


def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, tokens: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = saved(tmp_path)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert {problem: list(names) for problem, names in loading.items() if names} == {}
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = load_model(checkpoint)(tokens)
    # Two layers of sums over at most 48 products, in another order: some tens of rounding errors.
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=100 * torch.finfo(torch.float32).eps * scale)


def test_transformers_saves_the_same_tensors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = saved(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    mine, theirs = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert LlamaShape.from_config(load_model(tmp_path / "again").shape.to_config()) == SHAPE


def test_a_token_sees_only_those_before_it(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = load_model(saved(tmp_path))
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amin(-1).max() > 0


def test_the_loss_is_the_cross_entropy_of_the_next_token(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = load_model(saved(tmp_path))
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1]).double().log_softmax(-1)
        total = -log_probabilities.gather(-1, tokens[:, 1:, None]).sum().item()
        assert model.loss(tokens, reduction="sum").item() == pytest.approx(total, rel=1e-5)
        assert model.loss(tokens).item() == pytest.approx(total / tokens[:, 1:].numel(), rel=1e-5)


def test_initialising_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    initialised_llama(SHAPE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_width_that_gives_odd_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="use a multiple of 8"):
        replace(SHAPE, hidden_size=36)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2', expected 'llama'"),
        ("hidden_size", None, "hidden_size is None, expected a whole number"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False, expected True"),
    ],
)
def test_another_kind_of_model_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaShape.from_config(SHAPE.to_config() | {key: value})


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    small, large = saved(tmp_path), tmp_path / "large"
    large.mkdir()
    (small / "config.json").write_bytes(
        (saved(large, replace(SHAPE, num_hidden_layers=3)) / "config.json").read_bytes()
    )
    with pytest.raises(ValueError, match="does not hold the tensors"):
        load_model(small)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = initialised_llama(SHAPE, generator=torch.Generator().manual_seed(1))
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, 1, model, {"global_step": object()})
    assert list(tmp_path.iterdir()) == []
