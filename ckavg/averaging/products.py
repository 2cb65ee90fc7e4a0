"""Pass 2 over low-rank adapters: averages of their products s·BA, exact or truncated to a rank, pair by pair.

    Σ_k w_k B_k A_k = B A        B = [sgn(w_k) √|w_k| B_k]_k side by side,  A = [√|w_k| A_k]_k one below the other

The best product of rank R in the Frobenius norm comes from B = Q_B R_B, Aᵀ = Q_A R_A and U Σ Vᵀ = R_B R_Aᵀ, keeping the
R largest singular values: B = Q_B U √Σ, A = √Σ Vᵀ Q_Aᵀ (Eckart and Young, 1936). All arithmetic is in float64; the
factors are rounded once. Memory: one pair in all checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ckavg.averaging.adapters import Products, different_scaling
from ckavg.averaging.rules import effective_weights, round_into, too_large
from ckavg.checkpoints.adapters import Pair
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.engine.blocks import Block, cut_blocks, sizes_of
from ckavg.engine.context import Context
from ckavg.engine.distributed import PassJournal
from ckavg.engine.stream import stream
from ckavg.engine.tiles import TORCH_DTYPES, TileReader, all_finite
from ckavg.errors import NonFiniteError
from ckavg.schemes import Coefficients

if TYPE_CHECKING:
    from ckavg.averaging.replay import Average

_OfPair = tuple[tuple[str, ...], tuple[tuple[float, float], ...]]
"""For a pair: the hashes of its bytes in hexadecimal digits, and for each average its energy and how much of it
truncation removed."""

Weights = Mapping[str, tuple[float, ...]]
"""The weight of every checkpoint in the average of each product, by the name of A."""


@dataclass(frozen=True, slots=True)
class ReplayedProducts:
    """What the pass read, and what truncation removed.

    Attributes:
        bytes_read: bytes.
        blocks, hashes: of the bytes read, for the checksums of the checkpoints.
        discarded: for each average, the fraction of Σ ‖s·BA‖² that truncation removed, by the index of the checkpoint
            after which it is written; empty without truncation.
    """

    bytes_read: int
    blocks: tuple[Block, ...]
    hashes: tuple[bytes, ...]
    discarded: tuple[Mapping[int, float], ...]


def weights_of(products: Products, coefficients: Coefficients, index: int) -> Weights:
    """The weights of an average after checkpoint `index`; a pair has those of its A."""
    common = effective_weights(coefficients, index)
    return {
        pair.a: effective_weights(coefficients.for_tensor(pair.a), index)
        if pair.a in coefficients.tensor_betas
        else common
        for pair in products.pairs
    }


def count_terms(weights: Weights) -> dict[str, int]:
    """How many products an average sums; those of weight 0 have no columns."""
    return {name: sum(weight != 0 for weight in each) for name, each in weights.items()}


def replay_products(
    run: Run,
    products: Products,
    averages: Sequence[Average],
    *,
    places: Sequence[int],
    context: Context,
    journal: PassJournal[_OfPair] | None = None,
) -> ReplayedProducts:
    """Form all averages of the products of a run in one reading.

    Args:
        run: the checkpoints, the anchor first.
        products: the pairs, and the rank to truncate to.
        averages: what to form; the writers take whole factors.
        places: indices of the checkpoints to read, ascending.
        context: how the pass runs.
        journal: what is written already.

    Raises:
        NonFiniteError: a factor holds NaN or infinity, or a value does not fit the output dtype.
        MismatchError: two checkpoints scale a product by different s.
        TruncatedShardError, ReadError, OutputError: see `replay`.
    """
    pairs = {pair.a: pair for pair in products.pairs}
    read = [run.checkpoints[place] for place in places]
    wanted = [
        (average, index, weights_of(products, average.coefficients, index))
        for average in averages
        for index in sorted(average.writers)
    ]

    def make_worker(reader: TileReader) -> _ProductWorker:
        return _ProductWorker(read, places, reader, products, wanted, tile=context.tile)

    blocks = tuple(Block(pair.a, 0, pair.numel[0]) for pair in products.pairs)
    one_at_a_time = dataclasses.replace(context, threads=1)
    streamed = stream("replay", read, blocks, make_worker, one_at_a_time, journal)
    of_pairs = [block for each in blocks for block in _blocks_of(run, pairs[each.name])]
    hashes = [bytes.fromhex(each) for of_pair, _ in streamed.results for each in of_pair]
    nbytes = sum(sizes_of(read, of_pairs)) if context.ranks.is_shared else streamed.bytes_read
    energies = [energies for _, energies in streamed.results]
    discarded: dict[int, dict[int, float]] = {id(average): {} for average in averages}
    for place, (average, index, _) in enumerate(wanted if products.rank is not None else ()):
        total, lost = (math.fsum(each[place][part] for each in energies) for part in (0, 1))
        discarded[id(average)][index] = lost / total if total else 0.0
    return ReplayedProducts(
        nbytes, tuple(of_pairs), tuple(hashes), tuple(discarded[id(average)] for average in averages)
    )


def _blocks_of(run: Run, pair: Pair) -> tuple[Block, ...]:
    """The blocks of a pair, which are read and enter the checksums."""
    names = [name for name in (pair.a, pair.b, pair.alpha) if name and run.tensors[name].is_floating]
    return tuple(block for name in names for block in cut_blocks({name: run.tensors[name]}))


class _ProductWorker:
    """Averages one pair after another."""

    def __init__(
        self,
        read: Sequence[Checkpoint],
        places: Sequence[int],
        reader: TileReader,
        products: Products,
        wanted: Sequence[tuple[Average, int, Weights]],
        *,
        tile: int,
    ) -> None:
        self._read = read
        self._places = places
        self._tensors = read[-1].entries
        self._reader = reader
        self._pairs = {pair.a: pair for pair in products.pairs}
        self._rank = products.rank
        self._wanted = wanted
        self._tile = tile

    def __call__(self, block: Block) -> _OfPair:
        """Form and write the averages of a pair."""
        pair = self._pairs[block.name]
        a, of_a = self._load(pair.a)
        b, of_b = self._load(pair.b)
        scaling, of_alpha = self._scaling(pair)
        a, b = a.view(len(a), pair.rank, -1), b.view(len(b), -1, pair.rank)
        energies = []
        for average, index, weights in self._wanted:
            rank = pair.new_rank(count_terms(weights)[pair.a], self._rank)
            own = dict(zip(average.places, weights[pair.a], strict=True))
            used = [own.get(place, 0.0) for place in self._places]
            new_a, new_b, total, lost = average_products(a, b, used, rank)
            energies.append((scaling**2 * total, scaling**2 * lost))
            self._write(average, index, pair.a, new_a, average.dtypes[pair.a])
            self._write(average, index, pair.b, new_b, average.dtypes[pair.b])
            if pair.alpha:
                self._write(average, index, pair.alpha, torch.tensor([scaling * rank], dtype=torch.float64), "F32")
        return of_a + of_b + of_alpha, tuple(energies)

    def _load(self, name: str) -> tuple[Tensor, tuple[str, ...]]:
        """A tensor in all checkpoints, (checkpoints, elements) float64, and the hashes of its blocks."""
        entry = self._tensors[name]
        values = torch.empty(len(self._read), entry.numel, dtype=torch.float64)
        hashes = []
        for block in cut_blocks({name: entry}):
            sums = self._reader.sum_up(block)
            for start, stop in block.tiles(self._tile):
                for index, checkpoint in enumerate(self._read):
                    self._reader.load(index, name, start, values[index, start:stop])
                    if not all_finite(values[index, start:stop]):
                        raise NonFiniteError(
                            f"step {checkpoint.step}: tensor {name!r} holds NaN or infinity in {checkpoint.path}.",
                            hint=f"Stop before it with --to-step {checkpoint.step - 1}.",
                        )
            hashes.append(sums.hashes().hex())
        return values, tuple(hashes)

    def _scaling(self, pair: Pair) -> tuple[float, tuple[str, ...]]:
        """The scaling s of a pair, and the hashes of the bytes it was read from.

        Raises:
            MismatchError: it is not the same in all checkpoints.
        """
        if pair.scaling is not None:
            return pair.scaling, ()
        if self._tensors[pair.alpha].is_floating:
            values, hashes = self._load(pair.alpha)
            alphas = values[:, 0].tolist()
        else:
            size, hashes = self._tensors[pair.alpha].nbytes, ()
            self._reader.sum_up(Block(pair.alpha, 0, 1))
            stored = (self._reader.raw(index, pair.alpha, 0, size) for index in range(len(self._read)))
            alphas = [int.from_bytes(each.numpy().tobytes(), "little", signed=True) for each in stored]
        for checkpoint, alpha in zip(self._read, alphas, strict=True):
            if alpha != alphas[-1]:
                there, here = alpha / pair.rank, alphas[-1] / pair.rank
                raise different_scaling(pair, checkpoint.step, there, self._read[-1].step, here)
        return alphas[-1] / pair.rank, hashes

    def _write(self, average: Average, index: int, name: str, values: Tensor, dtype: str) -> None:
        rounded = round_into(values.reshape(-1), torch.empty(values.numel(), dtype=TORCH_DTYPES[dtype]))
        if not all_finite(rounded):
            raise too_large(name, dtype)
        average.writers[index].put(name, 0, rounded.view(torch.uint8))


def average_products(a: Tensor, b: Tensor, weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The factors of Σ_k w_k B_k A_k, or of the nearest product of a lower rank.

    Args:
        a: (K, r, n) float64.
        b: (K, m, r) float64.
        weights: K of them, not all 0.
        rank: R, of the result.

    Returns:
        A (R, n) and B (m, R), the squared Frobenius norm of the sum, and how much of it truncation removes.
    """
    terms = [index for index, weight in enumerate(weights) if weight != 0]
    size = torch.tensor([math.sqrt(abs(weights[index])) for index in terms], dtype=a.dtype)[:, None, None]
    sign = torch.tensor([math.copysign(1.0, weights[index]) for index in terms], dtype=a.dtype)[:, None, None]
    stacked_a = (size * a[terms]).reshape(-1, a.shape[2])
    stacked_b = (sign * size * b[terms]).transpose(0, 1).reshape(b.shape[1], -1)
    if rank == len(stacked_a):
        total = float(torch.sum((stacked_b.T @ stacked_b) * (stacked_a @ stacked_a.T)))
        return stacked_a, stacked_b, total, 0.0
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root, energies = values[:rank].sqrt(), values.square()
    new_a, new_b = root[:, None] * (v[:rank] @ q_a.T), q_b @ u[:, :rank] * root
    return new_a, new_b, float(energies.sum()), float(energies[rank:].sum())
