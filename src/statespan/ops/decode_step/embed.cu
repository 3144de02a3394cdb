// Rows of the embedding to the residual stream. Macros: W of the embedding, H of the stream; INPUTS, a multiple of 4.

#include "step.cuh"

extern "C" __global__ void __launch_bounds__(256) embed(const i64* ids, const W* __restrict__ table, H* y) {
    wait_for_previous();
    const i64 id = i64(load_word(ids + blockIdx.x)) | i64(load_word(reinterpret_cast<const u32*>(ids + blockIdx.x) + 1)) << 32;
    for (int k = (blockIdx.y * 256 + threadIdx.x) * 4; k < INPUTS; k += gridDim.y * 1024)
        put4(y + blockIdx.x * i64(INPUTS) + k, value4(table + id * INPUTS + k));
}
