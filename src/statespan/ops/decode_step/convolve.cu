// One token of the causal conv and SiLU for every row, in place: x becomes y, and the window moves on.
// Macros: X type of x, S of the window, P of weights and bias; TAPS.

#include "step.cuh"

extern "C" __global__ void __launch_bounds__(128) convolve(
    X* x, i64 x_stride, S* window, const P* __restrict__ weight, const P* __restrict__ bias, i64 channels) {
    i64 channel = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;
    bool there = channel < channels;
    float taps[TAPS], sum = there && bias ? value(bias[channel]) : 0.0f;
#pragma unroll
    for (int t = 0; t < TAPS; t++) taps[t] = there ? value(weight[channel * TAPS + t]) : 0.0f;
    wait_for_previous();
    if (!there) return;
    float now = fresh(x + row * x_stride + channel), before[TAPS];
    window += row * (TAPS - 1) * channels + channel;
#pragma unroll
    for (int t = 0; t + 1 < TAPS; t++) before[t] = fresh(window + t * channels);
    before[TAPS - 1] = now;
#pragma unroll
    for (int t = 0; t < TAPS; t++) sum = fmaf(taps[t], before[t], sum);
#pragma unroll
    for (int t = 0; t + 1 < TAPS; t++) put(window + t * channels, before[t + 1]);
    put(x + row * x_stride + channel, silu(sum));
}
