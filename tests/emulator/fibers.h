// The emulator's scheduler (see emulator.h): fibers, what they wait at, and a grid of blocks of them.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Set at every change of fiber.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace sdw {
namespace emulator {

constexpr size_t kStack = 64 * 1024;  // bytes a fiber
constexpr size_t kGuard = 256;        // bytes behind a block's shared memory, and at the end of a stack
constexpr unsigned char kPoison = 0xff;
constexpr int64_t kSpins = 20'000'000;  // pauses in a row, nothing else happening, that count as waiting for ever

struct Warp;
struct Block;

struct Copy {  // a cp.async on its way
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    Block* block = nullptr;
    Warp* warp = nullptr;
    int lane = 0;
    uint3 thread;
    bool started = false;
    ucontext_t start;
    jmp_buf context;
    unsigned char* stack = nullptr;
    std::vector<std::vector<Copy>> copies =
        std::vector<std::vector<Copy>>(1);  // groups of cp.async, oldest first; the last is still open
};

// Lanes of a warp that have come to a rendezvous. Inputs and outputs lie on the stacks of those who wait.
struct Warp {
    unsigned arrived = 0;
    const void* input[32];
    void* output[32];
    const void* operation[32];
    Fiber* lanes[32] = {};
};

struct Cluster {
    std::vector<Fiber*> waiting;  // at meet_cluster
    std::vector<Block*> blocks;   // by rank
    size_t threads = 0;
};

struct Block {
    uint3 index;
    Cluster* cluster = nullptr;
    std::vector<unsigned char> shared;
    std::vector<Warp> warps;
    std::vector<Fiber*> waiting;  // at __syncthreads
    int alive = 0;
    int votes = 0, outcome = 0;
};

struct State {
    uint64_t seed = 1, random = 1;
    int multiprocessors = 4;  // what resident_blocks() says, one block each
    size_t shared_limit = 227 * 1024;
    std::vector<Fiber*> ready;
    Fiber* current = nullptr;
    int64_t spins = 0;
    size_t alive = 0;
    std::string error;
    std::function<void()> body;
    jmp_buf caller;
    std::vector<std::unique_ptr<Fiber>> fibers;
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    std::mutex mutex;
};
inline State state;

inline unsigned draw(unsigned below) {
    state.random ^= state.random << 13;
    state.random ^= state.random >> 7;
    state.random ^= state.random << 17;
    return static_cast<unsigned>(((state.random >> 32) * below) >> 32);
}

[[noreturn]] inline void fail(const std::string& message) {
    state.error = message;
    _longjmp(state.caller, 1);
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::runtime_error(message);
}

// Leaves the current fiber for one drawn from those that can run.
[[noreturn]] inline void run_next() {
    if (state.alive == 0) _longjmp(state.caller, 1);
    if (state.ready.empty()) fail("emulator: threads wait at barriers that the others never reach");
    const unsigned i = draw(static_cast<unsigned>(state.ready.size()));
    Fiber* fiber = std::exchange(state.ready[i], state.ready.back());
    state.ready.pop_back();
    state.current = fiber;
    threadIdx = fiber->thread;
    blockIdx = fiber->block->index;
    if (std::exchange(fiber->started, true)) _longjmp(fiber->context, 1);
    setcontext(&fiber->start);
    fail("emulator: setcontext failed");
}

// Waits until another fiber puts this one among those that can run. (_setjmp, unlike swapcontext, is no system call.)
inline void suspend() {
    if (_setjmp(state.current->context) == 0) run_next();
}

inline void step_aside() {
    state.ready.push_back(state.current);
    suspend();
}

// Where real threads meet memory that others write, sometimes lets others go first.
inline void maybe_step_aside() {
    state.spins = 0;
    if (draw(4) == 0) step_aside();
}

inline void release(Block& block) {
    block.outcome = std::exchange(block.votes, 0);
    for (Fiber* fiber : block.waiting) state.ready.push_back(fiber);
    block.waiting.clear();
    state.spins = 0;
}

// Returns the number of threads that said yes.
inline int barrier(bool vote) {
    Block& block = *state.current->block;
    block.votes += vote;
    block.waiting.push_back(state.current);
    if (static_cast<int>(block.waiting.size()) == block.alive) release(block);
    suspend();
    return block.outcome;
}

inline void cluster_barrier() {
    Cluster& cluster = *state.current->block->cluster;
    cluster.waiting.push_back(state.current);
    if (cluster.waiting.size() == cluster.threads) {
        for (Fiber* fiber : std::exchange(cluster.waiting, {})) state.ready.push_back(fiber);
        state.spins = 0;
    }
    suspend();
}

// The lanes of `mask` meet; the last to come computes all outputs: function(inputs, outputs), 32 pointers each.
template <typename In, typename Out, typename Function>
Out rendezvous(unsigned mask, const In& input, Function function) {
    static const char operation = 0;  // one a Function
    Out output{};
    Fiber& self = *state.current;
    Warp& warp = *self.warp;
    require(mask >> self.lane & 1u, "emulator: a lane called a warp function whose mask does not name it");
    warp.input[self.lane] = &input;
    warp.output[self.lane] = &output;
    warp.operation[self.lane] = &operation;
    warp.arrived |= 1u << self.lane;
    if ((warp.arrived & mask) != mask) {
        suspend();
        return output;
    }
    const In* inputs[32] = {};
    Out* outputs[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        require(warp.operation[lane] == &operation, "emulator: lanes of a warp met in different functions");
        inputs[lane] = static_cast<const In*>(warp.input[lane]);
        outputs[lane] = static_cast<Out*>(warp.output[lane]);
        if (lane != self.lane) state.ready.push_back(warp.lanes[lane]);
    }
    warp.arrived &= ~mask;
    function(inputs, outputs);
    maybe_step_aside();
    return output;
}

// Every lane reads the value of the lane that source(lane) names; its own where that is outside the mask.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, Source source) {
    struct Input {
        T value;
        int from;
    };
    const Input input{value, source(state.current->lane)};
    return rendezvous<Input, T>(mask, input, [](const Input* const* inputs, T* const* outputs) {
        for (int lane = 0; lane < 32; ++lane) {
            if (outputs[lane] == nullptr) continue;
            const int from = inputs[lane]->from;
            const Input* const chosen = from >= 0 && from < 32 ? inputs[from] : nullptr;
            *outputs[lane] = (chosen == nullptr ? inputs[lane] : chosen)->value;
        }
    });
}

inline unsigned ballot(unsigned mask, bool vote) {
    return rendezvous<bool, unsigned>(mask, vote, [](const bool* const* inputs, unsigned* const* outputs) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= inputs[lane] != nullptr && *inputs[lane] ? 1u << lane : 0u;
        for (int lane = 0; lane < 32; ++lane)
            if (outputs[lane] != nullptr) *outputs[lane] = votes;
    });
}

inline void check_guard(const unsigned char* guard, const char* message) {
    require(std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kPoison; }), message);
}

inline void finish_block(Block& block) {
    check_guard(block.shared.data() + block.shared.size() - kGuard, "emulator: a block wrote past its shared memory");
}

// The life of a fiber; never returns.
inline void run_fiber() {
    try {
        state.body();
        Fiber& self = *state.current;
        for (const auto& group : self.copies) require(group.empty(), "emulator: a thread left a cp.async unawaited");
        check_guard(self.stack, "emulator: a thread used more stack than it has");
        Block& block = *self.block;
        if (--block.alive == 0) finish_block(block);
        if (block.alive > 0 && static_cast<int>(block.waiting.size()) == block.alive) release(block);
    } catch (const std::exception& error) {
        fail(error.what());
    }
    --state.alive;
    run_next();
}

inline void reserve_stacks(size_t count) {
    if (count <= state.stack_count) return;
    if (state.stacks != nullptr) munmap(state.stacks, state.stack_count * kStack);
    void* memory =
        mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED, "emulator: no memory for the threads' stacks");
    state.stacks = static_cast<unsigned char*>(memory);
    state.stack_count = count;
}

inline void start_fiber(Fiber& fiber, size_t number, Block& block, unsigned thread) {
    fiber.block = &block;
    fiber.warp = &block.warps[thread / 32];
    fiber.lane = static_cast<int>(thread % 32);
    fiber.warp->lanes[fiber.lane] = &fiber;
    fiber.thread.x = thread % blockDim.x;
    fiber.thread.y = thread / blockDim.x % blockDim.y;
    fiber.thread.z = thread / blockDim.x / blockDim.y;
    fiber.stack = state.stacks + number * kStack;
    std::memset(fiber.stack, kPoison, kGuard);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
}

// Runs these blocks, all alive at once, neighbors in clusters.
inline void run_blocks(const std::vector<unsigned>& numbers, unsigned cluster, size_t shared_bytes) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    std::vector<Block> blocks(numbers.size());
    std::vector<Cluster> clusters(gridDim.x * gridDim.y * gridDim.z / cluster + 1);
    reserve_stacks(blocks.size() * threads);
    state.ready.clear();
    state.fibers.clear();
    state.error.clear();
    state.spins = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
        Block& block = blocks[b];
        block.index.x = numbers[b] % gridDim.x;
        block.index.y = numbers[b] / gridDim.x % gridDim.y;
        block.index.z = numbers[b] / gridDim.x / gridDim.y;
        block.cluster = &clusters[numbers[b] / cluster];
        block.cluster->threads = cluster * threads;
        block.cluster->blocks.resize(cluster);
        block.cluster->blocks[numbers[b] % cluster] = &block;
        block.shared.assign(shared_bytes + kGuard, kPoison);
        block.warps.resize((threads + 31) / 32);
        block.alive = static_cast<int>(threads);
        for (unsigned thread = 0; thread < threads; ++thread) {
            state.fibers.push_back(std::make_unique<Fiber>());
            start_fiber(*state.fibers.back(), b * threads + thread, block, thread);
            state.ready.push_back(state.fibers.back().get());
        }
    }
    state.alive = state.fibers.size();
    if (_setjmp(state.caller) == 0) run_next();
    if (!state.error.empty()) throw std::runtime_error(state.error);
}

template <typename... Params, typename... Args>
void run_grid(bool cooperative, unsigned cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
              Args... args) {
    const std::lock_guard<std::mutex> lock(state.mutex);
    require(block.x * block.y * block.z <= 1024, "emulator: more than 1024 threads a block");
    require(block.x * block.y * block.z > 0 && grid.x * grid.y * grid.z > 0, "emulator: an empty grid or block");
    state.random = state.seed * 0x9e3779b97f4a7c15u | 1u;
    for (int i = 0; i < 8; ++i) draw(2);
    state.body = [=] { kernel(static_cast<Params>(args)...); };
    gridDim = grid;
    blockDim = block;
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < order.size(); ++i) {
        order[i] = i;
        std::swap(order[i], order[draw(i + 1)]);
    }
    require(gridDim.x % cluster == 0, "emulator: a grid of broken clusters");
    if (cooperative) return run_blocks(order, cluster, shared_bytes);
    for (unsigned number : order) run_blocks({number}, 1, shared_bytes);
}

// A cp.async may land at any time until it is waited for: at once or at the last moment, by draw.
inline void copy_async(void* to, const void* from, size_t bytes) {
    const auto aligned = [=](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    require(aligned(to) && aligned(from), "emulator: a cp.async is not aligned to its size");
    if (draw(2) == 0)
        std::memcpy(to, from, bytes);
    else
        state.current->copies.back().push_back({to, from, bytes});
}

// An mbarrier for one arrival, which announces how many bytes the phase takes.
struct Mailbox {
    int32_t missing = 0;  // bytes announced less bytes that came
    uint16_t announced = 0, phase = 0;

    bool is_past(unsigned parity) const { return (phase & 1u) != parity; }
    void expect(int bytes) {
        require(announced == 0, "emulator: a phase of a mailbox was announced twice");
        announced = 1;
        take(-bytes);
    }
    void take(int bytes) {
        missing -= bytes;
        if (announced == 0 || missing != 0) return;
        announced = 0;
        ++phase;
        state.spins = 0;
    }
};

// The address of this block's shared memory in another block of the cluster.
template <typename T>
T* in_block(T* address, unsigned rank) {
    Block& self = *state.current->block;
    require(rank < self.cluster->blocks.size(), "emulator: no such block in the cluster");
    Block& other = *self.cluster->blocks[rank];
    require(other.alive > 0, "emulator: a block wrote to one that has ended");
    return reinterpret_cast<T*>(other.shared.data() + (reinterpret_cast<unsigned char*>(address) - self.shared.data()));
}

inline void mail(float* to, Mailbox* mailbox, unsigned rank, std::initializer_list<float> numbers) {
    maybe_step_aside();
    std::copy(numbers.begin(), numbers.end(), in_block(to, rank));
    in_block(mailbox, rank)->take(static_cast<int>(numbers.size() * sizeof(float)));
}

inline void copy_async_commit() { state.current->copies.emplace_back(); }

// Completes all but the last `pending` groups.
inline void copy_async_wait(size_t pending) {
    auto& groups = state.current->copies;
    while (groups.size() > pending + 1) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

}  // namespace emulator

}  // namespace sdw
