// Barriers in shared memory that count arrivals, and bytes that the copy engine brings.

INLINE u32 shared_place(const void* p) { return u32(__cvta_generic_to_shared(p)); }
INLINE void set_barrier(const void* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_place(barrier)), "r"(arrivals) : "memory");
}
INLINE void barriers_are_set() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void arrive(const void* barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_place(barrier)) : "memory"); }
INLINE void arrive_with(const void* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_place(barrier)), "r"(bytes) : "memory");
}
// Until all of the turn have arrived; turns count 0, 1, 0, ..
INLINE void wait_for(const void* barrier, u32 turn) {
    u32 done = 0;
    while (!done)
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                     : "=r"(done) : "r"(shared_place(barrier)), "r"(turn) : "memory");
}
// Neighbours in memory, a multiple of 16 bytes.
INLINE void copy_bulk(u32 to, const void* from, u32 bytes, const void* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(shared_place(barrier)) : "memory");
}
