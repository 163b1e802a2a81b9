"""Recurrent layers and cells of linear layers: their products are matrices, their steps are not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from evenkeel.errors import ShapeError
from evenkeel.layers.composite import linear, register_composite

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
State = tuple[Tensor, ...]


def step(mode: str, x: Tensor, products: Tensor, state: State) -> State:
    """The next state, from what input and state give through their matrices."""
    if mode == "LSTM":
        i, f, g, o = (x + products).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (rx, zx, nx), (rh, zh, nh) = x.chunk(3, -1), products.chunk(3, -1)
        n = (nx + (rx + rh).sigmoid() * nh).tanh()
        z = (zx + zh).sigmoid()
        return ((1 - z) * n + z * state[0],)
    both = x + products
    return (both.tanh() if mode == "RNN_TANH" else both.relu(),)


class Recurrent(nn.Module):
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` of linear layers, two for a layer and direction.

    Args:
        layer: whose weights and options it has.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.batch_first, self.dropout = layer.mode, layer.batch_first, layer.dropout
        self.hidden_size, self.num_layers = layer.hidden_size, layer.num_layers
        self.proj_size = layer.proj_size
        self.ends = ("", "_reverse") if layer.bidirectional else ("",)
        for name in self._names():
            own = {k: getattr(layer, f"{k}_{name}", None) for k in ("bias_ih", "bias_hh")}
            self.add_module(
                f"ih_{name}", linear(getattr(layer, f"weight_ih_{name}"), own["bias_ih"])
            )
            self.add_module(
                f"hh_{name}", linear(getattr(layer, f"weight_hh_{name}"), own["bias_hh"])
            )
            if layer.proj_size:
                self.add_module(f"hr_{name}", linear(getattr(layer, f"weight_hr_{name}"), None))

    def flatten_parameters(self) -> None:
        """Nothing: there is nothing to flatten."""

    def _names(self) -> list[str]:
        return [f"l{k}{end}" for k in range(self.num_layers) for end in self.ends]

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """As the layer; sequences of unlike lengths must be padded."""
        if isinstance(input, PackedSequence):
            raise ShapeError(
                "On a chip sequences are padded, not packed: use pad_packed_sequence, and read the "
                "outputs at each sequence's own end."
            )
        single = input.dim() == 2
        x = input.unsqueeze(1) if single else input
        x = x.transpose(0, 1) if self.batch_first and not single else x  # (T, N, inputs)
        if not len(x):
            raise ShapeError("A recurrent layer needs one step in time or more; got none.")
        states = self._begin(x, hx, single)
        last: list[State] = []
        for k in range(self.num_layers):
            outputs = []
            for end in self.ends:
                y, state = self._run(x, f"l{k}{end}", states[len(last)], backward=bool(end))
                outputs.append(y)
                last.append(state)
            x = torch.cat(outputs, -1)
            if k < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        ends = [torch.stack(parts) for parts in zip(*last, strict=True)]
        if single:
            x, ends = x.squeeze(1), [end.squeeze(1) for end in ends]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, (tuple(ends) if self.mode == "LSTM" else ends[0])

    def _begin(self, x: Tensor, hx: Any, single: bool) -> list[State]:
        """The state of each layer and direction before the first step."""
        number = self.num_layers * len(self.ends)
        if hx is None:
            sizes = [self.proj_size or self.hidden_size]
            sizes += [self.hidden_size] if self.mode == "LSTM" else []
            return [tuple(x.new_zeros(x.shape[1], n) for n in sizes)] * number
        parts = hx if isinstance(hx, tuple | list) else (hx,)
        parts = [part.unsqueeze(1) if single else part for part in parts]
        if any(part.shape[:2] != (number, x.shape[1]) for part in parts):
            raise ShapeError(
                f"States must be ({number}, {x.shape[1]}, ...), for each layer, direction and "
                f"sample; got {[tuple(part.shape) for part in parts]}."
            )
        return [tuple(part[k] for part in parts) for k in range(number)]

    def _run(self, x: Tensor, name: str, state: State, *, backward: bool) -> tuple[Tensor, State]:
        # Of all times at once; samples first, as converters look at each sample.
        products = getattr(self, f"ih_{name}")(x.transpose(0, 1)).transpose(0, 1)
        of_state, outputs = getattr(self, f"hh_{name}"), []
        times = range(len(x))
        for t in reversed(times) if backward else times:
            state = step(self.mode, products[t], of_state(state[0]), state)
            if self.proj_size:
                state = getattr(self, f"hr_{name}")(state[0]), *state[1:]
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backward else outputs), state


class Cell(nn.Module):
    """``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` of two linear layers.

    Args:
        layer: whose weights it has.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        kind = next(c for c in type(layer).__mro__ if c in MODES)
        self.mode = MODES[kind] or f"RNN_{layer.nonlinearity.upper()}"
        self.hidden_size = layer.hidden_size
        self.ih, self.hh = (
            linear(getattr(layer, f"weight_{k}"), getattr(layer, f"bias_{k}")) for k in ("ih", "hh")
        )

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the cell."""
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        state = tuple(hx) if self.mode == "LSTM" else (hx,)
        state = step(self.mode, self.ih(input), self.hh(state[0]), state)
        return state if self.mode == "LSTM" else state[0]


MODES: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: ""}
for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    register_composite(_kind, Recurrent)
for _cell in MODES:
    register_composite(_cell, Cell)
