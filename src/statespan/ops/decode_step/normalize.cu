// RMSNorm of the residual stream for many rows, a block a row: so the next kernel's weights come meanwhile.
// Macros: H of the residual stream, P of the norm, W of y; INPUTS; EPSILON.

#include "step.cuh"

constexpr int THREADS = 256, PIECES = (INPUTS + 4 * THREADS - 1) / (4 * THREADS);
static_assert(INPUTS % 4 == 0);

extern "C" __global__ void __launch_bounds__(THREADS) normalize(
    const H* x, i64 x_stride, const P* __restrict__ weight, W* y, i64 y_stride) {
    float4 values[PIECES], weights[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int k = (i * THREADS + threadIdx.x) * 4;
        weights[i] = k < INPUTS ? early4(weight + k) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    wait_for_previous();
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int k = (i * THREADS + threadIdx.x) * 4;
        values[i] = k < INPUTS ? fresh4(x + blockIdx.x * x_stride + k) : float4{0.0f, 0.0f, 0.0f, 0.0f};
        squares += dot4(values[i], values[i]);
    }
    const float factor = rsqrtf(sum_of_block<THREADS / 32>(squares) / INPUTS + EPSILON);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int k = (i * THREADS + threadIdx.x) * 4;
        if (k >= INPUTS) continue;
        put4(y + blockIdx.x * y_stride + k, times(times(values[i], factor), weights[i]));
    }
}
