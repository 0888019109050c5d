"""Streaming covariance: activations of all models multiplied on tensor cores into one triangle of a float32 matrix.

The rule for what is multiplied, batch by batch (docs/gpu.md has its derivation):

- bfloat16 and float16 go raw through the tensor cores, about a shift of 0, and the means are taken off as a rank-one
  term when correlations are read, while |mean| / deviation of every living unit, over all samples so far, is at most
  RAW_RATIO, the root mean squares lie within float32's squares, and all models have one dtype.
- Beyond that, and for float32, entries are shifted by the first such batch's means and split into planes of bfloat16:
  three (six products) where an input is float32 or there are few samples, two (three products) for 16-bit inputs.
- float64 is multiplied by torch.

Raw, the tiles near the diagonal are multiplied first, apart from the sums (``diagonal``): their main loop also adds up
every column, which decides by the rule before anything was added, and without another pass over the batch. Planes are
summed while they are split. Only where float32 sums cannot tell (an entry is not finite, a unit is nearly constant)
does a pass with float64 sums decide.

Once the sums are about a shift other than 0 they stay there, and follow the means when these drift by more than a
deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.backends.cpu_covariance import similarity_shape
from mudsc_fast.backends.torch_device import DEAD, TorchCovariance
from mudsc_fast.backends.triton.configs import ProductConfig, product_config
from mudsc_fast.backends.triton.correlation import correlations, mirror, moments_of
from mudsc_fast.backends.triton.diagonal import add_squares, diagonal_products
from mudsc_fast.backends.triton.launching import allocate, capability
from mudsc_fast.backends.triton.product import Operand, add_product, lengthening, readable
from mudsc_fast.backends.triton.split import Source, split, strided

# Tensor cores round sums toward zero: 64 additions of 16 samples lose up to 1.4e-6 of a chunk's sum, which is (1 +
# ratio^2) times the covariance at worst. 5 * 1.4e-6 leaves 3e-6 for what a million samples lose between chunks. Where
# the ratio is smaller, chunks are longer (``lengthening``).
RAW_RATIO = 2.0
TINY, HUGE = 1e-30, 1e30  # mean squares between which float32 holds sums of products of two units
WORKSPACE = 2**29  # bytes of planes at a time
FEW = 256  # below, what two planes leave out (2**-18 of a product) does not average out, and three cost little
HALF = (torch.float16, torch.bfloat16)
# A variance below this share of the mean square is known too badly from float32 sums: of 128 squares one after the
# other, and of 32 such sums, their errors are 2**-17 of the mean square at worst, and some 2**-24 as a rule. The ratio
# is then above 60, or the unit dead.
DOUBTFUL = 2.0**-12


class TritonCovariance(TorchCovariance):
    """The accumulators of ``TorchCovariance``, of which only what lies on and above the diagonal is kept up.

    config: how products are cut; None: as the chip's table says.
    """

    def __init__(
        self, width: int, models: int, cross: bool, device: torch.device, config: ProductConfig | None = None
    ) -> None:
        super().__init__(width, models, cross, device)
        self.config = config or product_config("add", capability(device))
        self.raw = True  # every shift is 0 and every scale 1
        self._lengthen = 1  # what the last raw batch allowed; the next one is likely to allow it, too
        self._unusable = ""

    def _zeros(self, shape: tuple[int, int]) -> Tensor:
        what = f"Covariance: the sums of {self.models} x {self.width} units"
        instead = "split the space into blocks" if self.cross else 'scope="cross" needs less'
        return allocate(shape, torch.float32, self.device, what, instead).zero_()

    # ---- updates ----

    def update(self, features: list[Tensor], dim: int) -> None:
        """Add one batch, checked by the caller; reads back a ratio to choose between raw and shifted products."""
        self._require_usable()
        if self.dtype == torch.float64:
            super().update(features, dim)
            self.raw = False
            return
        sources = _sources(features, dim)
        if self.raw:
            half = features[0].dtype in HALF and len({x.dtype for x in features}) == 1
            if half and self._update_raw(features, sources, dim):
                return
            if not half:
                self._leave_raw(self._moments(sources), sources[0].samples)
        wide = any(x.dtype not in HALF for x in features)
        planes = 3 if wide or sources[0].samples < FEW else 2
        self._add_planes(sources, planes, torch.bfloat16)
        self.count += sources[0].samples
        self._recentre()

    def _update_raw(self, features: list[Tensor], sources: list[Source], dim: int) -> bool:
        """Add a 16-bit batch as it is where the rule allows that; else nothing is added, and the sums get a shift."""
        samples, dtype = sources[0].samples, features[0].dtype
        operands, near = self._placed(features, dim), None
        ratio = math.nan
        if operands is not None:
            near = self._near(operands, self._lengthen)
            moments = near.moments
            ratio = self._raw_ratio(moments, samples, DOUBTFUL)
        elif self._held(sources, 1) >= samples:
            # It has to be copied and is small enough to be held: its moments come with the copy.
            ((operands, moments),) = self._split_pieces(sources, 1, dtype)
            ratio = self._raw_ratio(moments, samples)
        if math.isnan(ratio):
            moments = self._moments(sources)
            ratio = self._raw_ratio(moments, samples)
            if bool(moments[2].any()):
                operands = None
        if ratio > RAW_RATIO:
            self._leave_raw(moments, samples)
            return False
        before, self._lengthen = self._lengthen, lengthening(ratio)
        if operands is None:
            self._add_planes(sources, 1, dtype, self._lengthen, keep_moments=False)
        else:
            if near is not None and self._lengthen < before:
                near = self._near(operands, self._lengthen)  # its chunks were too long for this batch
            with self._writing():
                self._multiply(operands, self._lengthen, near)
        self.vectors[2:] += moments[:2]
        self.count += samples
        return True

    def _moments(self, sources: list[Source]) -> Tensor:
        """Sums of a batch, its squares about 0, and how many entries are not finite: (3, units), by a pass of its
        own."""
        zero = torch.zeros(self.width, device=self.device)
        return torch.cat([split(source, zero, zero + 1.0) for source in sources], dim=1)

    def _placed(self, features: list[Tensor], dim: int) -> list[Operand] | None:
        """Operands that read the inputs where they lie, alike for all models; None where one has to be copied."""
        found = [_in_place(x, dim) for x in features]
        operands = [operand for operand in found if operand is not None]
        alike = len({(operand.images, operand.samples) for operand in operands}) == 1
        if len(operands) < len(features) or not alike:
            return None
        cuts = (self.config, self.near_config)
        return operands if all(readable(x, config) for x in operands for config in cuts) else None

    @property
    def near_config(self) -> ProductConfig:
        """How products near the diagonal are cut."""
        return product_config("diagonal", capability(self.device))

    def _near(self, operands: list[Operand], lengthen: int) -> _Near:
        """The products near the diagonal of every block that has one, and the moments of all units."""
        config = self.near_config
        band = math.lcm(config.rows, self.config.rows, self.config.columns)
        products, moments = {}, []
        for m in range(int(self.cross), self.models):
            both = self.cross and m == 1
            left = operands[0] if self.cross else operands[m]
            products[m], found = diagonal_products(left, operands[m], config, band, not self.cross, both, lengthen)
            if both:
                moments.append(found[2:])
            moments.append(found[:2])
        return _Near(products, torch.cat(moments, dim=1), band)

    def _raw_ratio(self, moments: Tensor, samples: int, doubtful: float = 0.0) -> float:
        """The largest |mean| / deviation of a living unit, over all samples so far and these; infinity out of range.

        doubtful: NaN where float32 sums cannot tell: one is not finite or out of range, or a variance is at most this
        share of its mean square.
        """
        count = self.count + samples
        mean, square = (self.vectors[2:] + moments[:2]) / count
        variance = square - mean.square()
        dead = variance <= DEAD**2 * square
        in_range = (square == 0.0) | ((square >= TINY) & (square <= HUGE))
        ratio = torch.where(dead, 0.0, mean.abs() / variance.clamp(min=0.0).sqrt())
        ratio = torch.where(in_range, ratio, torch.inf)
        if doubtful:
            known = moments[0].isfinite() & in_range & ((variance > doubtful * square) | (square == 0.0))
            ratio = torch.where(known, ratio, torch.nan)
        return float(ratio.max())  # NaN if there is one

    def _leave_raw(self, moments: Tensor, samples: int) -> None:
        """Shift by the means so far, and scale by powers of two near the deviations, from now on."""
        count = self.count + samples
        mean, square = (self.vectors[2:] + moments[:2]) / count
        deviation = (square - mean.square()).clamp_(min=0.0).sqrt()
        _, exponent = torch.frexp(deviation)
        scale = torch.where(deviation > 0.0, torch.ldexp(torch.ones_like(deviation), -exponent), 1.0)
        scale.clamp_(2.0**-100, 2.0**100)
        self.rebase(mean.float().double(), scale)
        self.raw = False

    def _held(self, sources: list[Source], planes: int) -> int:
        """Samples of which planes fit the workspace: a multiple of the steps' depth, and at least a chunk."""
        pitch = -(-self.width // 8) * 8  # rows of 16 bytes
        depth = self.config.depth
        return max(self.config.chunk, WORKSPACE // (2 * planes * pitch * len(sources)) // depth * depth)

    def _split_pieces(
        self, sources: list[Source], planes: int, dtype: torch.dtype
    ) -> Iterator[tuple[list[Operand], Tensor]]:
        """Split a batch piece by piece: operands in planes, valid until the next piece, and moments (3, units)."""
        depth, pitch = self.config.depth, -(-self.width // 8) * 8
        most = self._held(sources, planes)
        pieces = list(zip(*(source.slabs(most) for source in sources), strict=True))
        rows = max(piece[0].samples for piece in pieces)
        rows = -(-rows // depth) * depth
        shape = (self.models, planes, rows, pitch)
        store = allocate(shape, dtype, self.device, "Covariance.update: planes of a batch", "give smaller batches")
        shifts = self.vectors[0].float().reshape(self.models, self.width)
        scales = self.vectors[1].float().reshape(self.models, self.width)
        for piece in pieces:
            samples = piece[0].samples
            padded = -(-samples // depth) * depth
            store[:, :, samples:padded].zero_()
            made = [split(source, shifts[m], scales[m], store[m]) for m, source in enumerate(piece)]
            operands = [
                Operand(store[m].reshape(planes * rows, pitch)[:, : self.width], planes, rows, padded)
                for m in range(self.models)
            ]
            yield operands, torch.cat(made, dim=1)

    def _add_planes(
        self, sources: list[Source], planes: int, dtype: torch.dtype, lengthen: int = 2, keep_moments: bool = True
    ) -> None:
        """Split a batch piece by piece, and multiply each; the shift is within a deviation of the mean: chunks of twice
        the length."""
        totals = torch.zeros(2, self.models * self.width, dtype=torch.float64, device=self.device)
        for operands, moments in self._split_pieces(sources, planes, dtype):
            totals += moments[:2]
            with self._writing():
                self._multiply(operands, lengthen)
        if keep_moments:
            self.vectors[2:] += totals

    def _multiply(self, operands: list[Operand], lengthen: int, near: _Near | None = None) -> None:
        """Add the products of all pairs of models that are kept; those near the diagonal may be there already."""
        d = self.width
        for m in range(1 if self.cross else self.models):
            for other in range(m + int(self.cross), self.models):
                column = other * d - self._columns.start
                block = self.gram[m * d : (m + 1) * d, column : column + d]
                beyond = 0
                if near is not None and (m == other or self.cross):
                    add_squares(near.products[other], block)
                    beyond = near.band
                add_product(
                    operands[m], operands[other], block, m == other, self.config, lengthen=lengthen, beyond=beyond
                )

    # ---- what a failure leaves ----

    def _writing(self) -> _Writing:
        return _Writing(self)

    def _require_usable(self) -> None:
        if self._unusable:
            raise RuntimeError(f"Covariance: a failed launch left the sums unusable ({self._unusable}); start again")

    # ---- the rest of the interface ----

    def flush(self) -> None:
        """Complete the matrix below the diagonal, for those who read all of it."""
        self._require_usable()
        if not self.cross and self.gram.dtype == torch.float32:
            mirror(self.gram)

    def widen(self) -> None:
        """Accumulate in float64 from now on."""
        self.flush()
        super().widen()

    def rebase(self, shift: Tensor, scale: Tensor) -> None:
        """Express the accumulators about another shift and scale."""
        self._require_usable()
        with self._writing():
            super().rebase(shift, scale)
        self.raw = self._is_raw()

    def _is_raw(self) -> bool:
        return self.gram.dtype == torch.float32 and not bool(
            (self.vectors[0] != 0).any() | (self.vectors[1] != 1).any()
        )

    def load(self, gram: Tensor, vectors: Tensor, count: int, dtype: torch.dtype) -> None:
        """Take over copies of recorded accumulators."""
        super().load(gram, vectors, count, dtype)
        self.raw = self._is_raw()

    def correlation(self, cross: bool) -> Tensor:
        """Correlations of the units: (models - 1, width, width) or all of them."""
        self._require_usable()
        if self.gram.dtype != torch.float32:
            return super().correlation(cross)
        instead = 'scope="cross" needs less' if not cross else "align block by block"
        shape = similarity_shape(self.width, self.models, cross)
        out = allocate(shape, torch.float32, self.device, "Covariance.correlation", instead)
        moments = moments_of(self.vectors, self.count, DEAD)
        if not cross:
            correlations(self.gram, out, (moments, moments), self.count, True)
            return out
        d = self.width
        for m in range(1, self.models):
            column = m * d - self._columns.start
            block = self.gram[:d, column : column + d]
            correlations(block, out[m - 1], (moments[:, :d], moments[:, m * d : (m + 1) * d]), self.count, False)
        return out


def add_to(
    gram: Tensor, vectors: Tensor, features: list[Tensor], dim: int, planes: int, width: int, models: int, cross: bool
) -> None:
    """Add a batch to sums that the caller owns, without waiting for the device; see ``mudsc_fast.library``."""
    sums = TritonCovariance.__new__(TritonCovariance)
    sums.width, sums.models, sums.cross, sums.device = width, models, cross, gram.device
    sums.gram, sums.vectors, sums._unusable = gram, vectors, ""
    sums._columns = slice(width if cross else 0, width * models)
    sums.config = product_config("add", capability(gram.device))
    sources = _sources(features, dim)
    operands = sums._placed(features, dim) if planes == 1 else None
    if operands is None:
        dtype, lengthen = (torch.bfloat16, 2) if planes > 1 else (features[0].dtype, 1)
        sums._add_planes(sources, planes, dtype, lengthen)
        return
    near = sums._near(operands, 1)
    sums._multiply(operands, 1, near)
    vectors[2:] += near.moments


@dataclass(frozen=True)
class _Near:
    """Products near the diagonal of the blocks (m, m), or (0, m), by m; sums and sums of squares of all units."""

    products: dict[int, Tensor]
    moments: Tensor
    band: int


class _Writing:
    """Marks the accumulators unusable where what is done inside fails: their tiles may be half written."""

    def __init__(self, sums: TritonCovariance) -> None:
        self.sums = sums

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.sums._unusable = str(error)


def _sources(features: list[Tensor], dim: int) -> list[Source]:
    """The models' inputs with one inner length; a tensor whose samples have more than two levels of strides is
    copied."""
    found = [strided(x, (dim % x.dim(),)) for x in features]
    if all(source is not None for source in found):
        inner = min(source.inner for source in found if source is not None)
        cut = [strided(x, (dim % x.dim(),), inner) for x in features]
        if all(source is not None for source in cut):
            return [source for source in cut if source is not None]
    copies = [x.movedim(dim, -1).reshape(-1, x.shape[dim]).contiguous() for x in features]
    return [Source(x, x.shape[1], 1, x.shape[0], 0, x.stride(0), 1) for x in copies]


def _in_place(x: Tensor, dim: int) -> Operand | None:
    """The input as an operand that is read where it lies, or None."""
    source = strided(x, (dim % x.dim(),))
    if source is None or source.units == 1:
        return None
    size, steps = (source.samples, source.units), (source.inner_step, source.unit_step)
    if source.outer == 1 and source.unit_step == 1 and source.inner_step >= source.units:
        return Operand(x.as_strided(size, steps))
    images = (source.outer, source.units, source.inner), (source.outer_step, source.unit_step, 1)
    if source.inner_step == 1 and source.inner > 1 and source.unit_step >= source.inner:
        if source.outer == 1:
            images = images[0], (source.units * source.unit_step, source.unit_step, 1)
        operand = Operand(x.as_strided(*images))
        return operand if operand.aligned else None
    return None
