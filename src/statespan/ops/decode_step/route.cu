// The experts of each row: RMSNorm of the residual stream, the router's logits, the CHOICES largest and their scores.
// A block is a row. Macros: H of the residual stream, P of the norm, R of the router; INPUTS, EXPERTS of experts, CHOICES,
// WARPS; SIGMOID: scores are sigmoids; RENORMALIZE: they sum to 1; EPSILON.

#include "step.cuh"

constexpr int THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS) route(
    const H* hidden, i64 hidden_stride, const P* __restrict__ norm, const R* __restrict__ router,
    const R* __restrict__ router_bias, int* chosen, float* expert_weight) {
    extern __shared__ float4 memory[];
    float* x = reinterpret_cast<float*>(memory);  // [INPUTS], then the logits [EXPERTS]
    float* logits = x + INPUTS;
    wait_for_previous();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 row = blockIdx.x;
    float square = 0.0f;
    for (int k = threadIdx.x; k < INPUTS; k += THREADS) {
        float value_here = fresh(hidden + row * hidden_stride + k);
        square = fmaf(value_here, value_here, square);
        x[k] = value_here * value(norm[k]);
    }
    const float factor = rsqrtf(sum_of_block<WARPS>(square) / INPUTS + EPSILON);  // with it x is there
    for (int e = warp; e < EXPERTS; e += WARPS) {
        float logit = 0.0f;
#pragma unroll 8
        for (int k = lane; k < INPUTS; k += 32) logit = fmaf(value(router[i64(e) * INPUTS + k]), x[k], logit);
        logit = sum_of_warp(logit);
        if (lane == 0) logits[e] = fmaf(logit, factor, router_bias ? value(router_bias[e]) : 0.0f);
    }
    __syncthreads();
    if (warp) return;
    float largest = -__int_as_float(0x7f800000), total = 0.0f;
    for (int e = lane; e < EXPERTS; e += 32) largest = fmaxf(largest, logits[e]);
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, bit));
    for (int e = lane; e < EXPERTS; e += 32) total += exp2_(LOG2E * (logits[e] - largest));
    total = SIGMOID ? 1.0f : sum_of_warp(total);
    float scores[CHOICES], kept = 0.0f;
#pragma unroll
    for (int k = 0; k < CHOICES; k++) {
        float best = -__int_as_float(0x7f800000);
        int place = EXPERTS;
        for (int e = lane; e < EXPERTS; e += 32)
            if (logits[e] > best || place == EXPERTS) best = logits[e], place = e;
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) {
            float other = __shfl_xor_sync(0xffffffff, best, bit);
            int its = __shfl_xor_sync(0xffffffff, place, bit);
            if (its < EXPERTS && (place == EXPERTS || other > best || (other == best && its < place))) best = other, place = its;
        }
        scores[k] = SIGMOID ? sigmoid(best) : exp2_(LOG2E * (best - largest)) / total;
        kept += scores[k];
        if (lane == 0) chosen[row * CHOICES + k] = place;
        if (lane == place % 32) logits[place] = -3.4e38f;  // which no other lane reads
    }
#pragma unroll
    for (int k = 0; k < CHOICES; k++)
        if (lane == 0) expert_weight[row * CHOICES + k] = RENORMALIZE ? scores[k] / kept : scores[k];
}
