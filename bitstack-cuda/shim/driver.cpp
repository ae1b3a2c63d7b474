// A device made of this process: holds memory, runs kernels, obeys commands on its standard input. src/shim/device.rs speaks to it.
//
// Commands, little-endian: 'a' size: allocates, replies with the address · 'w' address length bytes: writes · 'r' address length: replies
// with the bytes · 'l' name-length name grid(3) block shared-bytes order length parameters: runs a kernel, replies with one byte.
// Numbers are u64. Every allocation is its own, of exact size, so the address sanitizer sees every access outside.
#define BITSTACK_SHIM
#include "../kernels/device.cuh"
#include "../kernels/stack.cuh"
#include "../kernels/fused.cu"
#include "../kernels/spikes.cu"
#include "../kernels/rebuild.cu"

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <ucontext.h>

namespace shim {

Index block_index, grid_size, block_size;
std::vector<u8> shared_memory;
Barrier block_barrier;

constexpr size_t STACK_BYTES = 256 << 10;
struct Fibre {
    Thread thread;
    ucontext_t context;
    std::vector<u8> stack;
    bool done;
};
std::vector<Fibre> fibres;
std::vector<Warp> warps;
std::deque<u32> runnable;
ucontext_t scheduler;
u32 current;
std::function<void()> kernel;

Thread& thread() { return fibres[current].thread; }
Warp& warp() { return warps[current / 32]; }

void wait(Barrier& barrier, u32 threads) {
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        for (u32 other : barrier.waiting) {
            runnable.push_back(other);
        }
        barrier.waiting.clear();
    } else {
        barrier.waiting.push_back(current);
        swapcontext(&fibres[current].context, &scheduler);
    }
}

void enter() {
    kernel();
    fibres[current].done = true;
    swapcontext(&fibres[current].context, &scheduler);
}

// Runs one block. `order` chooses who goes next: 0 the one that waits longest, 1 the one that came last, others at random.
void run_block(u64 order) {
    u32 threads = block_size.x;
    while (fibres.size() < threads) {
        fibres.emplace_back();
        fibres.back().stack.resize(STACK_BYTES);
    }
    warps.assign((threads + 31) / 32, Warp());
    block_barrier = Barrier();
    for (u32 i = 0; i < threads; i++) {
        Fibre& fibre = fibres[i];
        fibre.thread = Thread();
        fibre.thread.index = {i, 0, 0};
        fibre.done = false;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
        runnable.push_back(i);
    }
    u32 done = 0;
    while (!runnable.empty()) {
        size_t at = 0;
        if (order == 1) {
            at = runnable.size() - 1;
        } else if (order > 1) {
            order = order * 6364136223846793005ull + 1442695040888963407ull;
            at = (order >> 33) % runnable.size();
        }
        current = runnable[at];
        runnable.erase(runnable.begin() + (long)at);
        swapcontext(&scheduler, &fibres[current].context);
        done += fibres[current].done;
    }
    if (done != threads) {
        fail("a barrier that not all threads reach", std::to_string(done).c_str());
    }
}

template <typename Parameters>
std::function<void(const std::vector<u8>&)> bind(void (*function)(const Parameters)) {
    return [function](const std::vector<u8>& bytes) {
        if (bytes.size() != sizeof(Parameters)) {
            fail("parameters of the wrong size", std::to_string(bytes.size()).c_str());
        }
        Parameters parameters;
        std::memcpy((void*)&parameters, bytes.data(), sizeof parameters);
        kernel = [function, parameters] { function(parameters); };
    };
}

const std::map<std::string, std::function<void(const std::vector<u8>&)>> kernels = {
    {"prepare", bind(prepare)},
    {"fused_own", bind(fused_own)},
    {"fused_prepared_1", bind(fused_prepared_1)},
    {"fused_prepared_2", bind(fused_prepared_2)},
    {"fused_prepared_4", bind(fused_prepared_4)},
    {"spikes", bind(spikes)},
    {"reconstruct", bind(reconstruct)},
    {"batch_half", bind(batch_half)},
    {"batch_bfloat", bind(batch_bfloat)},
};

bool get(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
u64 number() {
    u64 value;
    if (!get(&value, 8)) {
        fail("input", "ends inside a command");
    }
    return value;
}
std::vector<u8> bytes(u64 length) {
    std::vector<u8> data(length);
    if (!get(data.data(), length)) {
        fail("input", "ends inside a command");
    }
    return data;
}
void put(const void* from, size_t bytes) {
    std::fwrite(from, 1, bytes, stdout);
    std::fflush(stdout);
}
}  // namespace shim

int main() {
    using namespace shim;
    std::map<u64, u8*> memory;
    char command;
    while (get(&command, 1)) {
        if (command == 'a') {
            u64 size = number();
            u8* data = (u8*)std::malloc(size);
            std::memset(data, 0xcb, size);
            memory[(u64)data] = data;
            u64 address = (u64)data;
            put(&address, 8);
        } else if (command == 'w') {
            u64 address = number(), length = number();
            std::vector<u8> data = bytes(length);
            std::memcpy((void*)address, data.data(), length);
        } else if (command == 'r') {
            u64 address = number(), length = number();
            put((void*)address, length);
        } else if (command == 'l') {
            std::vector<u8> name = bytes(number());
            auto found = kernels.find(std::string(name.begin(), name.end()));
            if (found == kernels.end()) {
                fail("no such kernel", std::string(name.begin(), name.end()).c_str());
            }
            u64 x = number(), y = number(), z = number();
            grid_size = {(u32)x, (u32)y, (u32)z};
            block_size = {(u32)number(), 1, 1};
            u64 shared_bytes = number(), order = number();
            found->second(bytes(number()));
            for (u64 block = 0; block < x * y * z; block++) {
                block_index = {(u32)(block % x), (u32)(block / x % y), (u32)(block / x / y)};
                // Anew for each block, so that its end is watched and its contents are nobody's.
                shared_memory = std::vector<u8>(shared_bytes, 0xcb);
                shared_memory.shrink_to_fit();
                run_block(order);
            }
            put("\0", 1);
        } else {
            fail("no such command", std::to_string(command).c_str());
        }
    }
    for (auto& [address, data] : memory) {
        std::free(data);
    }
}
