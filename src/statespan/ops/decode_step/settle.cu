// The residual stream with the sums that out_proj's blocks left, and its RMSNorm as tiles for large.cu, a block a row.
// The next kernel begins at once: in_proj reads only weights and windows before its wait. The epoch, for recur.cu, goes up.
//
// Macros: H of the residual stream, P of the norm, W of y; INPUTS; BATCH; ROWS of a tile; SPLIT sums; NORMED; EPSILON.

#include "step.cuh"

constexpr int THREADS = INPUTS / 4 < 1024 ? (INPUTS / 4 + 31) / 32 * 32 : 1024;
constexpr int PIECES = (INPUTS / 4 + THREADS - 1) / THREADS;  // of 4 places, of a thread
static_assert(INPUTS % 64 == 0);

extern "C" __global__ void __launch_bounds__(THREADS) settle(
    H* x, i64 x_stride, const float* sums, const P* __restrict__ weight, W* y, u32* epoch) {
    let_next_begin();
    const int row = blockIdx.x;
    float4 values[PIECES], weights[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int k = (i * THREADS + threadIdx.x) * 4;
        weights[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (NORMED && k < INPUTS) weights[i] = early4(weight + k);
        // Written long ago, but for the first block. Behind the weights that in_proj orders it would take long.
        if (SPLIT && k < INPUTS) values[i] = fresh4(x + row * x_stride + k);
    }
    wait_without_letting_begin();
    if (row == 0 && threadIdx.x == 0) *epoch = load_word(epoch) + 1;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int k = (i * THREADS + threadIdx.x) * 4;
        if (k >= INPUTS) {
            values[i] = {0.0f, 0.0f, 0.0f, 0.0f};
            continue;
        }
        float4 more[SPLIT ? SPLIT : 1];
#pragma unroll
        for (int s = 0; s < SPLIT; s++) more[s] = fresh4(sums + (i64(s) * BATCH + row) * INPUTS + k);
        if (!SPLIT) values[i] = fresh4(x + row * x_stride + k);
#pragma unroll
        for (int s = 1; s < SPLIT; s++) more[0] = plus(more[0], more[s]);
        if (SPLIT) {
            values[i] = plus(values[i], more[0]);
            put4(x + row * x_stride + k, values[i]);
        }
        squares += dot4(values[i], values[i]);
    }
    if (!NORMED) return;
    const float factor = rsqrtf(sum_of_block<THREADS / 32>(squares) / INPUTS + EPSILON);
    W* tiles = y + i64(row / ROWS) * (ROWS * INPUTS) + row % ROWS * 64;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int k = (i * THREADS + threadIdx.x) * 4, eighth = k % 64 / 8 ^ row % 8;
        if (k < INPUTS) put4(tiles + k / 64 * (ROWS * 64) + eighth * 8 + k % 8, times(times(values[i], factor), weights[i]));
    }
}
