// The least weight of each row that sampling keeps: a search over the bits of float32, which order weights as their
// values do. The blocks of a cluster share a row and hold it in registers.
// Macros: SPLIT blocks of a cluster, THREADS of a block, VALUES of a thread.

#include "../decode_step/cluster.cuh"

constexpr int WARPS = THREADS / 32, DIGIT = 3, LEVELS = 1 << DIGIT, TOP = 27;  // 30 bits, up to that of 1.0

struct Memory {
    double blocks[2][LEVELS];  // of this block, and of its turn before, which other blocks may still read
    float warps[WARPS][LEVELS];
};

// Sums over a warp of 8 values each: lane 4 j has the sum of the j-th.
INLINE float sums_of_warp(float (&sums)[LEVELS], int lane) {
#pragma unroll
    for (int half = LEVELS / 2, bit = 16; half >= 1; half /= 2, bit /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) {
            const bool upper = lane & bit;
            const float sent = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
            sums[i] = kept + __shfl_xor_sync(0xffffffff, sent, bit);
        }
    sums[0] += __shfl_xor_sync(0xffffffff, sums[0], 2);
    return sums[0] + __shfl_xor_sync(0xffffffff, sums[0], 1);
}
INLINE double load_double_of_block(const double* place, int block) {
    const u32 at = place_in_cluster(u32(__cvta_generic_to_shared(place)), block);
    double x;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(at) : "memory");
#else
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(at) : "memory");
#endif
    return x;
}

// The largest bits from which on the row's values, or with COUNT their number, add up to what is wanted: `share` of
// what they do from `low` on, or with COUNT `share` itself.
template <bool COUNT> INLINE u32 search(const float (&values)[VALUES], u32 low, double share, Memory& memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    double wanted = share;
    int turn = 0;
#pragma unroll 1
    for (int shift = TOP; shift >= 0; shift -= DIGIT, turn ^= 1) {
        float sums[LEVELS] = {}, least[LEVELS];
#pragma unroll
        for (int level = 0; level < LEVELS; level++) least[level] = __uint_as_float(low + (u32(level) << shift));
#pragma unroll
        for (int i = 0; i < VALUES; i++)
#pragma unroll
            for (int level = 0; level < LEVELS; level++)
                sums[level] += values[i] >= least[level] ? COUNT ? 1.0f : values[i] : 0.0f;
        const float sum = sums_of_warp(sums, lane);
        if (lane % 4 == 0) memory.warps[warp][lane / 4] = sum;
        __syncthreads();
        if (threadIdx.x < LEVELS) {
            double total = 0;
            for (int w = 0; w < WARPS; w++) total += memory.warps[w][threadIdx.x];
            memory.blocks[turn][threadIdx.x] = total;
        }
        wait_for_cluster<SPLIT>();
        double total = 0;
        if (lane < LEVELS)
            for (int block = 0; block < SPLIT; block++) total += load_double_of_block(&memory.blocks[turn][lane], block);
        if (!COUNT && shift == TOP) wanted = share * __shfl_sync(0xffffffff, total, 0);
        const u32 reached = __ballot_sync(0xffffffff, lane > 0 && lane < LEVELS && total >= wanted);
        if (reached) low += u32(31 - __clz(reached)) << shift;
    }
    wait_for_cluster<SPLIT>();  // other blocks read this one's memory
    return low;
}

extern "C" __global__ void __launch_bounds__(THREADS)
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
sampling_edge(const float* weights, i64 stride, i64 size, const i64* top_k, const float* top_p, float* edge) {
    __shared__ Memory memory;
    const i64 row = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
    float values[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const i64 at = (i * SPLIT + rank) * THREADS + threadIdx.x;
        values[i] = at < size ? weights[row * stride + at] : -1.0f;  // which no search keeps
    }
    u32 low = 0;
    if (top_k != nullptr && top_k[row] < size) low = search<true>(values, low, double(top_k[row]), memory);
    if (top_p != nullptr && top_p[row] < 1.0f) low = search<false>(values, low, double(top_p[row]), memory);
    if (rank == 0 && threadIdx.x == 0) edge[row] = __uint_as_float(low);
}
