// One token of Mamba-1's recurrence for many rows, in place, from what x_proj gave: dt_proj, softplus, the states, D, gate.
//
// A block takes GROUPS of 8 rows, and 64 channels; a warp multiplies dt for its 8 channels on matrix units. A thread has 4
// of a channel's 16 states, of every row: the first group's in registers, the second's in shared memory, where they are
// before it waits for the kernel before it.
//
// Macros: W type of dt_proj, x, z and y, P of the inner norms; RANK, BATCH; NORMS: RMSNorm of dt, B and C, with EPSILON;
// DISCRETIZATION: 0 mamba, 1 zoh, 2 bilinear; AHEAD: blocks that run at once; TILE_ROWS: y lies in tiles of so many rows for
// large.cu, 0: it does not; SUMS and REDUCERS, see selection.cuh, SUMS 0: x_proj's outputs are there; ONCE.

#include "step.cuh"
#include "matrix.cuh"
#include "recurrence.cuh"
#include "states.cuh"
#include "published.cuh"

constexpr int STATES = 16, LANES = 4, ROWS = 8, CHANNELS = 64, THREADS = CHANNELS * LANES, SELECTION = RANK + 2 * STATES;
constexpr int BLOCK_ROWS = ROWS * GROUPS;
constexpr int PARTS = (RANK + 31) / 32, PITCH = PARTS * 64 + (PARTS % 2 ? 0 : 64);  // bytes: neighbours in different banks
static_assert(sizeof(W) == 2 && RANK % 8 == 0);

struct Tile { float values[ROWS][8]; };  // of a warp's channels
struct Memory {  // shared; behind it dt_proj's rows, then dt's, then the states of the second group
    float4 entering[BLOCK_ROWS][LANES], leaving[BLOCK_ROWS][LANES];  // B and C
    Tile steps[GROUPS][8], tokens[GROUPS][8], gates[GROUPS][8];
};

#include "selection.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 3) recur(
    const W* x, i64 x_stride, const W* z, i64 z_stride, const float* selection, i64 selection_stride,
    const W* __restrict__ dt_proj, const float* __restrict__ dt_bias, const P* __restrict__ dt_norm,
    const P* __restrict__ B_norm, const P* __restrict__ C_norm, const float* __restrict__ A_log, const float* __restrict__ D,
    float* state, W* y, i64 y_stride, i64 channels, uint2* told, const u32* epochs) {
    extern __shared__ float4 dynamic[];
    Memory& memory = *reinterpret_cast<Memory*>(dynamic);
    const u32 weights = u32(__cvta_generic_to_shared(&memory + 1)), dt = weights + CHANNELS * PITCH;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, own = lane / LANES;
    const int first_row = blockIdx.y * BLOCK_ROWS, first = blockIdx.x * CHANNELS;
    const i64 channel = first + warp * 8 + own;

    for (int i = threadIdx.x; i < CHANNELS * PARTS * 4; i += THREADS) {
        int row = i / (PARTS * 4), eighth = i % (PARTS * 4);
        bool there = eighth * 8 < RANK;
        copy16(weights + row * PITCH + eighth * 16, there ? dt_proj + i64(first + row) * RANK + eighth * 8 : dt_proj, there);
    }
    float4* place = reinterpret_cast<float4*>(state) + (first_row * channels + channel) * LANES + part;
    const u32 later = dt + BLOCK_ROWS * PITCH + threadIdx.x * 16;
    u64 once = 0;
    if (ONCE) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
#pragma unroll
    for (int r = ROWS; r < BLOCK_ROWS; r++)
        copy_state(later + (r - ROWS) * THREADS * 16, place + (first_row + r < BATCH ? r * channels * LANES : 0),
                   first_row + r < BATCH, once);
    end_of_copies();
    uint4 h[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        h[r] = first_row + r < BATCH ? early_state(place + r * channels * LANES) : uint4{0, 0, 0, 0};
    const u32 epoch = SUMS ? load_word(epochs) : 0;
    const uint4 rates = early16(A_log + channel * STATES + part * 4);
    const float skip = early(D + channel);
    const int pair_at = warp * 8 + part * 2;  // two of the block's channels
    const float bias[2] = {early(dt_bias + first + pair_at), early(dt_bias + first + pair_at + 1)};
    {   // the states of a later block to L2: memory is idle now
        const i64 block = i64(blockIdx.y) * gridDim.x + blockIdx.x + AHEAD, later_row = block / gridDim.x * BLOCK_ROWS + lane;
        if (AHEAD > 0 && warp == 0 && lane < BLOCK_ROWS && later_row < BATCH)
            bring_to_l2(state + (later_row * channels + block % gridDim.x * CHANNELS) * STATES, CHANNELS * STATES * 4);
    }
    wait_for_previous();

    if (SUMS) add_up(selection, reinterpret_cast<float*>(memory.steps), told, epoch);
    u32 token[GROUPS], gate[GROUPS];  // two channels of x and z in the row lane / 4
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const i64 row = first_row + g * ROWS + own;
        token[g] = row < BATCH ? load_word(x + row * x_stride + first + pair_at) : 0;
        gate[g] = row < BATCH ? load_word(z + row * z_stride + first + pair_at) : 0;
    }
    constexpr int PIECES = (SELECTION + 31) / 32;
    float values[GROUPS][PIECES] = {};
    if (SUMS) gather(values, told, epoch, first_row + warp, lane);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {  // a warp's row of dt, B and C
        const int row = first_row + g * ROWS + warp;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = i * 32 + lane;
            if (!SUMS && row < BATCH && k < SELECTION) values[g][i] = fresh(selection + row * selection_stride + k);
        }
        float of_dt = 0.0f, of_B = 0.0f, of_C = 0.0f;  // sums of squares, then factors
        if (NORMS) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int k = i * 32 + lane;
                float square = values[g][i] * values[g][i];
                of_dt += k < RANK ? square : 0.0f;
                of_B += k >= RANK && k < RANK + STATES ? square : 0.0f;
                of_C += k >= RANK + STATES ? square : 0.0f;
            }
            of_dt = rsqrtf(sum_of_warp(of_dt) / RANK + EPSILON);
            of_B = rsqrtf(sum_of_warp(of_B) / STATES + EPSILON);
            of_C = rsqrtf(sum_of_warp(of_C) / STATES + EPSILON);
        }
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = i * 32 + lane;
            float now = values[g][i];
            if (NORMS && k < SELECTION) {
                now *= k < RANK ? of_dt : k < RANK + STATES ? of_B : of_C;
                now *= value(k < RANK ? dt_norm[k] : k < RANK + STATES ? B_norm[k - RANK] : C_norm[k - RANK - STATES]);
            }
            if (k < PARTS * 32) put(reinterpret_cast<W*>(&memory + 1) + (CHANNELS + g * ROWS + warp) * (PITCH / 2) + k, k < RANK ? now : 0.0f);
            if (k >= RANK && k < RANK + STATES) reinterpret_cast<float*>(memory.entering[g * ROWS + warp])[k - RANK] = now;
            if (k >= RANK + STATES && k < SELECTION) reinterpret_cast<float*>(memory.leaving[g * ROWS + warp])[k - RANK - STATES] = now;
        }
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float2* tokens = reinterpret_cast<float2*>(memory.tokens[g][warp].values[own]);
        float2* gates = reinterpret_cast<float2*>(memory.gates[g][warp].values[own]);
        tokens[part] = {low(W{}, token[g]), high(W{}, token[g])};
        gates[part] = {silu(low(W{}, gate[g])), silu(high(W{}, gate[g]))};
    }
    wait_for_copies_but<0>();
    __syncthreads();
    {
        float sums[1][4] = {};  // of 16 rows
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            uint4 a = load_shared(dt + own * PITCH + i * 64 + part * 16);
            uint4 b[1] = {load_shared(weights + (warp * 8 + own) * PITCH + i * 64 + part * 16)};
            uint4 below = GROUPS > 1 ? load_shared(dt + (ROWS + own) * PITCH + i * 64 + part * 16) : uint4{0, 0, 0, 0};
            multiply_add_32(W{}, sums, a, below, b);
        }
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) memory.steps[i / 2][warp].values[own][2 * part + i % 2] = softplus(sums[0][i] + bias[i % 2]);
    }
    __syncwarp();

    float A[4];
    const u32 rate_words[4] = {rates.x, rates.y, rates.z, rates.w};
#pragma unroll
    for (int n = 0; n < 4; n++) A[n] = -exp2_(LOG2E * __uint_as_float(rate_words[n])) * (DISCRETIZATION == 0 ? LOG2E : 1.0f);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float out[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float step = memory.steps[g][warp].values[r][own], token = memory.tokens[g][warp].values[r][own];
            const float4 B = memory.entering[g * ROWS + r][part], C = memory.leaving[g * ROWS + r][part];
            const uint4 word = g == 0 ? h[r] : load_shared(later + r * THREADS * 16);
            const float old[4] = {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z), __uint_as_float(word.w)};
            const float in[4] = {B.x, B.y, B.z, B.w};
            float now[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                Discrete d = {0.0f, step};
                if (DISCRETIZATION == 0)
                    d.decay = exp2_(step * A[n]);
                else
                    d = discretize(step, A[n]);
                now[n] = fmaf(d.decay, old[n], d.input * token * in[n]);
            }
            out[r] = dot4(float4{now[0], now[1], now[2], now[3]}, C);
            if (first_row + g * ROWS + r < BATCH) store_state(place + (g * ROWS + r) * channels * LANES, {now[0], now[1], now[2], now[3]});
        }
        sum_over_lanes<LANES, 1>(out, part);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = 2 * part + i, row = first_row + g * ROWS + r;
            float sum = fmaf(skip, memory.tokens[g][warp].values[r][own], out[i]) * memory.gates[g][warp].values[r][own];
            W* to = y + row * y_stride + channel;
            if constexpr (TILE_ROWS > 0) {
                const i64 tile = row / TILE_ROWS * gridDim.x + blockIdx.x;
                to = y + tile * (TILE_ROWS * CHANNELS) + row % TILE_ROWS * CHANNELS + (warp ^ r) * 8 + own;
            }
            if (row < BATCH) put(to, sum);
        }
    }
}
