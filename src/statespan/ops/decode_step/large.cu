// y = W x for many rows of x on Hopper's matrix units, for products whose weights take longer to read than to multiply.
//
// A block takes TILE outputs, and one part of SPLIT of the inputs. One thread has weights and x brought through a ring of
// STAGES, 64 inputs at a time; the weights of the first stages before it waits for the kernel before. x lies in tiles of
// [ROWS][64] as matrix units read them, see wgmma.cuh.
//
// Macros: W type of weights and x; INPUTS, TILE, ROWS, BATCH, SPLIT, STAGES; OUTPUT: 0 float32 sums [SPLIT][BATCH][outputs],
// 1 W, and conv and SiLU of the first `channels`, in place; S of the conv's state, P of its weights; TAPS.

#include "step.cuh"
#include "barrier.cuh"
#include "wgmma.cuh"

constexpr int GROUPS = ROWS / 64, THREADS = 128 * GROUPS + 32, PART = 64, STEPS = INPUTS / PART;
constexpr int WORKERS = 128 * GROUPS, EIGHTHS = TILE / 8, EACH = (ROWS * EIGHTHS + WORKERS - 1) / WORKERS, PITCH = TILE + 8;
constexpr int W_BYTES = TILE * PART * 2, X_BYTES = ROWS * PART * 2, STAGE = W_BYTES + X_BYTES;
static_assert(INPUTS % PART == 0 && W_BYTES % 1024 == 0 && sizeof(W) == 2);

struct Memory {
    alignas(1024) char stages[STAGES][STAGE];
    u64 full[STAGES], empty[STAGES];
    float taps[TAPS + 1][TILE];  // and the bias
};
static_assert(ROWS * PITCH * 4 <= sizeof(Memory::stages));

INLINE void wait_for_workers() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }
template <class T> INLINE uint4 packed(T type, const float (&x)[8]) {
    return {pair(type, x[0], x[1]), pair(type, x[2], x[3]), pair(type, x[4], x[5]), pair(type, x[6], x[7])};
}

extern "C" __global__ void __launch_bounds__(THREADS) large(
    const void* map, const W* x, void* y_, i64 outputs_, S* windows, const P* __restrict__ conv_weight,
    const P* __restrict__ conv_bias, i64 channels_) {
    extern __shared__ float4 dynamic[];
    Memory& memory = *reinterpret_cast<Memory*>((reinterpret_cast<size_t>(dynamic) + 1023) / 1024 * 1024);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = int(outputs_), channels = int(channels_);
    const int first = blockIdx.x / SPLIT * TILE, part = blockIdx.x % SPLIT;
    const int begin = part * STEPS / SPLIT, steps = (part + 1) * STEPS / SPLIT - begin;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) set_barrier(memory.full + i, 1), set_barrier(memory.empty + i, 4 * GROUPS);
        barriers_are_set();
    }
    __syncthreads();

    if (warp == 4 * GROUPS) {
        if (lane > 0) return;
        u64 once;  // a cache policy: weights are not to push out of L2 what kernels tell each other
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        auto bring_weights = [&](int step) {
            const int slot = step % STAGES;
            arrive_with(memory.full + slot, STAGE);
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
                         ::"r"(shared_place(memory.stages[slot])), "l"(map), "r"((begin + step) * PART), "r"(first),
                         "r"(shared_place(memory.full + slot)), "l"(once) : "memory");
        };
        auto bring_x = [&](int step) {
            const int slot = step % STAGES;
            const W* tile = x + (i64(blockIdx.y) * STEPS + begin + step) * (ROWS * PART);
            copy_bulk(shared_place(memory.stages[slot] + W_BYTES), tile, X_BYTES, memory.full + slot);
        };
        asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
        const int early = min(steps, STAGES);
        for (int step = 0; step < early; step++) bring_weights(step);
        wait_for_previous();
        for (int step = 0; step < early; step++) bring_x(step);
        for (int step = STAGES; step < steps; step++) {
            wait_for(memory.empty + step % STAGES, step / STAGES + 1 & 1);
            bring_weights(step), bring_x(step);
        }
        return;
    }

    const bool convolves = OUTPUT == 1 && first < channels;
    uint4 window[EACH][OUTPUT == 1 && TAPS > 1 ? TAPS - 1 : 1];  // of 8 channels of a row each
    if (convolves) {
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
    float sums[TILE / 2] = {};
    for (int step = 0; step < steps; step++) {
        const int slot = step % STAGES;
        wait_for(memory.full + slot, step / STAGES & 1);
        const u64 weights = descriptor(shared_place(memory.stages[slot]));
        const u64 rows = descriptor(shared_place(memory.stages[slot] + W_BYTES + warp / 4 * 64 * 2 * PART));
        begin_products();
#pragma unroll
        for (int k = 0; k < PART / 16; k++) multiply_async(W{}, sums, rows + 2 * k, weights + 2 * k);
        end_of_products();
        if (step == 0) continue;
        wait_for_products<1>();
        if (lane == 0) arrive(memory.empty + (step - 1) % STAGES);
    }
    wait_for_products<0>();

    const int row = warp / 4 * 64 + warp % 4 * 16 + lane / 4, column = lane % 4 * 2;  // of a lane's first result
    if (OUTPUT == 0) {
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            const i64 r = blockIdx.y * ROWS + row + i % 2 * 8;
            const int o = first + i / 2 * 8 + column;
            float* to = static_cast<float*>(y_) + (part * BATCH + r) * outputs + o;
            if (r < BATCH && o < outputs) *reinterpret_cast<float2*>(to) = {sums[2 * i], sums[2 * i + 1]};
        }
        return;
    }
    float* all = reinterpret_cast<float*>(memory.stages);  // [ROWS][PITCH]
    wait_for_workers();
#pragma unroll
    for (int i = 0; i < TILE / 4; i++)
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
        *reinterpret_cast<uint4*>(static_cast<W*>(y_) + r * outputs + o) = packed(W{}, y);
    }
}
