"""How the selective scan is divided on an NVIDIA GPU, and the launches of its kernels, made once for a layout."""

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.cuda_kernels import Kernel, Launch, scalar_type
from statespan.ops.gpu import multiprocessors

EVERY = 64  # tokens; the backward keeps the state before each EVERY-th token and computes the others again
PIECE = 8  # tokens whose states the backward holds in registers
THREADS = 128

# Clocks of a token on a multiprocessor with some blocks, by states a thread: (of one more block, of any), on an H100.
CLOCKS = {2: (43, 30), 4: (60, 62), 8: (93, 110)}
# The same where splits of the tokens fill it, with the summaries that this needs: a block's share at 8 states a thread.
CLOCKS_SPLIT = 265
# What the summaries of the splits cost, of the backward's main kernel.
SUMMARY_SHARE = 0.21
# A chunk of the backward that keeps a piece's decays in registers, two blocks a multiprocessor, next to one without.
CHUNK_WITH_DECAYS = 0.745
CHUNK_START = 0.3  # what a block costs before its first chunk, in chunks

_HERE = Path(__file__).parent
_forward = Kernel(_HERE / "forward.cu", "scan_forward")
_summary = Kernel(_HERE / "summary.cu", "scan_summary")
_chain = Kernel(_HERE / "summary.cu", "scan_chain")
_backward = Kernel(_HERE / "backward.cu", "scan_backward")
_sums = Kernel(_HERE / "backward.cu", "scan_sums")


class Layout(NamedTuple):
    """What the compiled kernels and the division of the work depend on."""

    device: torch.device
    size: tuple[int, ...]  # batch, length, channels
    matrix: tuple[int, ...]  # groups, states
    types: tuple[torch.dtype | None, ...]  # of u, dt, z, B, C; None: no z
    strides: tuple[tuple[int, ...], ...]  # of u, dt, B, C, and of z and the gradients of y and z where there are any
    based: bool  # whether they all begin at multiples of 16 bytes
    segments: bool
    dt_softplus: bool = True
    discretization: str = "mamba"


class Backward(NamedTuple):
    """The launches of a backward and the sizes of its scratch memory."""

    main: Launch
    sums: Launch
    blocks: int  # of channels in a group
    tiles_a_block: int
    split: int  # tokens
    splits: int


class Scan:
    """How the work of a layout is divided: pure functions of it, remembered."""

    def __init__(self, layout: Layout) -> None:
        self.device, (self.batch, self.length, self.channels) = layout.device, layout.size
        self.groups, self.states = layout.matrix
        self.padded = max(8, 1 << (self.states - 1).bit_length())
        self.sizes = (self.length, self.channels, self.groups)
        u, dt, z, B, C = layout.types
        assert u and dt and B and C
        aligned = layout.based and self.channels // self.groups % 8 == 0 and self.states % 8 == 0
        kinds = [x for x in (u, dt, B, C, z) if x is not None]
        for strides, dtype in zip(layout.strides, (*kinds, u, z or u), strict=False):
            outer = zip(strides[:-1], (self.batch, self.length, self.groups), strict=False)
            aligned &= all(stride * dtype.itemsize % 16 == 0 for stride, count in outer if count > 1)
        self.wide = max(x.itemsize for x in (u, dt, B, C)) == 4
        self.plain = aligned and layout.discretization == "mamba" and not self.wide
        self.inputs: dict[str, str | int] = {
            **{"U": scalar_type(u), "DT": scalar_type(dt), "Z": scalar_type(z or u)},
            **{"BM": scalar_type(B), "CM": scalar_type(C), "STATES": self.states, "PADDED": self.padded},
            **{"ALIGNED": int(aligned), "HAS_Z": int(z is not None), "SOFTPLUS": int(layout.dt_softplus)},
            **{"SEGMENTS": int(layout.segments), "DISCRETIZATION": DISCRETIZATIONS[layout.discretization]},
        }
        self._forward: dict[bool, tuple[Launch, int]] = {}
        self._chain: dict[tuple[int, bool], tuple[Launch, Launch]] = {}
        self._backward: Backward | None = None

    def tiles(self, channels: int) -> int:
        """How many blocks of that many channels there are; a block's channels are of one group."""
        return self.groups * -(-(self.channels // self.groups) // channels)

    def macros(self, states: int, **more: str | int) -> tuple[tuple[str, str | int], ...]:
        """What the forward and the summary are compiled with, for so many states a thread."""
        lanes = self.padded // states
        group = min(max(lanes, 4), 8)  # tokens that are summed together, see forward.cu
        ahead = int(states * group <= 16)  # whether the next group's exponentials fit into registers, too
        # Of shared memory, in numbers of B.
        room = 512 if self.wide else 1024 if states <= 4 and self.padded == 32 else 2048
        tokens = max(min(8 * lanes, room // self.padded, 64), group * (1 + ahead))
        blocks = 3 if not self.plain or states == 2 else 4 if ahead or self.padded > 32 else 5
        sizes = {"STATES_A_THREAD": states, "THREADS": THREADS, "TOKENS": tokens, "BLOCKS": blocks, "AHEAD": ahead}
        return tuple({**self.inputs, **sizes, **more}.items())

    def forward(self, keep_starts: bool) -> tuple[Launch, int]:
        """The launch, and tokens a split."""
        if keep_starts not in self._forward:
            states, split = self.forward_plan()
            grid = (self.tiles(THREADS * states // self.padded), self.batch, -(-self.length // split))
            macros = self.macros(states, EVERY=EVERY if keep_starts else 0)
            self._forward[keep_starts] = _forward.launch(self.device, grid, THREADS, macros), split
        return self._forward[keep_starts]

    def forward_plan(self) -> tuple[int, int]:
        """States a thread and tokens a split: what is soonest done.

        Fewer states a thread make more threads of as many channels, at some cost; splits of the tokens make still
        more, and need their summaries first.
        """
        processors = multiprocessors(self.device)

        def clocks(states: int) -> float:
            blocks = -(-self.tiles(THREADS * states // self.padded) * self.batch // processors)
            more, any_number = CLOCKS[states]
            return more * blocks + any_number

        whole = -(-self.length // EVERY) * EVERY
        states = min((s for s in CLOCKS if 2 <= self.padded // s <= 16), key=clocks)
        if self.padded // 2 < 8:
            return states, whole
        blocks = self.tiles(THREADS * 8 // self.padded) * self.batch
        splits = min(8 * processors // blocks, whole // (4 * EVERY))
        if splits < 4 or CLOCKS_SPLIT * blocks / processors > clocks(states):
            return states, whole
        return 8, -(-whole // splits // EVERY) * EVERY

    def chain(self, split: int, reverse: bool) -> tuple[Launch, Launch]:
        """The launches that find what each split does to the state, and what each is given."""
        if (split, reverse) not in self._chain:
            states, splits = min(8, self.padded // 2), -(-self.length // split)
            macros = self.macros(states, REVERSE=int(reverse), MM=self.inputs["CM" if reverse else "BM"])
            grid = (self.tiles(THREADS * states // self.padded), self.batch, splits - 1)
            of_chain = (-(-self.channels * self.states // THREADS), self.batch, 1)
            self._chain[split, reverse] = (
                _summary.launch(self.device, grid, THREADS, macros),
                _chain.launch(self.device, of_chain, THREADS, macros),
            )
        return self._chain[split, reverse]

    def backward(self) -> Backward:
        """The launches of the backward, and what it needs."""
        if self._backward is None:
            tile, macros, shared_bytes, resident = self.backward_shape()
            tiles_a_block = max(1, 64 // tile)  # narrow tiles take turns, so that `of_matrices` stays small
            blocks = -(-(self.tiles(tile) // self.groups) // tiles_a_block)
            number, chunks = blocks * self.groups * self.batch, -(-self.length // EVERY)
            processors = multiprocessors(self.device)
            split, time = _backward_split(number, chunks, resident * processors)
            measured = self.plain and self.padded == 16 and not self.inputs["SEGMENTS"]
            if measured and 1 < number / processors <= 2 and CHUNK_WITH_DECAYS * (chunks + CHUNK_START) < time:
                split, macros = EVERY * chunks, self.backward_shape(keeps_decays=True)[1]
            splits = -(-self.length // split)
            sums = 2 * self.batch * self.length * self.groups * self.states + self.channels * (self.states + 2)
            of_sums = -(-sums // (THREADS * (4 if self.inputs["ALIGNED"] else 1)))
            self._backward = Backward(
                _backward.launch(
                    self.device, (self.groups * blocks, splits, self.batch), THREADS, macros, shared_bytes
                ),
                _sums.launch(self.device, (of_sums, 1, 1), THREADS, macros),
                *(blocks, tiles_a_block, split, splits),
            )
        return self._backward

    def backward_shape(self, keeps_decays: bool = False) -> tuple[int, tuple[tuple[str, str | int], ...], int, int]:
        """Channels a tile, macros, dynamic shared memory, and how many blocks a multiprocessor is to hold."""
        states = min(4, self.padded // 4)
        resident = 3 if self.plain and self.padded <= 16 and not keeps_decays else 2
        sizes = {"STATES_A_THREAD": states, "THREADS": THREADS, "BLOCKS": resident, "PIECE": PIECE, "EVERY": EVERY}
        sizes["DECAYS"] = int(keeps_decays)
        kept = EVERY // PIECE * 2 * states * THREADS
        of_warps = THREADS // 32 * PIECE * 2 * self.padded
        tile = 2 * THREADS * states // self.padded
        return tile, tuple({**self.inputs, **sizes}.items()), 4 * (kept + of_warps), resident


@lru_cache(maxsize=1024)
def scan_of(layout: Layout) -> Scan:
    """The division of the work, made once for a layout."""
    return Scan(layout)


@cache
def _backward_split(blocks: int, chunks: int, room: int) -> tuple[int, float]:
    """Tokens a split, and its time: what is soonest done by `room` blocks at once, the summaries included."""

    def time(chunks_a_split: int) -> float:  # of a multiprocessor, in chunks
        splits = -(-chunks // chunks_a_split)
        waves = max(1.0, (blocks * splits / room + 2 * -(-blocks * splits // room)) / 3)  # late blocks run faster alone
        summaries = SUMMARY_SHARE * blocks * chunks / room if splits > 1 else 0
        return waves * (chunks_a_split + CHUNK_START) + summaries

    best = min({-(-chunks // splits) for splits in range(1, 65)} | set(range(1, min(chunks, 8) + 1)), key=time)
    return EVERY * best, time(best)
