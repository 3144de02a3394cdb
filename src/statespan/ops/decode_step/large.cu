// y = W x for many rows of x on Hopper's matrix units, for products whose weights take longer to read than to multiply.
//
// A block takes TILE outputs, and one part of SPLIT of the inputs. One thread has weights and x brought through a ring of
// STAGES, 64 inputs at a time; the weights of the first stages before it waits for the kernel before, PACE at a time: more
// on the way would only be a queue before the memory, for others too. x lies in tiles of [ROWS][64] as matrix units read
// them, see wgmma.cuh.
//
// Macros: W type of weights and x; INPUTS, TILE, ROWS, BATCH, SPLIT, STAGES, PACE; SHARES: groups of warps that share the
// outputs; OUTPUT: 0 float32 sums [SPLIT][BATCH][outputs], 1 W, and conv and SiLU of the first `channels`, in place, with
// SELECTED sums a row over a block's channels for x_proj; S type of the conv's state, P of its weights; TAPS.

#include "step.cuh"
#include "barrier.cuh"
#include "wgmma.cuh"
#include "matrix.cuh"

constexpr int ROW_WARPS = ROWS / 16, WARPS = ROW_WARPS * SHARES, THREADS = 32 * WARPS + 32, PART = 64, STEPS = INPUTS / PART;
constexpr int WORKERS = 32 * WARPS, SHARE = TILE / SHARES, PITCH = TILE + 8;
constexpr int EIGHTHS = TILE / 8, EACH = (ROWS * EIGHTHS + WORKERS - 1) / WORKERS;
constexpr int W_BYTES = TILE * PART * 2, X_BYTES = ROWS * PART * 2, STAGE = W_BYTES + X_BYTES;
static_assert(INPUTS % PART == 0 && SHARE % 8 == 0 && sizeof(W) == 2);

#include "x_proj.cuh"

struct Memory {
    alignas(1024) char stages[STAGES][STAGE];
    u64 weights_there[STAGES], x_there[STAGES], empty[STAGES];
    alignas(16) float taps[TAPS + 1][TILE];  // and the bias
};
static_assert(ROWS * PITCH * 4 + (SELECTED ? (ROWS + SELECTED) * LINE : 0) <= sizeof(Memory::stages));

INLINE void wait_for_workers() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }
template <class T> INLINE uint4 packed(T type, const float (&x)[8]) {
    return {pair(type, x[0], x[1]), pair(type, x[2], x[3]), pair(type, x[4], x[5]), pair(type, x[6], x[7])};
}

extern "C" __global__ void __launch_bounds__(THREADS) large(
    const void* map, const W* x, void* y_, i64 outputs_, S* windows, const P* __restrict__ conv_weight,
    const P* __restrict__ conv_bias, i64 channels_, const W* x_proj, float* selected) {
    extern __shared__ float4 dynamic[];
    Memory& memory = *reinterpret_cast<Memory*>((reinterpret_cast<size_t>(dynamic) + 1023) / 1024 * 1024);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = int(outputs_), channels = int(channels_);
    const int first = blockIdx.x / SPLIT * TILE, part = blockIdx.x % SPLIT;
    const int begin = part * STEPS / SPLIT, steps = (part + 1) * STEPS / SPLIT - begin;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            set_barrier(memory.weights_there + i, 1), set_barrier(memory.x_there + i, 1);
            set_barrier(memory.empty + i, WARPS);
        }
        barriers_are_set();
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane > 0) return;
        u64 once;  // a cache policy: weights are not to push out of L2 what kernels tell each other
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        auto bring_weights = [&](int step, int pace) {
            const int slot = step % STAGES;
            if (step >= pace) wait_for(memory.weights_there + (step - pace) % STAGES, (step - pace) / STAGES & 1);
            arrive_with(memory.weights_there + slot, W_BYTES);
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
                         ::"r"(shared_place(memory.stages[slot])), "l"(map), "r"((begin + step) * PART), "r"(first),
                         "r"(shared_place(memory.weights_there + slot)), "l"(once) : "memory");
        };
        auto bring_x = [&](int step) {
            const int slot = step % STAGES;
            const W* tile = x + (i64(blockIdx.y) * STEPS + begin + step) * (ROWS * PART);
            arrive_with(memory.x_there + slot, X_BYTES);
            copy_bulk(shared_place(memory.stages[slot] + W_BYTES), tile, X_BYTES, memory.x_there + slot);
        };
        asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
        const int early = min(steps, STAGES);
        for (int step = 0; step < early; step++) bring_weights(step, PACE);
        wait_for_previous();
        for (int step = 0; step < early; step++) bring_x(step);
        for (int step = STAGES; step < steps; step++) {
            wait_for(memory.empty + step % STAGES, step / STAGES + 1 & 1);
            bring_weights(step, steps), bring_x(step);
        }
        return;
    }

    const bool convolves = OUTPUT == 1 && first < channels;
    uint4 window[EACH][OUTPUT == 1 && TAPS > 1 ? TAPS - 1 : 1];  // of 8 channels of a row each
    if (convolves) {
        bring_selectors(x_proj, first, channels);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int unit = i * WORKERS + threadIdx.x, o = first + unit % EIGHTHS * 8;
            const i64 row = blockIdx.y * ROWS + unit / EIGHTHS;
            const bool there = unit < ROWS * EIGHTHS && row < BATCH && o < channels;
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++)
                window[i][t] = there ? early16(windows + (row * (TAPS - 1) + t) * channels + o) : uint4{0, 0, 0, 0};
        }
        for (int i = threadIdx.x; i < TILE * TAPS; i += WORKERS)
            memory.taps[i % TAPS][i / TAPS] = first + i / TAPS < channels ? value(conv_weight[first * TAPS + i]) : 0.0f;
        for (int i = threadIdx.x; i < TILE; i += WORKERS)
            memory.taps[TAPS][i] = conv_bias && first + i < channels ? value(conv_bias[first + i]) : 0.0f;
    }
    const int row_warp = warp % ROW_WARPS, share = warp / ROW_WARPS;
    float sums[SHARE / 2] = {};
    for (int step = 0; step < steps; step++) {
        const int slot = step % STAGES;
        wait_for(memory.weights_there + slot, step / STAGES & 1), wait_for(memory.x_there + slot, step / STAGES & 1);
        const u64 weights = descriptor(shared_place(memory.stages[slot] + share * SHARE * 2 * PART));
        const u64 rows = descriptor(shared_place(memory.stages[slot] + W_BYTES + row_warp / 4 * 64 * 2 * PART));
        begin_products();
#pragma unroll
        for (int k = 0; k < PART / 16; k++) multiply_async(W{}, sums, rows + 2 * k, weights + 2 * k);
        end_of_products();
        if (step == 0) continue;
        wait_for_products<1>();
        if (lane == 0) arrive(memory.empty + (step - 1) % STAGES);
    }
    wait_for_products<0>();

    const int row = row_warp * 16 + lane / 4, column = share * SHARE + lane % 4 * 2;  // of a lane's first result
    if (OUTPUT == 0) {
#pragma unroll
        for (int i = 0; i < SHARE / 4; i++) {
            const i64 r = blockIdx.y * ROWS + row + i % 2 * 8;
            const int o = first + i / 2 * 8 + column;
            float* to = static_cast<float*>(y_) + (part * BATCH + r) * outputs + o;
            if (r < BATCH && o < outputs) *reinterpret_cast<float2*>(to) = {sums[2 * i], sums[2 * i + 1]};
        }
        return;
    }
    float* all = reinterpret_cast<float*>(memory.stages);  // [ROWS][PITCH]
    const u32 tokens = shared_place(all + ROWS * PITCH), selectors = tokens + ROWS * LINE;  // for x_proj
    wait_for_workers();
    if (convolves) fetch_selectors(selectors, x_proj, first, channels), pad_tokens(tokens);
#pragma unroll
    for (int i = 0; i < SHARE / 4; i++)
        *reinterpret_cast<float2*>(all + (row + i % 2 * 8) * PITCH + i / 2 * 8 + column) = {sums[2 * i], sums[2 * i + 1]};
    wait_for_workers();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int unit = i * WORKERS + threadIdx.x, own = unit % EIGHTHS * 8, o = first + own;
        const i64 r = blockIdx.y * ROWS + unit / EIGHTHS;
        if (unit >= ROWS * EIGHTHS || r >= BATCH || o >= outputs) continue;
        float y[8];
#pragma unroll
        for (int v = 0; v < 8; v++) y[v] = all[unit / EIGHTHS * PITCH + own + v];
        if (o < channels) {
            uint4* to = reinterpret_cast<uint4*>(windows + r * (TAPS - 1) * channels + o);
            const uint4 raw = packed(S{}, y);
#pragma unroll
            for (int v = 0; v < 8; v++) y[v] = fmaf(memory.taps[TAPS - 1][own + v], y[v], memory.taps[TAPS][own + v]);
#pragma unroll
            for (int t = 0; t + 1 < TAPS; t++) {
                float old[8];
                unpack(S{}, window[i][t], old);
#pragma unroll
                for (int v = 0; v < 8; v++) y[v] = fmaf(memory.taps[t][own + v], old[v], y[v]);
                to[t * channels / 8] = t + 2 < TAPS ? window[i][t + 2 < TAPS ? t + 1 : 0] : raw;
            }
#pragma unroll
            for (int v = 0; v < 8; v++) y[v] = silu(y[v]);
        }
        const uint4 words = packed(W{}, y);
        *reinterpret_cast<uint4*>(static_cast<W*>(y_) + r * outputs + o) = words;
        if (convolves) store_shared(tokens + unit / EIGHTHS * LINE + own * 2, o < channels ? words : uint4{0, 0, 0, 0});
    }
    if (convolves) {
        wait_for_copies_but<0>();
        wait_for_workers();
        const i64 before = first / TILE * i64(BATCH) + blockIdx.y * ROWS;
        select(tokens, selectors, selected + before * SELECTED, BATCH - int(blockIdx.y) * ROWS, warp, lane);
    }
}
