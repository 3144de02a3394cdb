// The causal conv and SiLU of TOKENS tokens of every row, in place: x becomes y. The window after each token is kept.
// Macros: X type of x, S of the window, P of weights and bias; TAPS, TOKENS.

#include "step.cuh"

// As a later step reads it from the window.
INLINE float kept(float x) {
    S there;
    put(&there, x);
    return value(there);
}

extern "C" __global__ void __launch_bounds__(128) verify_conv(
    X* x, i64 x_stride, const S* window, S* windows, const P* __restrict__ weight, const P* __restrict__ bias,
    i64 channels) {
    i64 channel = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;
    bool there = channel < channels;
    float taps[TAPS], offset = there && bias ? value(bias[channel]) : 0.0f;
#pragma unroll
    for (int t = 0; t < TAPS; t++) taps[t] = there ? value(weight[channel * TAPS + t]) : 0.0f;
    wait_for_previous();
    if (!there) return;
    x += row * TOKENS * x_stride + channel;
    window += row * (TAPS - 1) * channels + channel;
    float now[TOKENS], before[TAPS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) now[i] = fresh(x + i * x_stride);
#pragma unroll
    for (int t = 0; t + 1 < TAPS; t++) before[t] = fresh(window + t * channels);
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float sum = fmaf(taps[TAPS - 1], now[i], offset);
#pragma unroll
        for (int t = 0; t + 1 < TAPS; t++) sum = fmaf(taps[t], before[t], sum);
        put(x + i * x_stride, silu(sum));
        before[TAPS - 1] = kept(now[i]);
        S* to = windows + (i64(i) * gridDim.y + row) * (TAPS - 1) * channels + channel;
#pragma unroll
        for (int t = 0; t + 1 < TAPS; t++) before[t] = before[t + 1], put(to + t * channels, before[t]);
    }
}
