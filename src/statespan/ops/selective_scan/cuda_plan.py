"""How the selective scan is divided on an NVIDIA GPU, and the launches of its kernels, made once for a layout."""

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.cuda_kernels import Kernel, Launch, scalar_type
from statespan.ops.gpu import multiprocessors, shared_memory

EVERY = 64  # tokens; the backward keeps the state before each EVERY-th token and computes the others again
PIECE = 8  # tokens whose states the backward holds in registers
THREADS = 128
DEPTH = 2  # chunks that are on their way while the forward walks one


class Form(NamedTuple):
    """How a block of the forward is made, see forward.cu."""

    states: int  # of a walking thread
    tile: int  # channels of a block
    staging: int  # threads that bring and write
    tokens: int  # of a chunk
    ahead: bool
    resident: int  # blocks that a multiprocessor is to hold
    clocks: tuple[int, int] = (0, 0)  # of a token on a multiprocessor with some blocks: of each, and of any; on an H100
    vector: int = 8  # channels that a thread brings at once
    apart: bool = False  # whether those that bring have a scheduler to themselves

    def threads(self, padded: int) -> int:
        """Of a block, for so many states, padded to a power of two."""
        walking = self.tile * padded // self.states
        return 128 * max(self.staging // 32, walking // 96) if self.apart else self.staging + walking


# By states, padded to a power of two.
FORMS = {
    8: (
        Form(4, 64, 128, 16, True, 3, (48, 62)),
        Form(4, 32, 128, 32, True, 4, (28, 34)),
        Form(1, 16, 128, 64, True, 3, (21, 9)),
    ),
    16: (
        Form(8, 64, 128, 16, True, 2, (86, 36)),
        Form(4, 32, 128, 32, True, 2, (48, 18)),
        Form(4, 16, 64, 32, True, 4, (22, 40)),
        Form(2, 40, 160, 64, True, 1, (96, 0)),
        Form(2, 16, 128, 64, True, 1, (36, 0)),
        Form(2, 12, 192, 64, True, 1, (35, 0), vector=4, apart=True),
    ),
    32: (Form(8, 32, 64, 16, False, 4),),
    64: (Form(8, 32, 64, 16, False, 2),),
    128: (Form(8, 16, 64, 16, False, 2),),
}
# Where splits of the tokens fill a multiprocessor, with their summaries: clocks of a token for each 64 channels.
FORMS_OF_SPLITS = {8: (Form(4, 64, 128, 16, False, 3), 142), 16: (Form(8, 32, 64, 16, False, 4), 215)}
# For inputs that are not plain: of 32 bits, unaligned, or with a discretization that takes more registers.
FORMS_OF_OTHERS = {
    8: (Form(4, 32, 64, 16, False, 2),),
    16: (Form(4, 16, 64, 16, False, 2),),
    32: (Form(4, 16, 64, 16, False, 2),),
    64: (Form(8, 16, 64, 8, False, 1),),
    128: (Form(8, 8, 64, 8, False, 1),),
}


class BackwardForm(NamedTuple):
    """How a block of the backward is made, see backward.cu."""

    roles: bool  # whether some threads bring and write, and others walk
    resident: int  # blocks that a multiprocessor is to hold
    decays: int  # tokens of a piece whose decays stay in registers
    chunk: float  # what a chunk costs where they fill it, next to the first of these
    start: float = 0.3  # what a block costs before its first chunk, in chunks


IN_TURN = BackwardForm(False, 3, 0, 1.0)
WITH_DECAYS = BackwardForm(False, 2, PIECE, 0.745)
ROLES = BackwardForm(True, 2, PIECE - 1, 0.62, 2.2)
# What the summaries of the splits cost, of the backward's main kernel.
SUMMARY_SHARE = 0.21

_HERE = Path(__file__).parent
_forward = Kernel(_HERE / "forward.cu", "scan_forward")
_summary = Kernel(_HERE / "summary.cu", "scan_summary")
_chain = Kernel(_HERE / "summary.cu", "scan_chain")
# By whether a block has roles: handing over registers is an instruction of Hopper's own.
_backward = {roles: Kernel(_HERE / "backward.cu", "scan_backward", own_instructions=roles) for roles in (False, True)}
_sums = {roles: Kernel(_HERE / "backward.cu", "scan_sums", own_instructions=roles) for roles in (False, True)}


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
    chained: bool  # whether a split waits for what the one behind it passes on


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
        self.segments = layout.segments
        self.inputs: dict[str, str | int] = {
            **{"U": scalar_type(u), "DT": scalar_type(dt), "Z": scalar_type(z or u)},
            **{"BM": scalar_type(B), "CM": scalar_type(C), "STATES": self.states, "PADDED": self.padded},
            **{"ALIGNED": int(aligned), "HAS_Z": int(z is not None), "SOFTPLUS": int(layout.dt_softplus)},
            **{"SEGMENTS": int(layout.segments), "DISCRETIZATION": DISCRETIZATIONS[layout.discretization], "APART": 0},
        }
        self.forms = (FORMS if self.plain else FORMS_OF_OTHERS)[self.padded]
        self._forward: dict[bool, tuple[Launch, int]] = {}
        self._chain: dict[tuple[int, bool], tuple[Launch, Launch]] = {}
        self._backward: Backward | None = None

    def tiles(self, channels: int) -> int:
        """How many blocks of that many channels there are; a block's channels are of one group."""
        return self.groups * -(-(self.channels // self.groups) // channels)

    def summary_macros(self, states: int, **more: str | int) -> tuple[tuple[str, str | int], ...]:
        """What the summary of the splits is compiled with, for so many states a thread."""
        lanes = self.padded // states
        tokens = min(8 * lanes, (512 if self.wide else 2048) // self.padded, 64)
        blocks = 3 if not self.plain else 5 if states == 8 and self.padded <= 32 else 4
        sizes = {"STATES_A_THREAD": states, "THREADS": THREADS, "TOKENS": max(tokens, 4), "BLOCKS": blocks}
        return tuple({**self.inputs, **sizes, **more}.items())

    def forward_macros(self, form: Form, keep_starts: bool) -> tuple[tuple[str, str | int], ...]:
        """What the forward is compiled with."""
        sizes = {
            **{"STATES_A_THREAD": form.states, "THREADS": form.staging, "TOKENS": form.tokens, "TILE": form.tile},
            **{"VECTOR": form.vector, "AHEAD": int(form.ahead), "DEPTH": DEPTH, "BLOCKS": form.resident},
            **{"BLOCK": form.threads(self.padded), "APART": int(form.apart)},
            **{"EVERY": EVERY if keep_starts else 0, "SHARED_BYTES": self.shared_bytes(form)},
        }
        return tuple({**self.inputs, **sizes}.items())

    def shared_bytes(self, form: Form) -> int:
        """The size of `Shared` in forward.cu."""
        tile, tokens, near = form.tile, form.tokens, 32 * form.states // self.padded
        unit = min(max(near, 4), 8)
        steps = 8 * (tile + (4 if tile == 32 else 2 if tile < 32 else 0))
        sums = 4 * (tile if tile // unit % 2 else tile + unit)
        chunk = tokens * (steps + 4 * (2 * self.padded + 4) + sums)
        u, z, dt, B, C = (4 if self.inputs[name] == "float" else 2 for name in ("U", "Z", "DT", "BM", "CM"))
        ring = tokens * (tile * u + 1) + z * (tokens * tile if self.inputs["HAS_Z"] else form.vector)
        ahead = tokens * (tile * dt + self.padded * (B + C))
        count = 2 * chunk + 8 * tile + (DEPTH + 3) * ring + (DEPTH + 1) * ahead
        return -(-count // 16) * 16

    def forward(self, keep_starts: bool) -> tuple[Launch, int]:
        """The launch, and tokens a split."""
        if keep_starts not in self._forward:
            form, split = self.forward_plan()
            grid = (self.tiles(form.tile), self.batch, -(-self.length // split))
            macros = self.forward_macros(form, keep_starts)
            launch = _forward.launch(self.device, grid, form.threads(self.padded), macros, self.shared_bytes(form))
            self._forward[keep_starts] = launch, split
        return self._forward[keep_starts]

    def forward_plan(self) -> tuple[Form, int]:
        """How a block is made, and tokens a split: what is soonest done.

        Fewer states a thread make more threads of as many channels, at some cost; splits of the tokens make still
        more, and need their summaries first.
        """
        processors = multiprocessors(self.device)

        def clocks(form: Form) -> float:
            blocks = -(-self.tiles(form.tile) * self.batch // processors)
            of_each, of_any = form.clocks
            return of_each * blocks + of_any * -(-blocks // form.resident)

        whole = -(-self.length // EVERY) * EVERY
        room = shared_memory(self.device)
        form = min((form for form in self.forms if self.shared_bytes(form) <= room), key=clocks)
        form_of_splits, clocks_split = FORMS_OF_SPLITS.get(self.padded if self.plain else 0, (form, 0))
        blocks = max(self.tiles(64 if clocks_split else form.tile) * self.batch, 1)
        splits = min((8 if clocks_split else 4) * processors // blocks, whole // (4 * EVERY))
        if splits < 4 or clocks_split * blocks / processors > clocks(form):
            return form, whole
        return form_of_splits, -(-whole // splits // EVERY) * EVERY

    def chain(self, split: int, reverse: bool) -> tuple[Launch, Launch]:
        """The launches that find what each split does to the state, and what each is given."""
        if (split, reverse) not in self._chain:
            states, splits = min(8, self.padded // 2), -(-self.length // split)
            macros = self.summary_macros(states, REVERSE=int(reverse), MM=self.inputs["CM" if reverse else "BM"])
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
            tile = self.backward_tile()
            tiles_a_block = max(1, 64 // tile)  # narrow tiles take turns, so that `of_matrices` stays small
            blocks = -(-(self.tiles(tile) // self.groups) // tiles_a_block)
            form, split, chained = self.backward_plan(blocks * self.groups * self.batch)
            splits = -(-self.length // split)
            sums = 2 * self.batch * self.length * self.groups * self.states + self.channels * (self.states + 2)
            of_sums = -(-sums // (THREADS * (4 if self.inputs["ALIGNED"] else 1)))
            grid, threads = (self.groups * blocks, self.batch, splits), THREADS * (1 + form.roles)
            macros, shared_bytes = (*self.backward_macros(form), ("CHAINED", int(chained))), self.backward_bytes(form)
            self._backward = Backward(
                _backward[form.roles].launch(self.device, grid, threads, macros, shared_bytes),
                _sums[form.roles].launch(self.device, (of_sums, 1, 1), THREADS, macros),
                *(blocks, tiles_a_block, split, splits, chained),
            )
        return self._backward

    def backward_plan(self, number: int) -> tuple[BackwardForm, int, bool]:
        """How a block is made, tokens a split, and whether splits wait for each other, for so many blocks a split."""
        processors, chunks = multiprocessors(self.device), -(-self.length // EVERY)
        form, chained = IN_TURN if self.plain and self.padded <= 16 else IN_TURN._replace(resident=2), False
        split, time = _backward_split(number, chunks, processors, form)
        if number > form.resident * processors and self.padded < 128:
            waiting = _chained_split(number, chunks, form.resident * processors)
            if waiting[1] < time:
                (split, time), chained = waiting, True
        if self.plain and self.padded == 16 and not self.segments:
            if hands_over_registers(self.device):
                others = _backward_split(number, chunks, processors, ROLES)
                if others[1] < time:
                    return ROLES, others[0], False
            elif 1 < number / processors <= 2 and WITH_DECAYS.chunk * (chunks + WITH_DECAYS.start) < time:
                return WITH_DECAYS, EVERY * chunks, False
        return form, split, chained

    def backward_tile(self) -> int:
        """Channels of a block at once."""
        return 2 * THREADS * min(4, self.padded // 4) // self.padded

    def backward_macros(self, form: BackwardForm) -> tuple[tuple[str, str | int], ...]:
        """What the backward is compiled with."""
        sizes = {
            **{"STATES_A_THREAD": min(4, self.padded // 4), "THREADS": THREADS, "PIECE": PIECE, "EVERY": EVERY},
            **{"ROLES": int(form.roles), "BLOCKS": form.resident},
            **{"DECAYS": form.decays, "SHARED_BYTES": self.backward_bytes(form)},
        }
        return tuple({**self.inputs, **sizes}.items())

    def backward_bytes(self, form: BackwardForm) -> int:
        """The size of `Shared` in backward.cu, or a few bytes more."""
        padded, tile, states = self.padded, self.backward_tile(), min(4, self.padded // 4)
        near = 32 * states // padded
        pitch = tile + (2 * near if near > 1 else 4)
        steps = 16 * (tile + (4 if tile == 32 else 2 if tile < 32 else 0))
        rows = min(near, states) * (PIECE * (2 * padded + 4) + 8)
        of_warps = THREADS // 32 * PIECE * 2 * padded
        piece = PIECE * (steps + 4 * tile + 12 * pitch) + 4 * (rows + of_warps) + 64
        kept = 4 * EVERY // PIECE * 2 * states * THREADS
        u, z, dt, B, C = (4 if self.inputs[name] == "float" else 2 for name in ("U", "Z", "DT", "BM", "CM"))
        brought = PIECE * (tile * (2 * u + z + dt) + padded * (B + C))
        pieces, ring = (2, 5) if form.roles else (1, 2)
        count = pieces * piece + kept + 8 * tile * (PIECE + 1) + ring * brought
        return -(-count // 16) * 16


@lru_cache(maxsize=1024)
def scan_of(layout: Layout) -> Scan:
    """The division of the work, made once for a layout."""
    return Scan(layout)


def hands_over_registers(device: torch.device) -> bool:
    """Whether ROLES can run: Hopper has the instruction, and shared memory for two blocks."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _backward_split(blocks: int, chunks: int, processors: int, form: BackwardForm) -> tuple[int, float]:
    """Tokens a split, and its time: what is soonest done by `form.resident` blocks a multiprocessor, with summaries."""
    room = form.resident * processors

    def time(chunks_a_split: int) -> float:  # of a multiprocessor, in chunks
        splits = -(-chunks // chunks_a_split)
        waves = max(1.0, (blocks * splits / room + 2 * -(-blocks * splits // room)) / 3)  # late blocks run faster alone
        summaries = SUMMARY_SHARE * blocks * chunks / room if splits > 1 else 0
        return form.chunk * (waves * (chunks_a_split + form.start) + summaries)

    best = min({-(-chunks // splits) for splits in range(1, 65)} | set(range(1, min(chunks, 8) + 1)), key=time)
    return EVERY * best, time(best)


@cache
def _chained_split(blocks: int, chunks: int, room: int) -> tuple[int, float]:
    """As _backward_split, where splits of more tiles than there is room for wait for each other."""

    def time(chunks_a_split: int) -> float:
        return (blocks * -(-chunks // chunks_a_split) / room + 0.5) * (chunks_a_split + IN_TURN.start)

    best = min(range(1, chunks + 1), key=time)
    return EVERY * best, time(best)
