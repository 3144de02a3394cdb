// One token of the recurrence h' = Abar h + Bbar x, y = C h' + D x, in place, for rows of STATES states: the channels of
// Mamba-1, or the places of a head of Mamba-2. SHARED_BY lanes share a row. A block takes ROWS rows of one head and batch row.
//
// Macros: X type of what comes from projections and of y; W type of dt_proj, P of the inner norms; STATES, SHARED_BY, TILE
// (rows a lane group takes), WARPS; SSD: dt and A belong to a head; RANK: of dt_proj, 0: dt comes as it is (always with
// SSD); NORMS: RMSNorm of dt, B and C, with EPSILON; DISCRETIZATION: 0 mamba, 1 zoh, 2 bilinear; LOW, HIGH: limits of dt.

#include "step.cuh"
#include "recurrence.cuh"

constexpr int THREADS = 32 * WARPS, AT_ONCE = THREADS / SHARED_BY, ROWS = AT_ONCE * TILE;
constexpr int PIECES = (STATES + 4 * SHARED_BY - 1) / (4 * SHARED_BY);  // of 4 states a lane
constexpr int SELECTION = RANK + 2 * STATES, V = 16 / sizeof(W);
constexpr int DT_PIECES = RANK ? (RANK + SHARED_BY * V - 1) / (SHARED_BY * V) : 1;
constexpr bool VECTORS = STATES % 4 == 0;

// A lane's part of a row of STATES numbers, before the wait.
INLINE void row_early(float (&to)[4 * PIECES], const float* from, int part, bool there) {
#pragma unroll
    for (int q = 0; q < PIECES; q++) {
        int n = (q * SHARED_BY + part) * 4;
        uint4 four = {0, 0, 0, 0};
        if (VECTORS) {
            if (there && n < STATES) four = early16(from + n);
        } else if (there) {
            if (n < STATES) four.x = __float_as_uint(early(from + n));
            if (n + 1 < STATES) four.y = __float_as_uint(early(from + n + 1));
            if (n + 2 < STATES) four.z = __float_as_uint(early(from + n + 2));
            if (n + 3 < STATES) four.w = __float_as_uint(early(from + n + 3));
        }
        to[4 * q] = __uint_as_float(four.x), to[4 * q + 1] = __uint_as_float(four.y);
        to[4 * q + 2] = __uint_as_float(four.z), to[4 * q + 3] = __uint_as_float(four.w);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) update(
    const X* x, i64 x_stride, const X* z, i64 z_stride, const X* dt, i64 dt_stride, const X* B, i64 B_stride, const X* C,
    i64 C_stride, const W* __restrict__ dt_proj, const float* __restrict__ dt_scale, const float* __restrict__ dt_bias,
    const P* __restrict__ dt_norm, const P* __restrict__ B_norm, const P* __restrict__ C_norm,
    const float* __restrict__ A_log, const float* __restrict__ D, float* state, X* y, i64 y_stride, i64 heads,
    i64 head_size, i64 group_heads, const void* ahead, i64 ahead_bytes) {
    __shared__ float selection[SELECTION];  // dt, B, C
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % SHARED_BY;
    const i64 tiles = (head_size + ROWS - 1) / ROWS, head = blockIdx.x / tiles, batch = blockIdx.y;
    const int first = int(blockIdx.x % tiles) * ROWS + threadIdx.x / SHARED_BY;
    const i64 width = heads * head_size;

    float A[TILE][PIECES * 4], h[TILE][PIECES * 4], bias[TILE], skip[TILE];
    uint4 dt_words[TILE][DT_PIECES] = {};
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        int p = first + i * AT_ONCE;
        i64 channel = head * head_size + p, of = SSD ? head : channel;
        bool there = p < head_size;
        bias[i] = there ? early(dt_bias + of) : 0.0f, skip[i] = there ? early(D + of) : 0.0f;
        if (SSD) {
            A[i][0] = early(A_log + head);
        } else {
            row_early(A[i], A_log + channel * STATES, part, there);
        }
        row_early(h[i], state + (batch * width + channel) * STATES, part, there);
        if (RANK % V == 0) {
#pragma unroll
            for (int q = 0; q < DT_PIECES; q++) {
                int k = (q * SHARED_BY + part) * V;
                if (there && k < RANK) dt_words[i][q] = early16(dt_proj + channel * RANK + k);
            }
        }
    }
    wait_for_previous();
    bring_ahead(ahead, ahead_bytes);
    float token[TILE], gate[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        int p = first + i * AT_ONCE;
        i64 channel = head * head_size + p;
        token[i] = p < head_size ? fresh(x + batch * x_stride + channel) : 0.0f;
        gate[i] = z && p < head_size ? fresh(z + batch * z_stride + channel) : 0.0f;
    }
    const i64 group = head / group_heads;
    for (int i = threadIdx.x; i < SELECTION; i += THREADS)
        selection[i] = i < RANK           ? fresh(dt + batch * dt_stride + i)
                       : i < RANK + STATES ? fresh(B + batch * B_stride + group * STATES + i - RANK)
                                           : fresh(C + batch * C_stride + group * STATES + i - RANK - STATES);
    __syncthreads();
    if (NORMS) {
        if (warp < 3) {
            int from = warp == 0 ? 0 : RANK + (warp - 1) * STATES, size = warp == 0 ? RANK : STATES;
            const P* norm = warp == 0 ? dt_norm : warp == 1 ? B_norm : C_norm;
            float sum = 0.0f;
            for (int i = lane; i < size; i += 32) sum = fmaf(selection[from + i], selection[from + i], sum);
            float factor = rsqrtf(sum_of_warp(sum) / max(size, 1) + EPSILON);
            for (int i = lane; i < size; i += 32) selection[from + i] *= factor * value(norm[i]);
        }
        __syncthreads();
    }

    const float* leaving = selection + RANK + STATES;
    const float* entering = selection + RANK;
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        int p = first + i * AT_ONCE;
        i64 channel = head * head_size + p;
        bool there = p < head_size;
        float step = 0.0f;
        if (RANK) {
            const W* row = dt_proj + (there ? channel : 0) * RANK;
            if (RANK % V == 0) {
#pragma unroll
                for (int q = 0; q < DT_PIECES; q++) {
                    int k = (q * SHARED_BY + part) * V;
                    float w[V];
                    unpack(W{}, dt_words[i][q], w);
#pragma unroll
                    for (int v = 0; v < V; v++)
                        if (k < RANK) step = fmaf(w[v], selection[k + v], step);
                }
            } else {
                for (int k = part; k < RANK; k += SHARED_BY) step = fmaf(value(row[k]), selection[k], step);
            }
#pragma unroll
            for (int bit = SHARED_BY / 2; bit > 0; bit /= 2) step += __shfl_xor_sync(0xffffffff, step, bit);
            if (dt_scale && there) step *= dt_scale[channel];
        } else if (there) {
            step = fresh(dt + batch * dt_stride + (SSD ? head : channel));
        }
        step = softplus(step + bias[i]);
        if (SSD && step == step) step = fminf(fmaxf(step, LOW), HIGH);  // a NaN stays one
        Discrete all = {0.0f, 0.0f};
        if (SSD) all = discretize(step, -exp2_(LOG2E * A[i][0]));
        float out = 0.0f;
#pragma unroll
        for (int q = 0; q < PIECES * 4; q++) {
            int n = (q / 4 * SHARED_BY + part) * 4 + q % 4;
            if (n < STATES) {
                Discrete now = SSD ? all : discretize(step, -exp2_(LOG2E * A[i][q]));
                h[i][q] = fmaf(now.decay, h[i][q], now.input * entering[n] * token[i]);
                out = fmaf(h[i][q], leaving[n], out);
            }
        }
        float* to = state + ((batch * width + channel) * STATES);
#pragma unroll
        for (int q = 0; q < PIECES; q++) {
            int n = (q * SHARED_BY + part) * 4;
            if (VECTORS) {
                if (there && n < STATES)
                    *reinterpret_cast<float4*>(to + n) = {h[i][4 * q], h[i][4 * q + 1], h[i][4 * q + 2], h[i][4 * q + 3]};
            } else {
#pragma unroll
                for (int v = 0; v < 4; v++)
                    if (there && n + v < STATES) to[n + v] = h[i][4 * q + v];
            }
        }
#pragma unroll
        for (int bit = SHARED_BY / 2; bit > 0; bit /= 2) out += __shfl_xor_sync(0xffffffff, out, bit);
        out = fmaf(skip[i], token[i], out);
        if (z) out *= silu(gate[i]);
        if (there && part == 0) put(y + batch * y_stride + channel, out);
    }
}
