// The names of kernels/device.cuh and the CUDA language on a CPU, so that the kernel sources run unchanged under sanitizers.
//
// A block's threads are fibres: each runs until a barrier (or an instruction that a warp carries out together), then another gets its turn,
// in an order the caller chooses; results must not depend on it. Asynchronous copies happen when they are waited for, no earlier.
// An instruction of a whole warp checks that all 32 lanes arrive at the same one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct Index {
    u32 x, y, z;
};

namespace shim {

struct Copy {
    void* to;
    const void* from;
};

enum class Instruction { SYNC, MAX, SUM, PREFIX, MATCH, MMA_U8_S8, MMA_HALF, MMA_BFLOAT };

// What a lane brings to an instruction of its warp.
struct Deposit {
    Instruction instruction;
    u32 words[6];
};

struct Barrier {
    u32 arrived = 0;
    std::vector<u32> waiting;
};

struct Warp {
    Barrier barrier;
    Deposit deposits[2][32];  // two, because a lane may reach the next instruction while another still reads the last
};

struct Thread {
    Index index;
    u32 instructions = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

extern Index block_index, grid_size, block_size;
extern std::vector<u8> shared_memory;
Thread& thread();
Warp& warp();
void wait(Barrier& barrier, u32 threads);

[[noreturn]] inline void fail(const char* what, const char* detail) {
    std::fprintf(stderr, "shim: %s: %s\n", what, detail);
    std::abort();
}

// Hands in this lane's words and returns those of all lanes.
inline const Deposit* exchange(const Deposit& mine) {
    u32 lane = thread().index.x % 32;
    Deposit* all = warp().deposits[thread().instructions++ % 2];
    all[lane] = mine;
    wait(warp().barrier, 32);
    for (u32 i = 0; i < 32; i++) {
        if (all[i].instruction != mine.instruction) {
            fail("lanes of a warp", "at different instructions");
        }
    }
    return all;
}

inline double power(int e) { return std::ldexp(1.0, e); }
}  // namespace shim

#define DEVICE static inline
#define KERNEL(threads, blocks) void
#define PARAMETERS const
#define DYNAMIC_SHARED(name) u8* name = shim::shared_memory.data()
#define threadIdx (shim::thread().index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

DEVICE u32 __float_as_uint(float f) {
    u32 bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}
DEVICE float __uint_as_float(u32 bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
DEVICE int __popc(u32 bits) { return __builtin_popcount(bits); }
DEVICE int __float2int_rn(float f) { return (int)std::nearbyint(f); }

DEVICE float half_to_float(u16 h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double magnitude = exponent == 0 ? mantissa * shim::power(-24) : (1024 + mantissa) * shim::power(exponent - 25);
    if (exponent == 31) {
        magnitude = mantissa == 0 ? INFINITY : NAN;
    }
    return (float)(h >> 15 ? -magnitude : magnitude);
}
DEVICE u16 float_to_half(float f) {
    u16 sign = (u16)(__float_as_uint(f) >> 16 & 0x8000);
    double x = std::fabs((double)f);
    if (std::isnan(x)) {
        return 0x7fff;
    }
    if (x >= 65520) {
        return sign | 0x7c00;
    }
    int exponent = x < shim::power(-14) ? -14 : std::ilogb(x);
    // A mantissa that rounds up to 2048 carries into the exponent by itself; below 2^-14 there is no leading one to take off.
    long mantissa = std::lrint(x * shim::power(10 - exponent));
    return sign | (u16)(x < shim::power(-14) ? mantissa : ((exponent + 15) << 10) + (mantissa - 1024));
}
DEVICE u16 float_to_bfloat(float f) {
    u32 bits = __float_as_uint(f);
    if (std::isnan(f)) {
        return 0x7fff;
    }
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE float bfloat_to_float(u16 b) { return __uint_as_float((u32)b << 16); }

DEVICE void __syncthreads();
DEVICE void __syncwarp() { shim::exchange({shim::Instruction::SYNC, {}}); }
DEVICE u32 warp_max(u32 value) {
    const shim::Deposit* all = shim::exchange({shim::Instruction::MAX, {value}});
    u32 most = 0;
    for (u32 i = 0; i < 32; i++) {
        most = all[i].words[0] > most ? all[i].words[0] : most;
    }
    return most;
}
DEVICE int warp_sum(int value) {
    const shim::Deposit* all = shim::exchange({shim::Instruction::SUM, {(u32)value}});
    int sum = 0;
    for (u32 i = 0; i < 32; i++) {
        sum += (int)all[i].words[0];
    }
    return sum;
}

DEVICE u32 warp_prefix(u32 value) {
    const shim::Deposit* all = shim::exchange({shim::Instruction::PREFIX, {value}});
    u32 sum = 0;
    for (u32 i = 0; i <= threadIdx.x % 32; i++) {
        sum += all[i].words[0];
    }
    return sum;
}
DEVICE u32 warp_match(u32 value) {
    const shim::Deposit* all = shim::exchange({shim::Instruction::MATCH, {value}});
    u32 lanes = 0;
    for (u32 i = 0; i < 32; i++) {
        lanes |= (u32)(all[i].words[0] == value) << i;
    }
    return lanes;
}

DEVICE void copy_async(void* to, const void* from) {
    if ((uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) {
        shim::fail("cp.async", "an address that is not a multiple of 16");
    }
    shim::thread().open.push_back({to, from});
}
DEVICE void copy_commit() {
    shim::thread().groups.push_back(shim::thread().open);
    shim::thread().open.clear();
}
template <int pending>
DEVICE void copy_wait() {
    auto& groups = shim::thread().groups;
    while (groups.size() > pending) {
        for (const shim::Copy& copy : groups.front()) {
            std::memcpy(copy.to, copy.from, 16);
        }
        groups.erase(groups.begin());
    }
}

// The tensor-core instructions, from the tables of fragments in the PTX documentation.
DEVICE void mma_u8_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
    const shim::Deposit* all = shim::exchange({shim::Instruction::MMA_U8_S8, {a0, a1, a2, a3, b.x, b.y}});
    u32 lane = threadIdx.x % 32;
    for (u32 at = 0; at < 4; at++) {
        u32 row = lane / 4 + at / 2 * 8, col = lane % 4 * 2 + at % 2;
        for (u32 k = 0; k < 32; k++) {
            u32 t = k % 16 / 4, byte = k % 4 * 8, upper = k / 16;
            u32 a = all[row % 8 * 4 + t].words[row / 8 + 2 * upper] >> byte & 255;
            int b_value = (signed char)(all[col * 4 + t].words[4 + upper] >> byte & 255);
            d[at] += (int)a * b_value;
        }
    }
}
DEVICE void mma_16(shim::Instruction instruction, float (*value)(u16), float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const shim::Deposit* all = shim::exchange({instruction, {a[0], a[1], a[2], a[3], b0, b1}});
    u32 lane = threadIdx.x % 32;
    for (u32 at = 0; at < 4; at++) {
        u32 row = lane / 4 + at / 2 * 8, col = lane % 4 * 2 + at % 2;
        for (u32 k = 0; k < 16; k++) {
            u32 t = k % 8 / 2, bits = k % 2 * 16, upper = k / 8;
            u16 a_bits = (u16)(all[row % 8 * 4 + t].words[row / 8 + 2 * upper] >> bits);
            u16 b_bits = (u16)(all[col * 4 + t].words[4 + upper] >> bits);
            d[at] += value(a_bits) * value(b_bits);
        }
    }
}
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_16(shim::Instruction::MMA_HALF, half_to_float, d, a, b0, b1); }
DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_16(shim::Instruction::MMA_BFLOAT, bfloat_to_float, d, a, b0, b1); }

namespace shim {
extern Barrier block_barrier;
}
DEVICE void __syncthreads() { shim::wait(shim::block_barrier, blockDim.x); }
