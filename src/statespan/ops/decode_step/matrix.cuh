// Matrix units, 16 x 8 results at a time. Both factors may permute the 32 inputs that two products take, if alike: so a
// lane loads 8 neighbours of a row at once, and takes their words as the fragments that the hardware wants.

INLINE void multiply_add(bfloat16, float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
INLINE void multiply_add(float16, float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += A B^T over 32 inputs for N tiles of B: a lane holds 8 of row lane / 4 (`top`) and row lane / 4 + 8 (`bottom`) of A,
// and of row lane / 4 of each tile. c: rows lane / 4 and that + 8, of each the columns lane % 4 * 2 and the next. A result
// takes some 30 cycles, so the two products of a tile stand far from each other.
template <class T, int N> INLINE void multiply_add_32(T type, float (&c)[N][4], uint4 top, uint4 bottom, const uint4 (&b)[N]) {
#pragma unroll
    for (int n = 0; n < N; n++) multiply_add(type, c[n], top.x, bottom.x, top.y, bottom.y, b[n].x, b[n].y);
#pragma unroll
    for (int n = 0; n < N; n++) multiply_add(type, c[n], top.z, bottom.z, top.w, bottom.w, b[n].z, b[n].w);
}

INLINE void store_shared(u32 place, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// 16 bytes that another kernel wrote.
INLINE uint4 fresh16(const void* from) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}
