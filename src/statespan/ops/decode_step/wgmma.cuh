// Hopper's matrix units, for a group of 4 warps: c += A B^T over 16 inputs, both factors in shared memory. Of A's 64 rows a
// warp has 16; a lane has row lane / 4 and that + 8, of each the columns lane % 4 * 2 and the next in every 8.

#define F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R20 R16 ", %16, %17, %18, %19"
#define R32 R20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R40 R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PRODUCT(TYPE, NAME, COLUMNS, COUNT, NUMBERS, A, B, ...)                                                                 \
    INLINE void multiply_async(TYPE, float (&c)[COUNT], u64 a, u64 b) {                                                          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." NAME "." NAME " {" NUMBERS "}, " A ", " B ", 1, 1, 1, 0, 0;" \
                     : __VA_ARGS__ : "l"(a), "l"(b));                                                                            \
    }
#define PRODUCTS(TYPE, NAME)                                                             \
    PRODUCT(TYPE, NAME, "16", 8, R8, "%8", "%9", F8(0))                                  \
    PRODUCT(TYPE, NAME, "32", 16, R16, "%16", "%17", F16(0))                             \
    PRODUCT(TYPE, NAME, "40", 20, R20, "%20", "%21", F16(0), F4(16))                     \
    PRODUCT(TYPE, NAME, "64", 32, R32, "%32", "%33", F16(0), F16(16))                    \
    PRODUCT(TYPE, NAME, "80", 40, R40, "%40", "%41", F16(0), F16(16), F8(32))
PRODUCTS(bfloat16, "bf16")
PRODUCTS(float16, "f16")

// A factor in shared memory, 128 bytes a row, whose 16-byte pieces are permuted by the last three bits of the row.
INLINE u64 descriptor(u32 place) { return u64((place & 0x3ffff) >> 4) | u64(1) << 16 | u64(64) << 32 | u64(1) << 62; }
INLINE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> INLINE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
