// What each token's segment number means, see statespan.ops.segments: a warp has 32 tokens, and looks back for the last
// real one before them, AT_ONCE times 32 at a time.
//
// SEGMENT, the type of the numbers; WARPS, of a block.

constexpr int RESTARTS = 1, PADDING = 2, AT_ONCE = 4;

// The number of the last real token before `end`, a multiple of 32; -1 where there is none.
INLINE i64 number_before(const SEGMENT* segments, i64 end) {
    i64 lane = threadIdx.x % 32, numbers[AT_ONCE];
    for (; end > 0; end -= 32 * AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            i64 place = end - 32 * (i + 1) + lane;
            numbers[i] = place >= 0 ? i64(segments[place]) : -1;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            u32 real = __ballot_sync(~0u, numbers[i] >= 0);
            if (real) return __shfl_sync(~0u, numbers[i], 31 - __clz(real));
        }
    }
    return -1;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) token_marks(const SEGMENT* segments, signed char* marks, i64 length) {
    i64 first = (blockIdx.x * i64(WARPS) + threadIdx.x / 32) * 32;
    if (first >= length) return;
    segments += blockIdx.y * length, marks += blockIdx.y * length;
    int lane = threadIdx.x % 32;
    i64 number = first + lane < length ? i64(segments[first + lane]) : -1;
    i64 before = number_before(segments, first);
    u32 earlier = __ballot_sync(~0u, number >= 0) & ((1u << lane) - 1);
    i64 last = __shfl_sync(~0u, number, earlier ? 31 - __clz(earlier) : 0);
    if (earlier == 0) last = before;
    if (first + lane < length) marks[first + lane] = number < 0 ? PADDING : last >= 0 && last != number ? RESTARTS : 0;
}
