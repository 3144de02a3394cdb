// x_proj's outputs of BATCH rows, which in_proj's blocks have left as SUMS sums over channels. The first REDUCERS blocks add
// them up, always in the same order, and publish them; those run before the others, or beside them, so waiting ends.

static_assert(SUMS == 0 || BATCH * SELECTION % 4 == 0);

INLINE void add_up(const float* sums, float* exchange, uint2* to, u32 epoch) {
    constexpr int FOURS = BATCH * SELECTION / 4, SHARE = (FOURS + REDUCERS - 1) / REDUCERS, EACH = (SUMS + 15) / 16;
    const int block = blockIdx.y * gridDim.x + blockIdx.x, end = block < REDUCERS ? min((block + 1) * SHARE, FOURS) : 0;
    for (int begin = block * SHARE; begin < end; begin += 16) {  // 16 threads have four numbers each, of every 16th sum
        const int group = threadIdx.x / 16, own = begin + threadIdx.x % 16;
        float4 more[EACH + 1] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (own < end && group + 16 * i < SUMS)
                more[i] = fresh4(sums + (i64(group + 16 * i) * FOURS + own) * 4);
#pragma unroll
        for (int i = 1; i < EACH; i++) more[0] = plus(more[0], more[i]);
        *reinterpret_cast<float4*>(exchange + threadIdx.x * 4) = more[0];
        __syncthreads();
        if (threadIdx.x < 64 && begin * 4 + int(threadIdx.x) < end * 4) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; i++) sum += exchange[i * 64 + threadIdx.x];
            publish(to + begin * 4 + threadIdx.x, sum, epoch);
        }
        __syncthreads();
    }
}

// A warp's rows, `row` and every 8th behind it, 32 numbers a piece.
template <int COUNT, int PIECES> INLINE void gather(float (&values)[COUNT][PIECES], const uint2* from, u32 epoch, int row, int lane) {
    u32 seen[COUNT][PIECES];
#pragma unroll
    for (int i = 0; i < COUNT * PIECES; i++) seen[i / PIECES][i % PIECES] = epoch - 1;
    bool missing = true;
    while (missing) {
        missing = false;
#pragma unroll
        for (int i = 0; i < COUNT * PIECES; i++) {
            const int r = row + i / PIECES * 8, k = i % PIECES * 32 + lane;
            if (r >= BATCH || k >= SELECTION || seen[i / PIECES][i % PIECES] == epoch) continue;
            const uint2 got = published(from + r * SELECTION + k);
            values[i / PIECES][i % PIECES] = __uint_as_float(got.x), seen[i / PIECES][i % PIECES] = got.y;
        }
#pragma unroll
        for (int i = 0; i < COUNT * PIECES; i++)
            missing |= row + i / PIECES * 8 < BATCH && i % PIECES * 32 + lane < SELECTION && seen[i / PIECES][i % PIECES] != epoch;
    }
}
