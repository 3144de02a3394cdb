// What the kernels of a decoding step share: programmatic launches, loads past the L1 cache, weights in 16 bytes.

typedef unsigned long long u64;

struct int8 { signed char bits; };

// A kernel may begin while the one before it runs. Once that has ended, and with it all before, it lets the next begin:
// so what the kernel just before did not write may be read before the wait. Without compute capability 9.0 it is nothing.
INLINE void wait_without_letting_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
INLINE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
INLINE void wait_for_previous() { wait_without_letting_begin(), let_next_begin(); }

// 16 bytes of weights to shared memory, zeros where there are none. Loads into registers the compiler would move behind
// the wait, and behind the products of those before them.
INLINE void copy16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

INLINE uint4 load_shared(u32 place) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(place) : "memory");
    return x;
}

// Some multiple of 16 bytes; nobody waits for them.
INLINE void bring_to_l2(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Has weights of a later kernel brought to L2 by the blocks of this one, which leaves memory idle.
INLINE void bring_ahead(const void* weights, i64 bytes) {
#if __CUDA_ARCH__ >= 900
    constexpr int PIECE = 2048;
    if (threadIdx.x >= 32) return;
    i64 blocks = i64(gridDim.x) * gridDim.y, block = i64(blockIdx.y) * gridDim.x + blockIdx.x;
    for (i64 at = (block * 32 + threadIdx.x) * PIECE; at < bytes; at += blocks * 32 * PIECE)
        bring_to_l2(static_cast<const char*>(weights) + at, u32(min(i64(PIECE), bytes - at)));
#endif
}

// Loads that stay before the wait.
INLINE float early(const float* from) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}
INLINE uint4 early16(const void* from) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}

INLINE float4 early4(const float* from) {
    uint4 x = early16(from);
    return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}
template <class T> INLINE float4 early4(const T* from) {
    u32 a, b;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from) : "memory");
    return {low(T{}, a), high(T{}, a), low(T{}, b), high(T{}, b)};
}

// What another kernel wrote comes from L2: it may be newer than a line in L1.
INLINE u32 load_word(const void* from) {
    u32 word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}
INLINE float fresh(const float* from) { return __uint_as_float(load_word(from)); }
template <class T> INLINE float fresh(const T* from) {
    u16 half;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(half) : "l"(from) : "memory");
    return low(T{}, half);
}
INLINE float4 fresh4(const float* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
    return x;
}
template <class T> INLINE float4 fresh4(const T* from) {
    u32 a, b;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from) : "memory");
    return {low(T{}, a), high(T{}, a), low(T{}, b), high(T{}, b)};
}

INLINE float value(float x) { return x; }
INLINE float value(int8 x) { return x.bits; }
template <class T> INLINE float value(T x) { return low(T{}, x.bits); }
INLINE void put(float* to, float x) { *to = x; }
template <class T> INLINE void put(T* to, float x) { to->bits = u16(pair(T{}, x, 0.0f)); }
INLINE void put4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
template <class T> INLINE void put4(T* to, float4 x) { *reinterpret_cast<uint2*>(to) = {pair(T{}, x.x, x.y), pair(T{}, x.z, x.w)}; }
// Four parameters, aligned to four of them.
INLINE float4 value4(const float* from) { return *reinterpret_cast<const float4*>(from); }
template <class T> INLINE float4 value4(const T* from) {
    uint2 w = *reinterpret_cast<const uint2*>(from);
    return {low(T{}, w.x), high(T{}, w.x), low(T{}, w.y), high(T{}, w.y)};
}

// The numbers in 16 bytes of weights.
INLINE void unpack(float, uint4 w, float* to) {
    to[0] = __uint_as_float(w.x), to[1] = __uint_as_float(w.y), to[2] = __uint_as_float(w.z), to[3] = __uint_as_float(w.w);
}
template <class T> INLINE void unpack(T, uint4 w, float* to) {
    u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = low(T{}, words[i]), to[2 * i + 1] = high(T{}, words[i]);
}
// The byte, made positive, in the mantissa of 2^23: exact, and quicker than a conversion.
INLINE void unpack(int8, uint4 w, float* to) {
    u32 words[4] = {w.x ^ 0x80808080u, w.y ^ 0x80808080u, w.z ^ 0x80808080u, w.w ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 16; i++)
        to[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7540 + i % 4)) - 8388736.0f;
}

INLINE float sum_of_warp(float x) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffff, x, bit);
    return x;
}
// Of a block of so many warps; every thread gets it.
template <int COUNT> INLINE float sum_of_block(float x) {
    __shared__ float warp_sums[COUNT];
    x = sum_of_warp(x);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += warp_sums[i];
    return sum;
}
INLINE float silu(float x) { return x * sigmoid(x); }
INLINE float dot4(float4 a, float4 b) { return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w))); }
INLINE float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
INLINE float4 times(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
INLINE float4 times(float4 a, float b) { return {a.x * b, a.y * b, a.z * b, a.w * b}; }
