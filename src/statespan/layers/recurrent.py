"""LSTM and GRU mixers: the recurrent baselines, torch's own cells behind the mixer contract."""

import torch
from torch import Tensor, nn

from statespan.layers.config import RecurrentConfig
from statespan.layers.mixer import Mixer
from statespan.layers.state import RecurrentState
from statespan.layers.token_layout import token_layout


class Recurrent(Mixer):
    """One nn.LSTM or nn.GRU layer of width hidden_size (Hochreiter & Schmidhuber 1997; Cho et al. 2014)."""

    def __init__(self, hidden_size: int, config: RecurrentConfig, kind: str) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        layer = nn.LSTM if kind == "lstm" else nn.GRU
        self.rnn = layer(hidden_size, hidden_size, bias=config.bias, batch_first=True)

    def forward(
        self, hidden: Tensor, state: RecurrentState | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        start = state or self.new_state(hidden.shape[0], hidden.device, hidden.dtype)
        if segments is None:
            out, end = self._run(hidden, start)
        else:
            out, end = self._run_segments(hidden, start, segments)
        return out, None if state is None else end

    def _run(
        self, hidden: Tensor | nn.utils.rnn.PackedSequence, start: RecurrentState
    ) -> tuple[Tensor, RecurrentState]:
        first = start.hidden.unsqueeze(0)
        if start.cell is None:
            out, last = self.rnn(hidden, first)
            return out, RecurrentState(last[0])
        out, (last, cell) = self.rnn(hidden, (first, start.cell.unsqueeze(0)))
        return out, RecurrentState(last[0], cell[0])

    def _run_segments(self, hidden: Tensor, start: RecurrentState, segments: Tensor) -> tuple[Tensor, RecurrentState]:
        """Each segment as a sequence of its own in one packed batch; a row's first segment continues its state."""
        layout = token_layout(segments)
        key = torch.arange(segments.shape[0], device=segments.device).unsqueeze(1) * segments.shape[1] + layout.run
        key = key[layout.real]
        if key.numel() == 0:
            return torch.zeros_like(hidden), start
        sequence, lengths = torch.unique_consecutive(key, return_counts=True)
        row, run = sequence // segments.shape[1], sequence % segments.shape[1]
        continues = (run == 0).unsqueeze(1)
        begin = RecurrentState(
            start.hidden[row] * continues, None if start.cell is None else start.cell[row] * continues
        )
        pieces = hidden[layout.real].split(lengths.tolist())
        packed = nn.utils.rnn.pack_sequence(list(pieces), enforce_sorted=False)
        packed_out, end = self._run(packed, begin)
        unpacked = nn.utils.rnn.unpack_sequence(packed_out)  # type: ignore[arg-type]  # a packed input gives a packed output
        out = torch.zeros_like(hidden).masked_scatter(layout.real.unsqueeze(-1), torch.cat(unpacked))
        last = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])
        rows = row[last]
        final = start.hidden.index_copy(0, rows, end.hidden[last])
        if start.cell is None or end.cell is None:
            return out, RecurrentState(final)
        return out, RecurrentState(final, start.cell.index_copy(0, rows, end.cell[last]))

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        zeros = torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype)
        return RecurrentState(zeros, zeros.clone() if isinstance(self.rnn, nn.LSTM) else None)
