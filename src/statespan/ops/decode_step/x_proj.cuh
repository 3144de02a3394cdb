// x_proj over the channels of a block of large.cu: sums that the blocks of recur.cu add up.
// Needs ROWS, ROW_WARPS, SHARES, TILE, WORKERS and SELECTED, x_proj's outputs.

// Inputs by 32, and bytes of a row of them: neighbours lie in different banks.
constexpr int DEEP = (TILE + 31) / 32, LINE = DEEP * 64 + (DEEP % 2 ? 0 : 64);

// The weights for the channels from `first` on to L2: from memory they would come behind the ring's.
INLINE void bring_selectors(const W* x_proj, int first, int channels) {
    const int last = min(TILE, channels - first) - 1;
    for (int i = threadIdx.x; i < 2 * SELECTED; i += WORKERS)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(x_proj + i64(i / 2) * channels + first + i % 2 * last));
}
// The weights for the channels from `first` on to shared memory, with zeros behind them.
INLINE void fetch_selectors(u32 to, const W* x_proj, int first, int channels) {
    for (int i = threadIdx.x; i < SELECTED * DEEP * 4; i += WORKERS) {
        const int o = i / (DEEP * 4), k = i % (DEEP * 4) * 8;
        const bool there = k < TILE && first + k < channels;
        copy16(to + o * LINE + k * 2, there ? x_proj + i64(o) * channels + first + k : x_proj, there);
    }
    end_of_copies();
}
// Zeros behind the channels of each row of x.
INLINE void pad_tokens(u32 tokens) {
    constexpr int THERE = TILE / 8, MORE = DEEP * 4 - THERE, EVERY = MORE ? MORE : 1;
    for (int i = threadIdx.x; i < ROWS * MORE; i += WORKERS)
        store_shared(tokens + i / EVERY * LINE + (THERE + i % EVERY) * 16, uint4{0, 0, 0, 0});
}
// sums [rows][SELECTED]; x and the weights are in shared memory.
INLINE void select(u32 tokens, u32 selectors, float* sums, int rows, int warp, int lane) {
    constexpr int COUNT = SELECTED / 8, AT_ONCE = COUNT % 4 == 0 ? 4 : COUNT % 3 == 0 ? 3 : 1;
    const u32 own = lane / 4 * LINE + lane % 4 * 16;
    const int first_row = warp % ROW_WARPS * 16;
    uint4 top[DEEP], bottom[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; i++) {
        top[i] = load_shared(tokens + first_row * LINE + own + i * 64);
        bottom[i] = load_shared(tokens + (first_row + 8) * LINE + own + i * 64);
    }
#pragma unroll 2
    for (int n = warp / ROW_WARPS * AT_ONCE; n < COUNT; n += SHARES * AT_ONCE) {
        float c[AT_ONCE][4] = {};
#pragma unroll
        for (int i = 0; i < DEEP; i++) {
            uint4 w[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) w[j] = load_shared(selectors + (n + j) * 8 * LINE + own + i * 64);
            multiply_add_32(W{}, c, top[i], bottom[i], w);
        }
#pragma unroll
        for (int i = 0; i < 2 * AT_ONCE; i++) {
            const int r = first_row + lane / 4 + i % 2 * 8, o = (n + i / 2) * 8 + lane % 4 * 2;
            if (r < rows) *reinterpret_cast<float2*>(sums + r * SELECTED + o) = {c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]};
        }
    }
}
