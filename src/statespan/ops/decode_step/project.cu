// y = W x for a few rows of x: what x is made of, the product, and what becomes of y, in one kernel.
//
// A warp takes J output rows at a time, 16 bytes of each a lane, with the next DEPTH - 1 such items on their way. x lies
// in shared memory as float32, in the order in which lanes read it. Sums over lanes are taken once a row.
//
// Macros: W type of the weights, H of the residual stream, P of norms and conv, Q of the bias, S of the conv's state;
// INPUTS, BATCH (rows of x), J, DEPTH (of the ring), WARPS of a block, SPLIT (warps that share a row);
// INPUT: 0 float32, 1 RMSNorm of the residual stream, 2 y silu(z) and its norm, in groups of GROUP (0: no norm);
// OUTPUT: 0 stored, 1 conv and SiLU of some rows, 2 added to the residual stream, 3 act(gate) * up, 4 act;
// TAPS; ACTIVATION: 0 SiLU, 1 ReLU, 2 GELU; EPSILON; NORM_FIRST: RMSNorm(y) silu(z).
// EXPERTS: 0 none; 1: block row y is one choice, of batch row y / CHOICES; 2: it is a batch row and sums CHOICES.

#include "step.cuh"

constexpr int THREADS = 32 * WARPS, V = 16 / sizeof(W), SPAN = 32 * V;
constexpr int CHUNKS = (INPUTS + SPAN - 1) / SPAN, PADDED = CHUNKS * SPAN;  // of an input row; zeros behind INPUTS
constexpr int SUMMED = EXPERTS == 2 ? CHOICES : 1, STEPS = (CHUNKS * SUMMED + SPLIT - 1) / SPLIT;
constexpr int AT_A_TIME = PADDED <= 4 * THREADS ? 1 : PADDED <= 8 * THREADS ? 2 : 4;  // of 4 values of x that a thread brings
constexpr int ROWS = EXPERTS ? 1 : BATCH;
constexpr int COUNT = J * (ROWS <= 2 ? ROWS : ROWS <= 4 ? 4 : 8), SHARE = 32 / COUNT;  // sums, and lanes that end with the same one
static_assert(COUNT <= 32 && ROWS <= 8 && WARPS % SPLIT == 0 && INPUTS % V == 0);
constexpr int GROUPS = INPUT == 2 && GROUP ? INPUTS / (GROUP ? GROUP : 1) : 1;
constexpr bool NORMED = INPUT == 1 || (INPUT == 2 && GROUP);

// Where element k of x is: a lane's V neighbours in pieces of 4, each piece beside those of the other lanes.
INLINE int place(int k) { return k / SPAN * SPAN + k % V / 4 * 128 + k % SPAN / V * 4 + k % 4; }

INLINE float activation(float x) {
    if (ACTIVATION == 0) return silu(x);
    if (ACTIVATION == 1) return x < 0.0f ? 0.0f : x;  // a NaN stays one
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

extern "C" __global__ void __launch_bounds__(THREADS) project(
    const W* __restrict__ weight, const float* __restrict__ scale, const Q* __restrict__ bias, const void* x_, i64 x_stride,
    const float* z, i64 z_stride, const P* __restrict__ norm, void* y_, i64 y_stride, i64 outputs_, S* conv_state,
    const P* __restrict__ conv_weight, const P* __restrict__ conv_bias, i64 conv_start, i64 conv_size, const int* chosen,
    const float* expert_weight, const void* ahead, i64 ahead_bytes) {
    extern __shared__ float4 memory[];
    float* xs = reinterpret_cast<float*>(memory);  // [SUMMED or ROWS][PADDED]
    __shared__ float warp_sums[WARPS][ROWS];
    __shared__ float parts[SPLIT > 1 ? WARPS : 1][COUNT];
    __shared__ float group_factors[GROUPS > 1 ? ROWS * GROUPS : 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % SPLIT, outputs = int(outputs_);
    const int made = OUTPUT == 3 ? outputs / 2 : outputs;  // values of y
    constexpr int TILE = OUTPUT == 3 ? J / 2 : J, AT_ONCE = WARPS / SPLIT * TILE;
    const int first_made = (blockIdx.x * (WARPS / SPLIT) + warp / SPLIT) * TILE, stride = gridDim.x * AT_ONCE;
    const int rounds = (made - int(blockIdx.x) * AT_ONCE + stride - 1) / stride, items = rounds * STEPS;

    auto row_of = [&](int first, int j) { return OUTPUT == 3 ? first + j / 2 + j % 2 * made : first + j; };
    // The weights come through a ring of DEPTH items, J x 16 bytes a lane each, which only the lane itself touches.
    const W* base[SUMMED];
    i64 expert[SUMMED] = {};
    const u32 ring = u32(__cvta_generic_to_shared(memory + ROWS * SUMMED * PADDED / 4)) + threadIdx.x * 16;
    int to_fetch = 0, fetch_step = 0, fetch_first = first_made;
    auto fetch = [&]() {
        if (to_fetch < items) {
            int chunk = fetch_step * SPLIT + part, choice = SUMMED > 1 ? chunk / CHUNKS : 0;
            int k = (SUMMED > 1 ? chunk % CHUNKS : chunk) * SPAN + lane * V;
            bool there = chunk < CHUNKS * SUMMED && k < INPUTS;
            const W* from = base[0];
#pragma unroll
            for (int i = 1; i < SUMMED; i++)
                if (choice == i) from = base[i];
#pragma unroll
            for (int j = 0; j < J; j++) {
                bool row_there = there && fetch_first + (OUTPUT == 3 ? j / 2 : j) < made;
                const W* here = row_there ? from + i64(row_of(fetch_first, j)) * INPUTS + k : weight;
                copy16(ring + (to_fetch % DEPTH * J + j) * THREADS * 16, here, row_there);
            }
            to_fetch++;
            if (++fetch_step == STEPS) fetch_step = 0, fetch_first += stride;
        }
        end_of_copies();
    };

    base[0] = weight;
    if (!EXPERTS) {
#pragma unroll
        for (int i = 0; i < DEPTH - 1; i++) fetch();
    }
    wait_for_previous();
    bring_ahead(ahead, ahead_bytes);
    if (EXPERTS) {
#pragma unroll
        for (int i = 0; i < SUMMED; i++) {
            expert[i] = int(load_word(chosen + blockIdx.y * SUMMED + i));
            base[i] = weight + expert[i] * outputs * INPUTS;
        }
#pragma unroll
        for (int i = 0; i < DEPTH - 1; i++) fetch();
    }

    // x, to shared memory
    float squares[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        squares[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < SUMMED; i++) {
            i64 row = EXPERTS == 2 ? blockIdx.y * SUMMED + i : EXPERTS == 1 ? blockIdx.y / CHOICES : r;
            float* to = xs + (r * SUMMED + i) * PADDED;
            float mix = EXPERTS == 2 ? fresh(expert_weight + row) : 1.0f;
            for (int start = 4 * threadIdx.x; start < PADDED; start += 4 * THREADS * AT_A_TIME) {
                float4 x[AT_A_TIME], gate[AT_A_TIME];
#pragma unroll
                for (int n = 0; n < AT_A_TIME; n++) {
                    int k = start + n * 4 * THREADS;
                    x[n] = gate[n] = {0.0f, 0.0f, 0.0f, 0.0f};
                    if (k < INPUTS) {
                        if (INPUT == 1)
                            x[n] = fresh4(static_cast<const H*>(x_) + row * x_stride + k);
                        else
                            x[n] = fresh4(static_cast<const float*>(x_) + row * x_stride + k);
                        if (INPUT == 2) gate[n] = fresh4(z + row * z_stride + k);
                    }
                }
#pragma unroll
                for (int n = 0; n < AT_A_TIME; n++) {
                    int k = start + n * 4 * THREADS;
                    float4 counted = x[n], made_of = x[n];
                    if (INPUT == 2) {
                        float4 g = gate[n];
                        made_of = times(x[n], float4{silu(g.x), silu(g.y), silu(g.z), silu(g.w)});
                        if (!NORM_FIRST) counted = made_of;
                        if (GROUPS > 1) made_of = counted;
                    }
                    if (NORMED) squares[r] += dot4(counted, counted);
                    if (NORMED && GROUPS == 1 && k < INPUTS) made_of = times(made_of, value4(norm + k));
                    if (EXPERTS == 2) made_of = times(made_of, mix);
                    if (k < PADDED) *reinterpret_cast<float4*>(to + place(k)) = made_of;
                }
            }
        }
        if (NORMED && GROUPS == 1) {
            squares[r] = sum_of_warp(squares[r]);
            if (lane == 0) warp_sums[warp][r] = squares[r];
        }
    }
    __syncthreads();
    if constexpr (GROUPS > 1) {  // each group has a factor of its own
        for (int g = warp; g < ROWS * GROUPS; g += WARPS) {
            float sum = 0.0f;
            for (int k = lane; k < GROUP; k += 32) {
                float x = xs[g / GROUPS * PADDED + place(g % GROUPS * GROUP + k)];
                sum = fmaf(x, x, sum);
            }
            sum = sum_of_warp(sum);
            if (lane == 0) group_factors[g] = rsqrtf(sum / GROUP + EPSILON);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * INPUTS; i += THREADS) {
            int r = i / INPUTS, k = i % INPUTS;
            float factor = group_factors[r * GROUPS + k / (GROUP ? GROUP : 1)] * value(norm[k]);
            if (NORM_FIRST) factor *= silu(fresh(z + r * z_stride + k));
            xs[r * PADDED + place(k)] *= factor;
        }
        __syncthreads();
    }

    const int index = lane / SHARE, my_j = index % J, my_r = index / J;
    float factor = 1.0f;
    if (NORMED && GROUPS == 1 && my_r < ROWS) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += warp_sums[i][my_r];
        factor = rsqrtf(sum / INPUTS + EPSILON);
    }

    int item = 0;
    for (int round = 0, first = first_made; round < rounds; round++, first += stride) {
        const int row = row_of(first, my_j), out = OUTPUT == 3 ? first + my_j / 2 : row;
        const bool mine = lane % SHARE == 0 && my_r < ROWS && out < made && part == 0 && (OUTPUT != 3 || my_j % 2 == 0);
        // What the end needs, on its way while the weights come.
        const int channel = row - int(conv_start);
        const bool convolved = OUTPUT == 1 && mine && channel >= 0 && channel < conv_size;
        float window[TAPS], taps[TAPS], conv_offset = 0.0f, before = 0.0f, factor_here = factor, offset = 0.0f;
        S* state = conv_state + (i64(my_r) * (TAPS - 1) * conv_size + channel);
        if (convolved) {
#pragma unroll
            for (int t = 0; t < TAPS; t++) taps[t] = value(conv_weight[i64(channel) * TAPS + t]);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) window[t] = fresh(state + t * conv_size);
            if (conv_bias) conv_offset = value(conv_bias[channel]);
        }
        const i64 y_row = EXPERTS ? blockIdx.y : my_r;
        if (OUTPUT == 2 && mine) before = fresh(static_cast<const H*>(y_) + y_row * y_stride + out);
        if (lane % SHARE == 0 && my_r < ROWS && out < made) {
            if (scale && SUMMED == 1) factor_here *= scale[expert[0] * outputs + row];
            if (bias) {
#pragma unroll
                for (int i = 0; i < SUMMED; i++) {
                    float b = value(bias[expert[i] * outputs + row]);
                    offset += EXPERTS == 2 ? b * fresh(expert_weight + blockIdx.y * SUMMED + i) : b;
                }
            }
        }

        float sums[COUNT] = {};
#pragma unroll 2
        for (int step = 0; step < STEPS; step++, item++) {
            wait_for_copies_but<DEPTH - 2>();
            int chunk = step * SPLIT + part;
            if (chunk < CHUNKS * SUMMED) {
                float w[J][V];
#pragma unroll
                for (int j = 0; j < J; j++) unpack(W{}, load_shared(ring + (item % DEPTH * J + j) * THREADS * 16), w[j]);
                if (SUMMED > 1 && scale) {
                    int choice = chunk / CHUNKS;
                    i64 e = expert[0];
#pragma unroll
                    for (int i = 1; i < SUMMED; i++)
                        if (choice == i) e = expert[i];
#pragma unroll
                    for (int j = 0; j < J; j++) {
                        float s = row_of(first, j) < outputs ? scale[e * outputs + row_of(first, j)] : 0.0f;
#pragma unroll
                        for (int v = 0; v < V; v++) w[j][v] *= s;
                    }
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
#pragma unroll
                    for (int q = 0; q < V / 4; q++) {
                        float4 x = *reinterpret_cast<const float4*>(xs + r * PADDED + chunk * SPAN + q * 128 + lane * 4);
#pragma unroll
                        for (int j = 0; j < J; j++) {
                            float sum = sums[r * J + j];
                            sum = fmaf(w[j][4 * q], x.x, sum), sum = fmaf(w[j][4 * q + 1], x.y, sum);
                            sums[r * J + j] = fmaf(w[j][4 * q + 2], x.z, fmaf(w[j][4 * q + 3], x.w, sum));
                        }
                    }
                }
            }
            fetch();
        }
        sum_over_lanes<32, 1>(sums, lane);
        float sum = sums[0];
        if constexpr (SPLIT > 1) {
            if (lane % SHARE == 0) parts[warp][index] = sum;
            __syncthreads();
            sum = 0.0f;
#pragma unroll
            for (int i = 0; i < SPLIT; i++) sum += parts[warp / SPLIT * SPLIT + i][index];
            __syncthreads();
        }
        sum = fmaf(sum, factor_here, offset);
        if (OUTPUT == 3) {
            float up = __shfl_xor_sync(0xffffffff, sum, SHARE);
            sum = activation(sum) * up;
        } else if (OUTPUT == 4) {
            sum = activation(sum);
        }
        if (convolved) {
            float raw = sum;
            sum = fmaf(taps[TAPS - 1], raw, conv_offset);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) sum = fmaf(taps[t], window[t], sum);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) put(state + t * conv_size, t + 2 < TAPS ? window[t + 1] : raw);
            sum = silu(sum);
        }
        if (mine) {
            if (OUTPUT == 2)
                put(static_cast<H*>(y_) + y_row * y_stride + out, before + sum);
            else
                static_cast<float*>(y_)[y_row * y_stride + out] = sum;
        }
    }
}
