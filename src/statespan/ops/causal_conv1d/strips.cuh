// What the walks along strips of tokens share: two neighbouring channels of a lane, and which tokens begin a segment.
//
// TYPE, the tensors'; WIDTH, the channels; TAPS; SEGMENT, the type of the segments' numbers; SEGMENTS and HAS_INITIAL, whether
// there are any and an initial state; ALIGNED: pairs of channels lie where they can be moved at once; WARPS, of a
// block; AHEAD, tokens that are on their way.

constexpr int CHANNELS = 64, HISTORY = TAPS - 1;
constexpr int SLOTS = HISTORY > 0 ? HISTORY : 1;
constexpr int NONE = -1 - HISTORY;  // in place of a token's row; rows from -HISTORY on are those of the initial state
typedef TYPE Number;
typedef Vector<Number, 2> Pair;

// Loads stand where they are written, which the compiler does not promise of others.
template <class N> INLINE void fetch(Vector<N, 2>& to, const N* from, int count) {
    if constexpr (!ALIGNED) load<false>(to, from, count);
    else if (WIDTH % CHANNELS != 0 && count <= 0) to = Vector<N, 2>{};
    else if constexpr (sizeof(N) == 2) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to.words[0]) : "l"(from));
    else asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(to.words[0]), "=f"(to.words[1]) : "l"(from));
}
INLINE void put(Number* to, const Pair& from, int count) {
    if (ALIGNED && WIDTH % CHANNELS == 0) *reinterpret_cast<Pair*>(to) = from;
    else store<ALIGNED>(to, from, count);
}

// The words of COUNT rows from token t on, ROW numbers apart; the last token stands for those behind it.
template <int ROW, int COUNT> INLINE void fetch(Pair (&to)[COUNT], const Number* from, int t, int length, int count) {
    const Number* first = from + i64(t) * ROW;
    if (t + COUNT <= length) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) fetch(to[i], first + i * ROW, count);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) fetch(to[i], from + i64(min(t + i, length - 1)) * ROW, count);
    }
}

// The real tokens before a place, from the last one to the first.
struct Before {
    const SEGMENT* segments;
    int base;
    u32 mask = 0;
    i64 number = -1;

    // The next one, -1 where there is none; its segment's number.
    INLINE int next(i64& found) {
        int lane = threadIdx.x % 32;
        while (mask == 0 && base > 0) {
            base -= 32;
            number = base + lane >= 0 ? i64(segments[base + lane]) : -1;
            mask = __ballot_sync(~0u, number >= 0);
        }
        if (mask == 0) return -1;
        int bit = 31 - __clz(mask);
        mask &= ~(1u << bit);
        found = __shfl_sync(~0u, number, bit);
        return base + bit;
    }
};

// What the window holds when token `start` comes, and the segment's number, or -1 before the first real token.
INLINE i64 window_before(Pair (&window)[SLOTS], const Number* x, const Number* initial, const SEGMENT* segments, int start, i64 row, int count) {
    i64 current = -1, number = -1;
    Before before{segments, start};
    int place = SEGMENTS ? before.next(current) : start - 1;
    number = current;
#pragma unroll
    for (int i = HISTORY - 1; i >= 0; i--) {
        window[i] = Pair{};
        if (place >= 0) fetch(window[i], x + i64(place) * row, count);
        else if (HAS_INITIAL && place > NONE) load<ALIGNED>(window[i], initial + (place + HISTORY) * WIDTH, count);
        if (!SEGMENTS || place < 0) place--;
        else {
            place = before.next(number);
            if (number != current) place = NONE;
        }
    }
    return current;
}

// Of 32 tokens from t on, which are padding and which begin a segment; `number` is the lane's own, -1 behind the row's end.
struct Marks {
    u32 padding, restarts;

    static INLINE Marks of(i64 number, i64& current) {
        int lane = threadIdx.x % 32;
        u32 real = __ballot_sync(~0u, number >= 0), earlier = real & ((1u << lane) - 1);
        i64 last = __shfl_sync(~0u, number, earlier ? 31 - __clz(earlier) : 0);
        if (earlier == 0) last = current;
        u32 restarts = __ballot_sync(~0u, number >= 0 && last >= 0 && number != last);
        i64 newest = __shfl_sync(~0u, number, real ? 31 - __clz(real) : 0);
        if (real) current = newest;
        return {~real, restarts};
    }
};
INLINE i64 number_at(const SEGMENT* segments, int t, int length) { return t < length ? i64(segments[t]) : -1; }

INLINE float as_float(float x) { return x; }
template <class T> INLINE float as_float(T x) { return low(x, x.bits); }

// The taps and bias of a lane's channels.
struct Filter {
    float taps[TAPS][2], bias[2];

    template <class Weight, class Offset> INLINE Filter(const Weight* weight, const Offset* offsets, int channel) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            bool there = WIDTH % CHANNELS == 0 || channel + c < WIDTH;
            bias[c] = HAS_BIAS && there ? as_float(offsets[channel + c]) : 0.0f;
#pragma unroll
            for (int i = 0; i < TAPS; i++) taps[i][c] = there ? as_float(weight[(channel + c) * TAPS + i]) : 0.0f;
        }
    }
    INLINE float combine(const float (&window)[SLOTS][2], float x, int c) const {
        float value = fmaf(taps[HISTORY][c], x, bias[c]);
#pragma unroll
        for (int i = 0; i < HISTORY; i++) value = fmaf(taps[i][c], window[i][c], value);
        return value;
    }
};
INLINE void push(float (&window)[SLOTS][2], const Pair& x) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int i = 0; i + 1 < HISTORY; i++) window[i][c] = window[i + 1][c];
        if (HISTORY > 0) window[SLOTS - 1][c] = x.get(c);
    }
}
