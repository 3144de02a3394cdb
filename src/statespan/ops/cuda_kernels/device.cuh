// What every kernel uses: numbers of 16 and 32 bits, vectors of them, exp and its kin, and sums over lanes.
// Written against no header, so that NVRTC alone compiles it.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

#define INLINE __device__ __forceinline__

constexpr float LOG2E = 1.4426950408889634f;
[[maybe_unused]] constexpr float LN2 = 0.6931471805599453f;

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };

// Two of them in a word, the first in the lower half.
INLINE float low(bfloat16, u32 word) { return __uint_as_float(word << 16); }
INLINE float high(bfloat16, u32 word) { return __uint_as_float(word & 0xffff0000u); }
INLINE float low(float16, u32 word) {
    float result;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(result) : "r"(word));
    return result;
}
INLINE float high(float16, u32 word) { return low(float16{}, word >> 16); }
INLINE u32 pair(bfloat16, float first, float second) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}
INLINE u32 pair(float16, float first, float second) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// V neighbours in memory as they are stored, moved up to 16 bytes at a time.
template <class T, int V> struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
    static_assert(sizeof(T) == 2 && V % 2 == 0);
    u32 words[V / 2];

    INLINE float get(int v) const { return v % 2 ? high(T{}, words[v / 2]) : low(T{}, words[v / 2]); }
    INLINE void set(const float (&values)[V]) {
#pragma unroll
        for (int v = 0; v < V; v += 2) words[v / 2] = pair(T{}, values[v], values[v + 1]);
    }
};
template <int V> struct alignas(4 * V < 16 ? 4 * V : 16) Vector<float, V> {
    float words[V];

    INLINE float get(int v) const { return words[v]; }
    INLINE void set(const float (&values)[V]) {
#pragma unroll
        for (int v = 0; v < V; v++) words[v] = values[v];
    }
};

INLINE u32 bits(u32 word) { return word; }
INLINE u32 bits(float x) { return __float_as_uint(x); }
INLINE u32 bits(bfloat16 x) { return x.bits; }
INLINE u32 bits(float16 x) { return x.bits; }

// The first `count` of V neighbours, the others zero. WIDE: all V are there or none is, and a Vector is aligned.
template <bool WIDE, class T, int V> INLINE void load(Vector<T, V>& vector, const T* from, int count) {
    if (WIDE) {
        vector = count > 0 ? *reinterpret_cast<const Vector<T, V>*>(from) : Vector<T, V>{};
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int v = 0; v < V; v++) vector.words[v] = v < count ? from[v] : T{};
    } else {
#pragma unroll
        for (int v = 0; v < V; v += 2)
            vector.words[v / 2] = (v < count ? bits(from[v]) : 0) | (v + 1 < count ? bits(from[v + 1]) << 16 : 0);
    }
}

// To global memory. WIDE: as load, in as few instructions as there can be; the compiler stores a Vector word by word.
template <bool WIDE, class T, int V> INLINE void store(T* to, const Vector<T, V>& vector, int count) {
    if constexpr (WIDE) {
        constexpr int WORDS = int(sizeof(vector)) / 4;
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = bits(vector.words[i]);
        u32* at = reinterpret_cast<u32*>(to);
        if (count <= 0) return;
        if constexpr (WORDS == 1) *at = words[0];
        if constexpr (WORDS == 2) asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(words[0]), "r"(words[1]) : "memory");
#pragma unroll
        for (int i = 0; i + 4 <= WORDS; i += 4)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at + i), "r"(words[i]), "r"(words[i + 1]),
                         "r"(words[i + 2]), "r"(words[i + 3])
                         : "memory");
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int v = 0; v < V; v++)
            if (v < count) to[v] = vector.words[v];
    } else {
#pragma unroll
        for (int v = 0; v < V; v++)
            if (v < count) to[v].bits = u16(vector.words[v / 2] >> (v % 2 * 16));
    }
}

// As load, into shared memory and, where WIDE, behind the back of the threads: wait_for_copies comes before use. Nothing
// else of a thread waits for it, which prefetching into registers does not promise.
template <bool WIDE, class T, int V> INLINE void copy_async(Vector<T, V>* to, const T* from, int count) {
    if (WIDE) {
        constexpr int BYTES = sizeof(Vector<T, V>) < 16 ? sizeof(Vector<T, V>) : 16;
        u32 address = u32(__cvta_generic_to_shared(to)), there = count > 0 ? BYTES : 0;
#pragma unroll
        for (int i = 0; i < int(sizeof(Vector<T, V>)) / BYTES; i++) {
            const char* piece = reinterpret_cast<const char*>(from) + i * BYTES;
            if (BYTES == 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address + i * 16), "l"(piece), "r"(there) : "memory");
            else
                asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(piece), "n"(BYTES), "r"(there) : "memory");
        }
    } else {
        Vector<T, V> vector;
        load<false>(vector, from, count);
        *to = vector;
    }
}
INLINE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What was begun since the last end belongs together; waits for all but the COUNT latest of these.
INLINE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int COUNT> INLINE void wait_for_copies_but() { asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory"); }

// 2^x and 1/x to about one unit in the last place; results below 2^-126 are zero.
INLINE float exp2_(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
INLINE float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

INLINE float sigmoid(float x) { return reciprocal(1.0f + exp2_(-LOG2E * x)); }

// log1p(e) for e in [0, 1], exact to 2e-7 of it: e times a polynomial, minimax of degree 8.
INLINE float log1p_(float e) {
    float series = fmaf(e, 0.00523242215f, -0.0295041483f);
    series = fmaf(e, series, 0.0782241747f);
    series = fmaf(e, series, -0.136630952f);
    series = fmaf(e, series, 0.191059366f);
    series = fmaf(e, series, -0.248429641f);
    series = fmaf(e, series, 0.333190948f);
    series = fmaf(e, series, -0.499994934f);
    series = fmaf(e, series, 0.99999994f);
    return e * series;
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); its derivative is the sigmoid of x.
INLINE float softplus(float x) { return fmaxf(x, 0.0f) + log1p_(exp2_(-LOG2E * fabsf(x))); }

// Sums COUNT values over LANES lanes that are STRIDE apart, in log2(LANES) rounds that halve the values as they go.
// Lane `index` of the group ends with the sums COUNT/LANES*index, ... in its first COUNT/LANES places; where there
// are fewer values than lanes, LANES/COUNT neighbouring lanes end with the same one.
template <int LANES, int STRIDE, int COUNT> INLINE void sum_over_lanes(float (&values)[COUNT], int index) {
    int width = COUNT;
#pragma unroll
    for (int bit = LANES / 2; bit > 0; bit /= 2) {
        if (width > 1) {
            width /= 2;
            bool upper = index & bit;
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                if (i < width) {
                    float sent = upper ? values[i] : values[i + width];
                    float kept = upper ? values[i + width] : values[i];
                    values[i] = kept + __shfl_xor_sync(0xffffffff, sent, bit * STRIDE);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(0xffffffff, values[0], bit * STRIDE);
        }
    }
}
