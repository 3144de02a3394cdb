// The largest logit of each row and its token, the first of equal ones; a NaN is larger than all. The blocks of a cluster
// share a row. Macros: SPLIT of a cluster.

#include "step.cuh"
#include "cluster.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;

// Logits in the order of integers, and behind them tokens in falling order.
INLINE u64 key(float x, u32 token) {
    u32 word = __float_as_uint(x + 0.0f);  // no -0
    word = x != x ? 0xffffffffu : word >> 31 ? ~word : word | 0x80000000u;
    return u64(word) << 32 | (0xffffffffu - token);
}
INLINE u64 larger_of_warp(u64 best) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) {
        u64 other = u64(__shfl_xor_sync(0xffffffff, u32(best >> 32), bit)) << 32 | __shfl_xor_sync(0xffffffff, u32(best), bit);
        best = max(best, other);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* logits, i64 stride, i64 tokens, i64* chosen, float* value) {
    extern __shared__ float4 memory[];
    u64* bests = reinterpret_cast<u64*>(memory);  // of the block, and of its warps
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % SPLIT;
    const i64 row = blockIdx.x / SPLIT;
    wait_for_previous();
    u64 best = 0;
#pragma unroll 8
    for (i64 i = rank * THREADS + threadIdx.x; i < tokens; i += SPLIT * THREADS)
        best = max(best, key(fresh(logits + row * stride + i), u32(i)));
    best = larger_of_warp(best);
    if (lane == 0) bests[2 + warp] = best;
    __syncthreads();
    if (warp == 0) {
        best = larger_of_warp(lane < WARPS ? bests[2 + lane] : 0);
        if (lane == 0) bests[0] = best;
    }
    wait_for_cluster<SPLIT>();
    if (rank == 0 && threadIdx.x == 0) {
#pragma unroll
        for (int block = 1; block < SPLIT; block++) {
            float4 other = load_from_cluster(place_in_cluster(u32(__cvta_generic_to_shared(memory)), block));
            best = max(best, u64(__float_as_uint(other.y)) << 32 | __float_as_uint(other.x));
        }
        u32 word = u32(best >> 32);
        chosen[row] = i64(0xffffffffu - u32(best));
        value[row] = __uint_as_float(word >> 31 ? word == 0xffffffffu ? word : word & 0x7fffffffu : ~word);
    }
    wait_for_cluster<SPLIT>();  // the first block reads the others' memory
}
