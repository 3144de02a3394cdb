// States are read and written once: they are not to push out of L2 what kernels tell each other. Only with ONCE: a library's
// weights stay in L2 as long as they can, and then states had better too.
INLINE void copy_state(u32 to, const void* from, bool there, u64 once) {
    if (!ONCE) return copy16(to, from, there);
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 ::"r"(to), "l"(from), "r"(there ? 16 : 0), "l"(once) : "memory");
}
INLINE uint4 early_state(const void* from) {
    if (!ONCE) return early16(from);
    uint4 x;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}
INLINE void store_state(float4* to, float4 x) {
    if (ONCE)
        asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
    else
        *to = x;
}
