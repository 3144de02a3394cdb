// y = W x in float32 for 9 or more rows of x on matrix units, for products that are too small for a library's kernels,
// or whose outputs are wanted in float32.
//
// SPLIT blocks of a cluster share TILE outputs, each with a part of the inputs; a block row takes ROWS rows of x. A block
// takes half a multiprocessor, so that the next kernel's can begin beside it. Weights and x come through a ring of
// STAGES, PART inputs at a time. The blocks' sums meet in shared memory, always in the same order.
//
// Macros: W type of weights and x; INPUTS, BATCH, SPLIT, STAGES; M_WARPS warps share the rows, of M_TILES 16 each, and
// N_WARPS the outputs, of N_TILES 8 each; ALIGNED: rows of y can be written four outputs at a time.

#include "step.cuh"
#include "matrix.cuh"
#include "cluster.cuh"

constexpr int WARPS = M_WARPS * N_WARPS, THREADS = 32 * WARPS;
constexpr int TILE = 8 * N_TILES * N_WARPS, ROWS = 16 * M_TILES * M_WARPS;
constexpr int PART = 64, PARTS = (INPUTS + PART - 1) / PART;
constexpr int LINE = 2 * PART, STAGE = (TILE + ROWS) * LINE, ROWS_AT_ONCE = THREADS / 8;  // a thread copies 16 bytes
constexpr int X_COPIES = (ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
constexpr bool RESIDENT = (PARTS + SPLIT - 1) / SPLIT < STAGES;  // the ring holds all that a block reads
constexpr int PITCH = TILE + 8;  // floats of a row of sums
static_assert(sizeof(W) == 2 && INPUTS % 8 == 0);

// Where 8 neighbours of a row are: rows that are read together lie in different banks.
INLINE u32 place(int row, int eighth) { return row * LINE + ((eighth ^ (row & 1) << 2) << 4); }

extern "C" __global__ void __launch_bounds__(THREADS, 2) multiply(
    const W* __restrict__ weight, const W* x, i64 x_stride, float* y, i64 y_stride, i64 outputs_) {
    extern __shared__ float4 memory[];
    const u32 stages = u32(__cvta_generic_to_shared(memory));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m_warp = warp / N_WARPS, n_warp = warp % N_WARPS;
    const int rank = blockIdx.x % SPLIT, first = blockIdx.x / SPLIT * TILE, outputs = int(outputs_);
    const int begin = rank * PARTS / SPLIT, steps = (rank + 1) * PARTS / SPLIT - begin;
    const int my_row = threadIdx.x / 8, eighth = threadIdx.x % 8, rows = BATCH - int(blockIdx.y) * ROWS;
    x += blockIdx.y * ROWS * x_stride, y += blockIdx.y * ROWS * y_stride;

    auto fetch_weights = [&](int step) {
        const int k = (begin + step) * PART + eighth * 8;
        const u32 to = stages + step % STAGES * STAGE;
        if (step < steps) {
#pragma unroll
            for (int row = my_row; row < TILE; row += ROWS_AT_ONCE) {
                bool there = first + row < outputs && k < INPUTS;
                copy16(to + place(row, eighth), there ? weight + i64(first + row) * INPUTS + k : weight, there);
            }
        }
    };
    auto fetch_x = [&](int step) {
        const int k = (begin + step) * PART + eighth * 8;
        const u32 to = stages + step % STAGES * STAGE + TILE * LINE;
        if (step < steps) {
#pragma unroll
            for (int row = my_row; row < ROWS; row += ROWS_AT_ONCE) {
                bool there = row < rows && k < INPUTS;
                copy16(to + place(row, eighth), there ? x + row * x_stride + k : x, there);
            }
        }
    };

#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        fetch_weights(step);
        end_of_copies();
    }
    wait_for_previous();
    if constexpr (RESIDENT) {
#pragma unroll
        for (int step = 0; step < STAGES - 1; step++) fetch_x(step);
        end_of_copies();
    } else {  // x of these steps must not queue up behind their weights
        uint4 early_x[STAGES - 1][X_COPIES];
#pragma unroll
        for (int step = 0; step < STAGES - 1; step++)
#pragma unroll
            for (int i = 0; i < X_COPIES; i++) {
                int row = my_row + i * ROWS_AT_ONCE, k = (begin + step) * PART + eighth * 8;
                bool there = step < steps && row < rows && k < INPUTS;
                early_x[step][i] = there ? fresh16(x + row * x_stride + k) : uint4{0, 0, 0, 0};
            }
#pragma unroll
        for (int step = 0; step < STAGES - 1; step++)
#pragma unroll
            for (int i = 0; i < X_COPIES; i++) {
                int row = my_row + i * ROWS_AT_ONCE;
                if (row < ROWS) store_shared(stages + step * STAGE + TILE * LINE + place(row, eighth), early_x[step][i]);
            }
    }

    float sums[M_TILES][N_TILES][4] = {};
    const int part_row = lane / 4, part_eighth = lane % 4;
    for (int step = 0; step < steps; step++) {
        if (!RESIDENT || step == 0) {
            wait_for_copies_but < RESIDENT ? 0 : STAGES - 2 > ();
            __syncthreads();
        }
        if (!RESIDENT) {
            fetch_weights(step + STAGES - 1);
            fetch_x(step + STAGES - 1);
            end_of_copies();
        }
        const u32 of_w = stages + step % STAGES * STAGE + n_warp * N_TILES * 8 * LINE;
        const u32 of_x = stages + step % STAGES * STAGE + (TILE + m_warp * M_TILES * 16) * LINE;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 own = place(part_row, half * 4 + part_eighth);
            uint4 w[N_TILES];
#pragma unroll
            for (int n = 0; n < N_TILES; n++) w[n] = load_shared(of_w + n * 8 * LINE + own);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                uint4 top = load_shared(of_x + m * 16 * LINE + own), bottom = load_shared(of_x + (m * 16 + 8) * LINE + own);
                multiply_add_32(W{}, sums[m], top, bottom, w);
            }
        }
    }
    wait_for_copies_but<0>();
    __syncthreads();

    float* parts = reinterpret_cast<float*>(memory);  // [ROWS][PITCH]
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int below = 0; below < 2; below++) {
                int row = (m_warp * M_TILES + m) * 16 + below * 8 + part_row, column = (n_warp * N_TILES + n) * 8 + part_eighth * 2;
                *reinterpret_cast<float2*>(parts + row * PITCH + column) = {sums[m][n][2 * below], sums[m][n][2 * below + 1]};
            }
    wait_for_cluster<SPLIT>();
#pragma unroll 2
    for (int i = rank * THREADS + threadIdx.x; i < ROWS * TILE / 4; i += SPLIT * THREADS) {  // four outputs
        const int row = i / (TILE / 4), column = i % (TILE / 4) * 4, o = first + column;
        if (row >= rows || o >= outputs) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int block = 0; block < SPLIT; block++)
            sum = plus(sum, load_from_cluster(place_in_cluster(stages + (row * PITCH + column) * 4, block)));
        float* to = y + row * y_stride + o;
        if (ALIGNED) {
            put4(to, sum);
        } else {
            to[0] = sum.x;
            if (o + 1 < outputs) to[1] = sum.y;
            if (o + 2 < outputs) to[2] = sum.z;
            if (o + 3 < outputs) to[3] = sum.w;
        }
    }
    if (SPLIT > 1) wait_for_cluster<SPLIT>();  // others read here
}
