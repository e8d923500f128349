"""Which tokens make which row: packing by index, from document lengths alone.

A row is made of pieces, each a run of tokens of one document. Every plan answers `plan[i]` for any row, so that the
order of training rows can be a function of the step (see `jaxgpt.data.batches`).
"""

import bisect
import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxgpt.data.token_cache import TokenizedSource

Row = dict[str, Any]  # numpy arrays [T] by the names of the fields of types.LMBatch


class Pieces(NamedTuple):
    """Runs of tokens, each within one document.

    starts: i64, index of the first token. lengths: i64, at least 1. continues: bool, whether the document goes on after
    the piece, so that the target of its last token exists.
    """

    starts: np.ndarray
    lengths: np.ndarray
    continues: np.ndarray


NO_PIECES = Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


class RowPlan(Protocol):
    """Rows of one pass over the data: `len(plan)` of them, `plan[i]` has the fields of `types.LMBatch`, each [T]."""

    @property
    def source(self) -> TokenizedSource:
        """Where the tokens lie."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def empty_row(self) -> Row:
        """A row that counts for nothing, to fill up a batch."""
        ...


def make_plan(
    source: TokenizedSource, packing: Literal["concat", "best_fit", "none"], sequence_length: int, pad_id: int
) -> RowPlan:
    """The rows of length T = sequence_length that a way of packing makes of the documents of a source.

    `concat` joins documents and splits every T tokens. `best_fit` fills rows with whole documents; only one longer than
    T is cut, every T tokens. `none` is one document (piece) per row.

    Every token that has a predecessor in its document is a target with weight 1 exactly once, in all three: where a
    document is cut, the last target of a row is the first token of the next piece.

    Raises:
      ValueError: for another name of a packing.
    """
    if packing == "concat":
        return ConcatPlan(source, sequence_length, pad_id)
    pieces = cut_documents(source.offsets, sequence_length)
    if packing == "best_fit":
        order, row_bounds = best_fit_decreasing(pieces.lengths, sequence_length)
        pieces = Pieces(*(field[order] for field in pieces))
    elif packing == "none":
        row_bounds = np.arange(len(pieces.lengths) + 1)
    else:
        raise ValueError(f"data.packing={packing!r} is not one of concat, best_fit, none.")
    return PiecePlan(source, sequence_length, pad_id, pieces, row_bounds)


@dataclasses.dataclass(frozen=True)
class ConcatPlan:
    """Row i holds tokens [i T, i T + T) of the joined documents; the last row is padded."""

    source: TokenizedSource
    sequence_length: int
    pad_id: int

    def __len__(self) -> int:
        # The last token of all has no target: it makes no row of its own.
        return max(0, -(-(len(self.source.tokens) - 1) // self.sequence_length))

    def __getitem__(self, index: int) -> Row:
        """Row `index` as {tokens_BT, targets_BT, ...: [T]}."""
        offsets, tokens = self.source.offsets, self.source.tokens
        begin = index * self.sequence_length
        end = min(begin + self.sequence_length, len(tokens))
        first = offsets.searchsorted(begin, side="right") - 1
        last = offsets.searchsorted(end, side="left")
        starts = np.maximum(offsets[first:last], begin)
        ends = np.minimum(offsets[first + 1 : last + 1], end)
        pieces = Pieces(starts, ends - starts, ends < offsets[first + 1 : last + 1])
        return build_row(tokens, pieces, self.sequence_length, self.pad_id, self.source.trained)

    def empty_row(self) -> Row:
        """All padding."""
        return build_row(self.source.tokens, NO_PIECES, self.sequence_length, self.pad_id)


@dataclasses.dataclass(frozen=True)
class PiecePlan:
    """Row i holds pieces [row_bounds[i], row_bounds[i + 1])."""

    source: TokenizedSource
    sequence_length: int
    pad_id: int
    pieces: Pieces
    row_bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.row_bounds) - 1

    def __getitem__(self, index: int) -> Row:
        """Row `index` as {tokens_BT, targets_BT, ...: [T]}."""
        run = slice(self.row_bounds[index], self.row_bounds[index + 1])
        pieces = Pieces(*(field[run] for field in self.pieces))
        return build_row(self.source.tokens, pieces, self.sequence_length, self.pad_id, self.source.trained)

    def empty_row(self) -> Row:
        """All padding."""
        return build_row(self.source.tokens, NO_PIECES, self.sequence_length, self.pad_id)


def build_row(
    tokens: np.ndarray, pieces: Pieces, sequence_length: int, pad_id: int, trained: np.ndarray | None = None
) -> Row:
    """One row: the pieces side by side, then padding.

    Segments are numbered from 1 and positions from 0 in each piece. Padding is token pad_id, segment, position and
    weight 0; where there is no target, pad_id stands for it, with weight 0.

    trained: bool, for each token whether it is a target to learn; the weight of the others is 0.

    Returns:
      {tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT}, each [T]; i32, the weights f32.
    """
    row: Row = {name: np.zeros(sequence_length, np.int32) for name in ("segments_BT", "positions_BT")}
    row |= {name: np.full(sequence_length, pad_id, np.int32) for name in ("tokens_BT", "targets_BT")}
    row["weights_BT"] = np.zeros(sequence_length, np.float32)
    if len(pieces.starts) == 1:
        (start,), (used,), (continues,) = pieces
        row["tokens_BT"][:used] = tokens[start : start + used]
        targets = slice(start + 1, start + used + continues)
        length = targets.stop - targets.start
        row["targets_BT"][:length] = tokens[targets]
        row["weights_BT"][:length] = 1 if trained is None else trained[targets]
        row["segments_BT"][:used] = 1
        row["positions_BT"][:used] = np.arange(used)
        return row
    ends = np.cumsum(pieces.lengths)
    used = pieces.lengths.sum()
    piece_of = np.repeat(np.arange(len(ends)), pieces.lengths)
    positions = np.arange(used) - (ends - pieces.lengths)[piece_of]
    index = pieces.starts[piece_of] + positions
    has_target = np.ones(used, bool)
    has_target[ends - 1] = pieces.continues
    targets = index[has_target] + 1
    row["tokens_BT"][:used] = tokens[index]
    row["targets_BT"][:used][has_target] = tokens[targets]
    row["weights_BT"][:used][has_target] = 1 if trained is None else trained[targets]
    row["segments_BT"][:used] = piece_of + 1
    row["positions_BT"][:used] = positions
    return row


def cut_documents(offsets: np.ndarray, sequence_length: int) -> Pieces:
    """Documents as pieces of at most T tokens, in order.

    A piece that would hold only the last token of a document is left out: there is nothing after it to predict, and
    where the document was cut, it already is the last target of the piece before.
    """
    lengths = np.diff(offsets)
    pieces_per_document = np.maximum(0, -(-(lengths - 1) // sequence_length))
    document_of = np.repeat(np.arange(len(lengths)), pieces_per_document)
    first_piece = np.cumsum(pieces_per_document) - pieces_per_document
    index_in_document = np.arange(len(document_of)) - first_piece[document_of]
    starts = offsets[:-1][document_of] + index_in_document * sequence_length
    rest = offsets[1:][document_of] - starts
    return Pieces(starts, np.minimum(rest, sequence_length), rest > sequence_length)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into bins: longest first, each into the fullest bin that still takes it.

    Items of one length are placed together, and bins are kept by the space that is left in them, so that time grows
    with the number of distinct (length, space) pairs and not with the number of items. Deterministic.

    Args:
      lengths: integers in [1, capacity].
      capacity: the size of a bin.

    Returns:
      (order, bounds): bin b holds the items `order[bounds[b] : bounds[b + 1]]`.

    Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv:2404.10830), section 3.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bin_of = np.zeros(len(lengths), np.int64)  # of the items in the order longest_first
    open_bins: dict[int, list[np.ndarray]] = {}  # space left -> bins
    spaces: list[int] = []  # keys of open_bins, ascending
    num_bins = placed = 0

    def put_back(space: int, bins: np.ndarray) -> None:
        if space and len(bins):
            if space not in open_bins:
                bisect.insort(spaces, space)
                open_bins[space] = []
            open_bins[space].append(bins)

    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        while count:
            at = bisect.bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces.pop(at)
                bins = np.concatenate(open_bins.pop(space))
            else:
                space = capacity
                bins = np.arange(num_bins, num_bins + -(-count // (capacity // length)))
                num_bins += len(bins)
            # The fullest bin that takes one item stays the fullest that takes the next, until none fits.
            per_bin = space // length
            filled = min(len(bins), count // per_bin)
            rest = count - filled * per_bin if filled < len(bins) else 0
            taken = filled * per_bin + rest
            bin_of[placed : placed + taken] = np.repeat(bins, per_bin)[:taken]
            put_back(space - per_bin * length, bins[:filled])
            partly = filled + (rest > 0)
            put_back(space - rest * length, bins[filled:partly])
            put_back(space, bins[partly:])
            placed += taken
            count -= taken
    order = longest_first[np.argsort(bin_of, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
    return order, bounds
