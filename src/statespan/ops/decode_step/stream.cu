// y = W x for 2 to 8 rows of x, as project.cu, on matrix units: 16 rows of W at a time against 8 of x.
//
// A group of SPLIT warps shares 16 output rows, each warp a part of the inputs; the groups of all blocks take turns. x lies
// in shared memory in two parts of 16 bits, its rounded values and what rounding left, so that nearly nothing is lost.
//
// Macros: W type of the weights, H of the residual stream, P of norms and conv, Q of the bias, S of the conv's state;
// INPUTS, BATCH (rows of x); WARPS of a block, SPLIT, AHEAD (steps of a warp whose weights are on their way); INPUT, OUTPUT,
// TAPS, ACTIVATION, EPSILON, NORM_FIRST as in project.cu, GROUP: 0 or all inputs. With OUTPUT 3 a tile is 8 gates and the 8
// values that they let pass.

#include "step.cuh"
#include "matrix.cuh"

constexpr int THREADS = 32 * WARPS, GROUPS_OF_WARPS = WARPS / SPLIT;
constexpr int CHUNKS = (INPUTS + 31) / 32, PADDED = CHUNKS * 32;
constexpr int PITCH = 2 * PADDED + (CHUNKS % 2 ? 0 : 64);  // bytes of a row of x: neighbours in different banks
constexpr int STEPS = (CHUNKS + SPLIT - 1) / SPLIT;  // of 32 inputs, that a warp takes of a tile
constexpr int A_ROW = WARPS / BATCH, PIECES = (PADDED / 4 + 32 * A_ROW - 1) / (32 * A_ROW);  // of 4 values of x a lane
constexpr int AT_ONCE = INPUT == 2 ? 4 : 7;
constexpr bool NORMED = INPUT == 1 || (INPUT == 2 && GROUP);
constexpr int MADE = OUTPUT == 3 ? 8 : 16;  // values of y of a tile
static_assert(sizeof(W) == 2 && INPUTS % 8 == 0 && BATCH <= 8 && WARPS % SPLIT == 0 && SPLIT >= 4 && STEPS % AHEAD == 0);

INLINE float activation(float x) {
    if (ACTIVATION == 0) return silu(x);
    if (ACTIVATION == 1) return x < 0.0f ? 0.0f : x;  // a NaN stays one
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

extern "C" __global__ void __launch_bounds__(THREADS) stream(
    const W* __restrict__ weight, const Q* __restrict__ bias, const void* x_, i64 x_stride, const float* z, i64 z_stride,
    const P* __restrict__ norm, void* y_, i64 y_stride, i64 outputs_, S* conv_state, const P* __restrict__ conv_weight,
    const P* __restrict__ conv_bias, i64 conv_start, i64 conv_size, const void* ahead, i64 ahead_bytes) {
    extern __shared__ float4 memory[];
    using Sums = float[GROUPS_OF_WARPS][SPLIT][8][17];
    Sums* both_sums = reinterpret_cast<Sums*>(reinterpret_cast<char*>(memory) + 2 * BATCH * PITCH);  // of two rounds in turn
    __shared__ float squares[WARPS], factors[BATCH];
    const u32 xs = u32(__cvta_generic_to_shared(memory));  // [2][BATCH] rows
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % SPLIT, group = warp / SPLIT;
    const int outputs = int(outputs_), made = OUTPUT == 3 ? outputs / 2 : outputs, tiles = (made + MADE - 1) / MADE;
    const int own = lane / 4, piece = lane % 4 * 8;

    // The weights of the next AHEAD steps, row own and row own + 8 of a tile.
    uint4 top[AHEAD], bottom[AHEAD];
    auto row_at = [&](int tile, int i) { return OUTPUT == 3 ? tile * 8 + i % 8 + i / 8 * made : tile * 16 + i; };
    auto fetch = [&](int slot, int tile, int step) {
        const int k = (step * SPLIT + part) * 32 + piece;
        const bool there = tile < tiles && step < STEPS && k < INPUTS;
        const int made_at = tile * MADE + own;
        top[slot] = bottom[slot] = uint4{0, 0, 0, 0};
        if (there && made_at < made) top[slot] = early16(weight + i64(row_at(tile, own)) * INPUTS + k);
        if (there && (OUTPUT == 3 ? made_at < made : made_at + 8 < made))
            bottom[slot] = early16(weight + i64(row_at(tile, own + 8)) * INPUTS + k);
    };
    const int first_tile = blockIdx.x * GROUPS_OF_WARPS + group, stride = gridDim.x * GROUPS_OF_WARPS;
    int next_tile = first_tile, next_step = 0;
    auto fetch_next = [&](int slot) {
        fetch(slot, next_tile, next_step);
        if (++next_step == STEPS) next_step = 0, next_tile += stride;
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch_next(i);
    wait_for_previous();
    bring_ahead(ahead, ahead_bytes);

    // x, to shared memory: some warps a row
    const int r = warp / A_ROW, first_piece = warp % A_ROW * 32 + lane;
    float square = 0.0f;
    for (int start = 0; start < PIECES && r < BATCH; start += AT_ONCE) {
        float4 x[AT_ONCE], gate[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int k = 4 * (first_piece + (start + n) * 32 * A_ROW);
            x[n] = gate[n] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (start + n >= PIECES || k >= INPUTS) continue;
            x[n] = INPUT == 1 ? fresh4(static_cast<const H*>(x_) + r * x_stride + k)
                              : fresh4(static_cast<const float*>(x_) + r * x_stride + k);
            if (INPUT == 2) gate[n] = fresh4(z + r * z_stride + k);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int k = 4 * (first_piece + (start + n) * 32 * A_ROW);
            if (start + n >= PIECES || k >= PADDED) continue;
            float4 counted = x[n], made_of = x[n], g = gate[n];
            if (INPUT == 2) {
                made_of = times(x[n], float4{silu(g.x), silu(g.y), silu(g.z), silu(g.w)});
                if (!NORM_FIRST) counted = made_of;
            }
            if (NORMED) square += dot4(counted, counted);
            if (NORMED && k < INPUTS) made_of = times(made_of, value4(norm + k));
            const u32 first = pair(W{}, made_of.x, made_of.y), second = pair(W{}, made_of.z, made_of.w);
            char* to = reinterpret_cast<char*>(memory) + r * PITCH + 2 * k;
            *reinterpret_cast<uint2*>(to) = {first, second};
            *reinterpret_cast<uint2*>(to + BATCH * PITCH) = {
                pair(W{}, made_of.x - low(W{}, first), made_of.y - high(W{}, first)),
                pair(W{}, made_of.z - low(W{}, second), made_of.w - high(W{}, second))};
        }
    }
    if (NORMED) {
        square = sum_of_warp(square);
        if (lane == 0) squares[warp] = square;
        __syncthreads();
        if (threadIdx.x < BATCH) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < A_ROW; i++) sum += squares[threadIdx.x * A_ROW + i];
            factors[threadIdx.x] = rsqrtf(sum / INPUTS + EPSILON);
        }
    }
    __syncthreads();

    const int rounds = (tiles + stride - 1) / stride;
    for (int round = 0; round < rounds; round++) {
        const int tile = first_tile + round * stride;
        // What the end needs, on its way while the weights come.
        const int thread = part * 32 + lane, y_row = thread / MADE, i = thread % MADE, out = tile * MADE + i;
        const bool mine = y_row < BATCH && tile < tiles && out < made;
        const int channel = out - int(conv_start);
        const bool convolved = OUTPUT == 1 && mine && channel >= 0 && channel < conv_size;
        float window[TAPS], taps[TAPS], conv_offset = 0.0f, before = 0.0f, offset = 0.0f, up_offset = 0.0f;
        S* state = conv_state + (i64(y_row) * (TAPS - 1) * conv_size + channel);
        H* to = static_cast<H*>(y_) + y_row * y_stride + out;
        if (convolved) {
#pragma unroll
            for (int t = 0; t < TAPS; t++) taps[t] = value(conv_weight[i64(channel) * TAPS + t]);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) window[t] = fresh(state + t * conv_size);
            if (conv_bias) conv_offset = value(conv_bias[channel]);
        }
        if (OUTPUT == 2 && mine) before = fresh(to);
        if (bias && mine) offset = value(bias[row_at(tile, i)]), up_offset = OUTPUT == 3 ? value(bias[row_at(tile, i + 8)]) : 0.0f;

        float c[2][4] = {};
        const u32 row = xs + min(own, BATCH - 1) * PITCH + 2 * piece;
#pragma unroll 1
        for (int start = 0; start < STEPS; start += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int chunk = min((start + i) * SPLIT + part, CHUNKS - 1);  // behind the end weights are zero
                uint4 x[2] = {load_shared(row + chunk * 64), load_shared(row + BATCH * PITCH + chunk * 64)};
                multiply_add_32(W{}, c, top[i], bottom[i], x);
                fetch_next(i);
            }
        }
        // A lane has rows own and own + 8 of the tile, of two rows of x each.
        auto& sums = both_sums[round % 2];
#pragma unroll
        for (int j = 0; j < 4; j++) sums[group][part][lane % 4 * 2 + j % 2][own + j / 2 * 8] = c[0][j] + c[1][j];
        __syncthreads();
        if (!mine) continue;
        auto result = [&](int j) {
            float sum = 0.0f;
#pragma unroll
            for (int p = 0; p < SPLIT; p++) sum += sums[group][p][y_row][j];
            return NORMED ? sum * factors[y_row] : sum;
        };
        float sum = result(i) + offset;
        if (OUTPUT == 3) sum = activation(sum) * (result(i + 8) + up_offset);
        if (OUTPUT == 4) sum = activation(sum);
        if (convolved) {
            float raw = sum;
            sum = fmaf(taps[TAPS - 1], raw, conv_offset);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) sum = fmaf(taps[t], window[t], sum);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) put(state + t * conv_size, t + 2 < TAPS ? window[t + 1] : raw);
            sum = silu(sum);
        }
        if (OUTPUT == 2)
            put(to, before + sum);
        else
            static_cast<float*>(y_)[y_row * y_stride + out] = sum;
    }
}
