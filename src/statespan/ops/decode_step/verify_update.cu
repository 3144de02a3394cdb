// TOKENS tokens of the recurrence of update.cu, h' = Abar h + Bbar x, y = C h' + D x: it starts from `state`, which stays
// as it is, and keeps the state after each token. Rows, lanes and blocks are update.cu's.
//
// Macros: those of update.cu, and F type of dt, B and C; TOKENS. Without RANK dt is what dt_proj gave, or SSD's.

#include "step.cuh"
#include "recurrence.cuh"

constexpr int THREADS = 32 * WARPS, AT_ONCE = THREADS / SHARED_BY, ROWS = AT_ONCE * TILE;
constexpr int PIECES = (STATES + 4 * SHARED_BY - 1) / (4 * SHARED_BY);  // of 4 states a lane
constexpr int SELECTION = RANK + 2 * STATES, V = 16 / sizeof(W);
constexpr bool VECTORS = STATES % 4 == 0 && RANK % 4 == 0;  // of four numbers of a selection
constexpr int DT_PIECES = RANK ? (RANK + SHARED_BY * V - 1) / (SHARED_BY * V) : 1;

INLINE float limited_step(float dt) {
    dt = softplus(dt);
    return SSD && dt == dt ? fminf(fmaxf(dt, LOW), HIGH) : dt;  // a NaN stays one
}

INLINE float4 four(const float* from) {
    if (VECTORS) return *reinterpret_cast<const float4*>(from);
    return {from[0], from[1], from[2], from[3]};
}

// A lane's part of a row of STATES numbers, before the wait.
INLINE void row_early(float (&to)[4 * PIECES], const float* from, int part) {
#pragma unroll
    for (int q = 0; q < PIECES; q++) {
        int n = (q * SHARED_BY + part) * 4;
        float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
        if (STATES % 4 == 0) {
            if (n < STATES) four = early4(from + n);
        } else {
            if (n < STATES) four.x = early(from + n);
            if (n + 1 < STATES) four.y = early(from + n + 1);
            if (n + 2 < STATES) four.z = early(from + n + 2);
            if (n + 3 < STATES) four.w = early(from + n + 3);
        }
        to[4 * q] = four.x, to[4 * q + 1] = four.y, to[4 * q + 2] = four.z, to[4 * q + 3] = four.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) verify_update(
    const X* x, i64 x_stride, const X* z, i64 z_stride, const F* dt, i64 dt_stride, const F* B, i64 B_stride, const F* C,
    i64 C_stride, const W* __restrict__ dt_proj, const float* __restrict__ dt_scale, const float* __restrict__ dt_bias,
    const P* __restrict__ dt_norm, const P* __restrict__ B_norm, const P* __restrict__ C_norm,
    const float* __restrict__ A_log, const float* __restrict__ D, const float* state, float* states, X* y, i64 y_stride,
    i64 heads, i64 head_size, i64 group_heads, const void* ahead, i64 ahead_bytes) {
    __shared__ __align__(16) float selection[TOKENS][SELECTION];  // dt, B, C
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % SHARED_BY;
    const i64 tiles = (head_size + ROWS - 1) / ROWS, head = blockIdx.x / tiles, batch = blockIdx.y;
    const int first = int(blockIdx.x % tiles) * ROWS + threadIdx.x / SHARED_BY;
    const i64 width = heads * head_size, row = batch * TOKENS, group = head / group_heads;
    float A[TILE][PIECES * 4], h[TILE][PIECES * 4], bias[TILE], skip[TILE];
    uint4 dt_words[TILE][DT_PIECES] = {};
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        const int p = first + i * AT_ONCE;
        const bool there = p < head_size;
        const i64 channel = head * head_size + (there ? p : 0), of = SSD ? head : channel;
        bias[i] = early(dt_bias + of), skip[i] = early(D + of);
        if (SSD)
            A[i][0] = -exp2_(LOG2E * early(A_log + head));
        else
            row_early(A[i], A_log + channel * STATES, part);
        row_early(h[i], state + (batch * width + channel) * STATES, part);
        if (RANK % V == 0) {
#pragma unroll
            for (int q = 0; q < DT_PIECES; q++) {
                int k = (q * SHARED_BY + part) * V;
                if (k < RANK) dt_words[i][q] = early16(dt_proj + channel * RANK + k);
            }
        }
    }
    wait_for_previous();
    bring_ahead(ahead, ahead_bytes);
    float tokens[TILE][TOKENS], gates[TOKENS], steps[TOKENS];  // with a gate TILE is 1, and an SSD block has a head
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            const i64 p = min(i64(first + i * AT_ONCE), head_size - 1), channel = head * head_size + p;
            tokens[i][t] = fresh(x + (row + t) * x_stride + channel);
            if (i == 0) gates[t] = z ? fresh(z + (row + t) * z_stride + channel) : 0.0f;
        }
        steps[t] = RANK ? 0.0f : fresh(dt + (row + t) * dt_stride + (SSD ? head : min(i64(first), head_size - 1)));
    }
#pragma unroll 8
    for (int i = threadIdx.x; i < TOKENS * SELECTION; i += THREADS) {
        int t = i / SELECTION, k = i % SELECTION;
        selection[t][k] = k < RANK            ? fresh(dt + (row + t) * dt_stride + k)
                          : k < RANK + STATES ? fresh(B + (row + t) * B_stride + group * STATES + k - RANK)
                                              : fresh(C + (row + t) * C_stride + group * STATES + k - RANK - STATES);
    }
    __syncthreads();
    if (NORMS) {
        for (int i = warp; i < 3 * TOKENS; i += WARPS) {
            int which = i % 3, from = which == 0 ? 0 : RANK + (which - 1) * STATES, size = which == 0 ? RANK : STATES;
            const P* norm = which == 0 ? dt_norm : which == 1 ? B_norm : C_norm;
            float *values = selection[i / 3] + from, sum = 0.0f;
            for (int k = lane; k < size; k += 32) sum = fmaf(values[k], values[k], sum);
            float factor = rsqrtf(sum_of_warp(sum) / max(size, 1) + EPSILON);
            for (int k = lane; k < size; k += 32) values[k] *= factor * value(norm[k]);
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < TILE; i++) {
        const int p = first + i * AT_ONCE;
        const bool there = p < head_size;
        const i64 channel = head * head_size + (there ? p : 0), of = SSD ? head : channel;
        float weights[DT_PIECES * V];
        if (RANK % V == 0) {
#pragma unroll
            for (int q = 0; q < DT_PIECES; q++) unpack(W{}, dt_words[i][q], weights + q * V);
        } else {
#pragma unroll
            for (int q = 0; q < DT_PIECES * V; q++) {
                int k = (q / V * SHARED_BY + part) * V + q % V;
                weights[q] = k < RANK ? value(dt_proj[channel * RANK + k]) : 0.0f;
            }
        }
        if (!SSD) {
#pragma unroll
            for (int q = 0; q < PIECES * 4; q++) A[i][q] = -exp2_(LOG2E * A[i][q]);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float token = tokens[i][t];
            const float* entering = selection[t] + RANK;
            const float* leaving = entering + STATES;
            float step = 0.0f, out = 0.0f;
            if (RANK) {
#pragma unroll
                for (int q = 0; q < DT_PIECES * V; q += RANK % V ? 1 : 4) {
                    int k = (q / V * SHARED_BY + part) * V + q % V;
                    if (RANK % V == 0 && k < RANK) {
                        float4 w = {weights[q], weights[q + 1], weights[q + 2], weights[q + 3]};
                        step += dot4(w, four(selection[t] + k));
                    } else if (k < RANK) {
                        step = fmaf(weights[q], selection[t][k], step);
                    }
                }
#pragma unroll
                for (int bit = SHARED_BY / 2; bit > 0; bit /= 2) step += __shfl_xor_sync(0xffffffff, step, bit);
                if (dt_scale) step *= dt_scale[channel];
            } else {
                step = steps[t];
            }
            step = limited_step(step + bias[i]);
            Discrete all = {0.0f, 0.0f};
            if (SSD) all = discretize(step, A[i][0]);
            float* to = states + ((t * i64(gridDim.y) + batch) * width + channel) * STATES;
#pragma unroll
            for (int q = 0; q < PIECES; q++) {
                const int n = (q * SHARED_BY + part) * 4;
                float in[4] = {}, leave[4] = {};
                if (STATES % 4 == 0 && n < STATES) {
                    float4 b = four(entering + n), c = four(leaving + n);
                    in[0] = b.x, in[1] = b.y, in[2] = b.z, in[3] = b.w;
                    leave[0] = c.x, leave[1] = c.y, leave[2] = c.z, leave[3] = c.w;
                } else {
#pragma unroll
                    for (int v = 0; v < 4; v++)
                        if (n + v < STATES) in[v] = entering[n + v], leave[v] = leaving[n + v];
                }
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    Discrete now = SSD ? all : discretize(step, A[i][4 * q + v]);
                    h[i][4 * q + v] = fmaf(now.decay, h[i][4 * q + v], now.input * in[v] * token);
                    out = fmaf(h[i][4 * q + v], leave[v], out);
                }
            }
#pragma unroll
            for (int q = 0; q < PIECES; q++) {
                int n = (q * SHARED_BY + part) * 4;
                if (STATES % 4 == 0) {
                    if (there && n < STATES) put4(to + n, {h[i][4 * q], h[i][4 * q + 1], h[i][4 * q + 2], h[i][4 * q + 3]});
                } else {
#pragma unroll
                    for (int v = 0; v < 4; v++)
                        if (there && n + v < STATES) to[n + v] = h[i][4 * q + v];
                }
            }
#pragma unroll
            for (int bit = SHARED_BY / 2; bit > 0; bit /= 2) out += __shfl_xor_sync(0xffffffff, out, bit);
            out = fmaf(skip[i], token, out);
            if (z) out *= silu(gates[t]);
            if (there && part == 0) put(y + (row + t) * y_stride + channel, out);
        }
    }
}
