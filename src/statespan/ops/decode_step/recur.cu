// One token of Mamba-1's recurrence for many rows, in place, from what x_proj gave: dt_proj, softplus, the states, D, gate.
//
// A block takes 8 rows and 64 channels; a warp multiplies dt for its 8 channels on matrix units. A thread holds 4 of a
// channel's 16 states, of every row, and so loads them all, before it waits for the kernel before it.
//
// Macros: W type of dt_proj, x, z and y, P of the inner norms; RANK, BATCH; NORMS: RMSNorm of dt, B and C, with EPSILON;
// DISCRETIZATION: 0 mamba, 1 zoh, 2 bilinear; AHEAD: blocks that run at once; TILE_ROWS: y lies in tiles of so many rows for
// large.cu, 0: it does not.

#include "step.cuh"
#include "matrix.cuh"
#include "recurrence.cuh"

constexpr int STATES = 16, LANES = 4, ROWS = 8, CHANNELS = 64, THREADS = CHANNELS * LANES, SELECTION = RANK + 2 * STATES;
constexpr int PARTS = (RANK + 31) / 32, PITCH = PARTS * 64 + (PARTS % 2 ? 0 : 64);  // bytes: neighbours in different banks
static_assert(sizeof(W) == 2 && RANK % 8 == 0);

struct Tile { float values[ROWS][8]; };  // of a warp's channels

extern "C" __global__ void __launch_bounds__(THREADS, 3) recur(
    const W* x, i64 x_stride, const W* z, i64 z_stride, const float* selection, i64 selection_stride,
    const W* __restrict__ dt_proj, const float* __restrict__ dt_bias, const P* __restrict__ dt_norm,
    const P* __restrict__ B_norm, const P* __restrict__ C_norm, const float* __restrict__ A_log, const float* __restrict__ D,
    float* state, W* y, i64 y_stride, i64 channels) {
    extern __shared__ float4 memory[];  // dt_proj's rows, then dt's
    __shared__ float4 entering[ROWS][LANES], leaving[ROWS][LANES];  // B and C
    __shared__ Tile steps[8], tokens[8], gates[8];
    const u32 weights = u32(__cvta_generic_to_shared(memory)), dt = weights + CHANNELS * PITCH;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, own = lane / LANES;
    const int first_row = blockIdx.y * ROWS, first = blockIdx.x * CHANNELS;
    const i64 channel = first + warp * 8 + own;

    for (int i = threadIdx.x; i < CHANNELS * PARTS * 4; i += THREADS) {
        int row = i / (PARTS * 4), eighth = i % (PARTS * 4);
        bool there = eighth * 8 < RANK;
        copy16(weights + row * PITCH + eighth * 16, there ? dt_proj + i64(first + row) * RANK + eighth * 8 : dt_proj, there);
    }
    end_of_copies();
    float4* place = reinterpret_cast<float4*>(state) + (first_row * channels + channel) * LANES + part;
    uint4 h[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        h[r] = first_row + r < BATCH ? early16(place + r * channels * LANES) : uint4{0, 0, 0, 0};
    const uint4 rates = early16(A_log + channel * STATES + part * 4);
    const float skip = early(D + channel);
    const int pair_at = warp * 8 + part * 2;  // two of the block's channels
    const float bias[2] = {early(dt_bias + first + pair_at), early(dt_bias + first + pair_at + 1)};
    {   // the states of a later block to L2: memory is idle now
        const i64 block = i64(blockIdx.y) * gridDim.x + blockIdx.x + AHEAD, later_row = block / gridDim.x * ROWS + lane;
        if (AHEAD > 0 && warp == 0 && lane < ROWS && later_row < BATCH)
            bring_to_l2(state + (later_row * channels + block % gridDim.x * CHANNELS) * STATES, CHANNELS * STATES * 4);
    }
    wait_for_previous();

    {   // a warp's row of dt, B and C; and two channels of x and z in the row lane / 4
        const int row = first_row + warp, row_of_pair = first_row + own;
        u32 token = 0, gate = 0;
        if (row_of_pair < BATCH) {
            token = load_word(x + row_of_pair * x_stride + first + pair_at);
            gate = load_word(z + row_of_pair * z_stride + first + pair_at);
        }
        constexpr int PIECES = (SELECTION + 31) / 32;
        float values[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = i * 32 + lane;
            values[i] = row < BATCH && k < SELECTION ? fresh(selection + row * selection_stride + k) : 0.0f;
        }
        float of_dt = 0.0f, of_B = 0.0f, of_C = 0.0f;  // sums of squares, then factors
        if (NORMS) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int k = i * 32 + lane;
                float square = values[i] * values[i];
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
            float now = values[i];
            if (NORMS && k < SELECTION) {
                now *= k < RANK ? of_dt : k < RANK + STATES ? of_B : of_C;
                now *= value(k < RANK ? dt_norm[k] : k < RANK + STATES ? B_norm[k - RANK] : C_norm[k - RANK - STATES]);
            }
            if (k < PARTS * 32) put(reinterpret_cast<W*>(memory) + (CHANNELS + warp) * (PITCH / 2) + k, k < RANK ? now : 0.0f);
            if (k >= RANK && k < RANK + STATES) reinterpret_cast<float*>(entering[warp])[k - RANK] = now;
            if (k >= RANK + STATES && k < SELECTION) reinterpret_cast<float*>(leaving[warp])[k - RANK - STATES] = now;
        }
        tokens[warp].values[own][2 * part] = low(W{}, token), tokens[warp].values[own][2 * part + 1] = high(W{}, token);
        gates[warp].values[own][2 * part] = silu(low(W{}, gate)), gates[warp].values[own][2 * part + 1] = silu(high(W{}, gate));
    }
    wait_for_copies_but<0>();
    __syncthreads();
    {
        float sums[1][4] = {};  // of 16 rows, 8 of which are none
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            uint4 a = load_shared(dt + own * PITCH + i * 64 + part * 16);
            uint4 b[1] = {load_shared(weights + (warp * 8 + own) * PITCH + i * 64 + part * 16)};
            multiply_add_32(W{}, sums, a, uint4{0, 0, 0, 0}, b);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) steps[warp].values[own][2 * part + i] = softplus(sums[0][i] + bias[i]);
    }
    __syncwarp();

    float A[4], out[ROWS];
    const u32 rate_words[4] = {rates.x, rates.y, rates.z, rates.w};
#pragma unroll
    for (int n = 0; n < 4; n++) A[n] = -exp2_(LOG2E * __uint_as_float(rate_words[n])) * (DISCRETIZATION == 0 ? LOG2E : 1.0f);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float step = steps[warp].values[r][own], token = tokens[warp].values[r][own];
        const float4 B = entering[r][part], C = leaving[r][part];
        const float old[4] = {__uint_as_float(h[r].x), __uint_as_float(h[r].y), __uint_as_float(h[r].z), __uint_as_float(h[r].w)};
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
        if (first_row + r < BATCH) place[r * channels * LANES] = {now[0], now[1], now[2], now[3]};
    }
    sum_over_lanes<LANES, 1>(out, part);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = 2 * part + i;
        float sum = fmaf(skip, tokens[warp].values[r][own], out[i]) * gates[warp].values[r][own];
        W* to = y + (first_row + r) * y_stride + channel;
        if constexpr (TILE_ROWS > 0) {
            const i64 tile = first_row / TILE_ROWS * gridDim.x + blockIdx.x;
            to = y + tile * (TILE_ROWS * CHANNELS) + (first_row % TILE_ROWS + r) * CHANNELS + (warp ^ r) * 8 + own;
        }
        if (first_row + r < BATCH) put(to, sum);
    }
}
