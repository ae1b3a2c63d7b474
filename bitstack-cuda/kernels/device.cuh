// What the kernels need of the machine, and nothing else: no header of the CUDA toolkit, so that NVRTC alone compiles them.
// On a CPU the same names come from shim/shim.h, which carries out what the instructions are documented to do.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef BITSTACK_SHIM
#include "../shim/shim.h"
#else

#define DEVICE static __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define PARAMETERS const __grid_constant__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

DEVICE float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

DEVICE u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

DEVICE u16 float_to_bfloat(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Largest value, and sum, over the lanes of a warp.
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(~0u, value); }
DEVICE int warp_sum(int value) { return __reduce_add_sync(~0u, value); }

// The sum over the lanes up to this one, and the lanes that have the same value, as bits.
DEVICE u32 warp_prefix(u32 value) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 below = __shfl_up_sync(~0u, value, step);
        value += lane >= step ? below : 0;
    }
    return value;
}
DEVICE u32 warp_match(u32 value) { return __match_any_sync(~0u, value); }

// 16 bytes from global to shared memory, past the registers and the first-level cache; both 16-byte aligned.
DEVICE void copy_async(void* shared, const void* global) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's latest groups are under way.
template <int pending>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// d += a b, tile 16 x 32 of u8 by 32 x 8 of s8, in i32.
// Lane 4g+t holds a0: row g, columns 4t..4t+3; a1: row g+8; a2, a3: columns 16 on; b0: rows 4t..4t+3 of column g; b1: rows 16 on;
// d0, d1: row g, columns 2t, 2t+1; d2, d3: row g+8.
DEVICE void mma_u8_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

// d += a b, tile 16 x 16 by 16 x 8 of halves (or bfloats), in f32.
// Lane 4g+t holds a0: row g, columns 2t, 2t+1; a1: row g+8; a2, a3: columns 8 on; b0: rows 2t, 2t+1 of column g; b1: rows 8 on; d as above.
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
