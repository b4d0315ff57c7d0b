"""However the work is split, padded, packed, undone and reordered, each logit is that of its document alone."""

import copy
import pickle
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from .kinds import KINDS, VOCAB_SIZE, logits_alone, tiny_model


# Relative to the largest logit of the document. In bfloat16 both sides round at 8 bits, each in its own order.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}
MAX_BATCH_SIZE = 4

# What a column of a row holds: a token and its position in its document, or `None` for padding.
Column = tuple[int, int] | None


class Decoder:
    """A cache, and the columns that it was given, row by row."""

    def __init__(self, model: PreTrainedModel, batch_size: int):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.rows: list[list[Column]] = [[] for _ in range(batch_size)]

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def next_position(self, row: int) -> int:
        positions = [column[1] for column in self.rows[row] if column is not None]
        return positions[-1] + 1 if positions else 0

    @torch.no_grad()
    def feed(self, segment: list[list[Column]], filler: random.Random, pass_mask: bool, pass_positions: bool) -> None:
        """One forward pass over a segment of every row; checks the logits of its real tokens."""
        past = self.length
        self.rows = [row + columns for row, columns in zip(self.rows, segment, strict=True)]
        # What stands in a masked column must not matter.
        cells = [
            [(filler.randrange(VOCAB_SIZE), filler.randrange(8)) if column is None else column for column in columns]
            for columns in segment
        ]
        mask = torch.tensor([[column is not None for column in row] for row in self.rows])
        outputs = self.model(
            torch.tensor([[token for token, _ in row] for row in cells]),
            attention_mask=mask.long() if pass_mask or not mask.all() else None,
            position_ids=torch.tensor([[position for _, position in row] for row in cells])
            if pass_positions
            else None,
            cache=self.cache,
        )
        assert outputs.cache is self.cache
        assert self.cache.get_seq_length() == self.length
        for row, logits in zip(self.rows, outputs.logits, strict=True):
            self._check(row, logits, past)

    def _check(self, row: list[Column], logits: torch.Tensor, past: int) -> None:
        documents: list[tuple[list[int], list[int]]] = []
        for index, column in enumerate(row):
            if column is not None:
                token, position = column
                if position == 0:
                    documents.append(([], []))
                documents[-1][0].append(token)
                documents[-1][1].append(index)
        for tokens, columns in documents:
            new = [index - past for index in columns if index >= past]
            if new:
                expected = logits_alone(self.model, tokens)
                tolerance = TOLERANCE[expected.dtype] * expected.abs().max()
                error = (logits[new] - expected[-len(new) :]).abs().max()
                assert error <= tolerance, f"off by {error.item():.2e}, allowed are {tolerance.item():.2e}"
                if expected.dtype != torch.bfloat16:
                    assert logits[new].argmax(-1).tolist() == expected[-len(new) :].argmax(-1).tolist()


def draw_row(length: int, first_position: int, padded: bool, packed: bool, draw: random.Random) -> list[Column]:
    """A segment of one row: where its padding is, its tokens, and where a document begins in it."""
    num_real = draw.randint(0, length) if padded else length
    split = draw.randint(0, num_real)
    real = {
        "left": [False] * (length - num_real) + [True] * num_real,
        "right": [True] * num_real + [False] * (length - num_real),
        "middle": [True] * split + [False] * (length - num_real) + [True] * (num_real - split),
        "interleaved": draw.sample([True] * num_real + [False] * (length - num_real), length),
    }[draw.choice(["left", "right", "middle", "interleaved"])]
    columns: list[Column] = []
    position = first_position
    for is_real in real:
        if not is_real:
            columns.append(None)
            continue
        if packed and draw.random() < 0.2:
            position = 0
        columns.append((draw.randrange(VOCAB_SIZE), position))
        position += 1
    return columns


@pytest.mark.slow
@settings(max_examples=600, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    batch_size=st.integers(1, 3),
    padded=st.booleans(),
    packed=st.booleans(),
    records=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_logit_is_that_of_the_document_alone(
    data, kind, dtype, batch_size, padded, packed, records, seed
) -> None:
    draw = random.Random(seed)
    decoder = Decoder(tiny_model(kind, dtype), batch_size)
    recorded = 0

    def feed(length: int) -> None:
        nonlocal recorded
        segment = [
            draw_row(length, decoder.next_position(row), padded, packed, draw) for row in range(len(decoder.rows))
        ]
        decoder.feed(segment, draw, draw.random() < 0.5, packed or draw.random() < 0.5)
        recorded += length if records else 0

    if records:
        decoder.cache.activate_past_recording()
    feed(data.draw(st.integers(1, 12), label="prompt"))
    for action in data.draw(
        st.lists(
            st.sampled_from(["chunk", "step", "steps", "crop", "select", "repeat", "reorder", "copy"]), max_size=7
        )
    ):
        if action == "chunk":
            feed(data.draw(st.integers(2, 8), label="chunk"))
        elif action == "step":
            feed(1)
        elif action == "steps":
            for _ in range(3):
                feed(1)
        elif action == "crop":
            if records:
                removed = data.draw(st.integers(0, recorded), label="crop")
                decoder.cache.crop(-removed)
                decoder.rows = [row[: decoder.length - removed] for row in decoder.rows]
                recorded = 0
            assert decoder.cache.get_seq_length() == decoder.length
        elif action in ("repeat", "select", "reorder") and decoder.length == 0:
            # transformers' attention layers do not keep the batch of an empty cache.
            continue
        elif action == "repeat" and 2 * len(decoder.rows) <= MAX_BATCH_SIZE:
            decoder.cache.batch_repeat_interleave(2)
            decoder.rows = [row for row in decoder.rows for _ in range(2)]
        elif action == "copy":
            decoder.cache = copy.deepcopy(decoder.cache)
            decoder.cache = pickle.loads(pickle.dumps(decoder.cache))
        elif action in ("select", "reorder"):
            size = len(decoder.rows) if action == "reorder" else draw.randint(1, MAX_BATCH_SIZE)
            indices = [draw.randrange(len(decoder.rows)) for _ in range(size)]
            if action == "reorder":
                decoder.cache.reorder_cache(torch.tensor(indices))
            else:
                decoder.cache.batch_select_indices(torch.tensor(indices))
            decoder.rows = [decoder.rows[index] for index in indices]
    feed(data.draw(st.integers(1, 3), label="last"))
