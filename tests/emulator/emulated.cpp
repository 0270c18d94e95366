// The module that tests import in place of a GPU: the CUDA ops, run by the emulator, and kernels that test the
// emulator.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/mma.h"
#include "../../csrc/cuda/unrolled_bc_schedule.h"

namespace py = pybind11;

namespace sdw {

void bind_behavior_matching(py::module_& m);
void bind_knn(py::module_& m);
void bind_scale(py::module_& m);
void bind_unrolled_bc(py::module_& m);
void bind_weighted_bc_loss(py::module_& m);

}  // namespace sdw

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

struct SumParams {
    const float* values;  // one a thread of the grid
    float* sums;          // one a block
    bool barriers;        // false: the mistake that the emulator must show
};

// Sums a block's values in shared memory, halving.
__global__ void block_sum(SumParams p) {
    float* shared = reinterpret_cast<float*>(sdw::shared_memory());
    shared[threadIdx.x] = p.values[blockIdx.x * blockDim.x + threadIdx.x];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (p.barriers) __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) p.sums[blockIdx.x] = shared[0];
}

// The same by shuffles within warps.
__global__ void warp_sum(SumParams p) {
    float value = p.values[blockIdx.x * blockDim.x + threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    float* shared = reinterpret_cast<float*>(sdw::shared_memory());
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x != 0) return;
    p.sums[blockIdx.x] = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) p.sums[blockIdx.x] += shared[warp];
}

struct RingParams {
    float* values;  // one a block, and as many again
    unsigned* counter;
    int rounds;
    bool barriers;
};

// In every round each block replaces its value by the sum of its neighbors', all at once.
__global__ void ring(RingParams p) {
    for (int round = 0; round < p.rounds; ++round) {
        const float* from = p.values + round % 2 * gridDim.x;
        float* to = p.values + (round + 1) % 2 * gridDim.x;
        if (threadIdx.x == 0)
            to[blockIdx.x] = from[(blockIdx.x + 1) % gridDim.x] + from[(blockIdx.x + gridDim.x - 1) % gridDim.x];
        if (p.barriers)
            sdw::meet(p.counter, gridDim.x, round + 1);
        else
            __syncthreads();
    }
}

// One tile of the tensor core: d (16, 8) = a (16, 8) b (8, 8), operands through cp.async.
struct TileParams {
    const float *a, *b;
    float* d;
    bool wait;
};

__global__ void tile(TileParams p) {
    float* a = reinterpret_cast<float*>(sdw::shared_memory());
    float* b = a + 128;
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    sdw::copy_async_16(a + 4 * lane, p.a + 4 * lane);
    if (lane < 16) sdw::copy_async_16(b + 4 * lane, p.b + 4 * lane);
    sdw::copy_async_commit();
    if (p.wait) sdw::copy_async_wait<0>();
    __syncwarp();
    float d[4] = {0, 0, 0, 0};
    const float left[4] = {sdw::to_tf32(a[g * 8 + t]), sdw::to_tf32(a[(g + 8) * 8 + t]), sdw::to_tf32(a[g * 8 + t + 4]),
                           sdw::to_tf32(a[(g + 8) * 8 + t + 4])};
    const float right[2] = {sdw::to_tf32(b[t * 8 + g]), sdw::to_tf32(b[(t + 4) * 8 + g])};
    sdw::mma_tf32(d, left, right);
    for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
    sdw::copy_async_wait<0>();
}

struct CountParams {
    int* counts;  // yes votes of the block, of lane 0's warp, lanes below that voted yes, 1 + the grid's running number
    int fault;    // 0 none, 1 a barrier inside a branch, 2 shared memory overrun, 3 a spin without end
};

__global__ void count(CountParams p) {
    const bool vote = threadIdx.x % 3 == 0;
    const int votes = __syncthreads_count(vote);
    const unsigned ballot = __ballot_sync(0xffffffffu, vote);
    const int previous = __shfl_up_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
    atomicAdd(p.counts, previous);
    if (p.fault == 1 && threadIdx.x == 0) __syncthreads();
    if (p.fault == 1) __syncwarp();
    if (p.fault == 2) sdw::shared_memory()[threadIdx.x] = 1;
    while (p.fault == 3 && sdw::load_acquire(reinterpret_cast<unsigned*>(p.counts) + 3) == 0) sdw::spin_pause();
    if (threadIdx.x == 0) {
        p.counts[1] = votes;
        p.counts[2] = static_cast<int>(ballot);
    }
}

// What unrolled_bc_schedule.h decides for a problem, in plain numbers.
py::dict unrolled_bc_schedule(const sdw::UnrolledBCParams& problem, int resident) {
    using namespace sdw::unrolled;
    const Network net = make_network(problem);
    const Plan plan = make_plan(problem);
    const Layout at = make_layout(net, plan);
    const Groups groups =
        make_groups(problem.problems, net, {resident, resident / 2 * 2, resident / 4 * 4, resident / 8 * 8});
    py::list layers, weights;
    for (int l = 0; l < net.layers; ++l) {
        const Layer& x = net.layer[l];
        layers.append(py::dict(py::arg("in_padded") = x.in_padded, py::arg("out_padded") = x.out_padded,
                               py::arg("flat") = x.flat, py::arg("weights") = x.weights, py::arg("biases") = x.biases,
                               py::arg("h") = x.h, py::arg("delta") = x.delta));
    }
    for (int rank = 0; rank < groups.members; ++rank) {
        for (int index = rank; weight_tile(net, index).layer < net.layers; index += groups.members) {
            const WeightTile tile = weight_tile(net, index);
            weights.append(py::make_tuple(tile.layer, tile.row, tile.column));
        }
    }
    std::vector<int> rows;
    for (int team = 0; team < groups.members / groups.parts; ++team)
        for (int tile = team; tile < net.row_tiles(); tile += groups.members / groups.parts) rows.push_back(tile);
    const std::vector<int64_t> parts{
        at.observations,     at.actions,  at.theta,     at.passes,  at.velocity,
        at.starts,           at.adjoint,  at.direction, at.tangent, at.observations_gradient,
        at.actions_gradient, at.lr_terms, at.floats};
    return py::dict(py::arg("layers") = layers, py::arg("theta") = net.theta, py::arg("pass") = net.pass,
                    py::arg("flat") = net.flat, py::arg("length") = plan.length, py::arg("segments") = plan.segments,
                    py::arg("groups") = groups.groups, py::arg("members") = groups.members,
                    py::arg("parts_of_a_team") = groups.parts, py::arg("weights") = weights, py::arg("rows") = rows,
                    py::arg("parts") = parts);
}

}  // namespace

PYBIND11_MODULE(sdw_emulated, m) {
    sdw::bind_behavior_matching(m);
    sdw::bind_knn(m);
    sdw::bind_scale(m);
    sdw::bind_unrolled_bc(m);
    sdw::bind_weighted_bc_loss(m);
    m.def("unrolled_bc_schedule", unrolled_bc_schedule);
    m.def("tiled", sdw::unrolled::tiled);
    m.def("to_half", &sdw::emulator::to_half);
    m.def("from_half", &sdw::emulator::from_half);
    m.def("set_seed", [](uint64_t seed) { sdw::emulator::state.seed = seed; });
    m.def("set_multiprocessors", [](int count) { sdw::emulator::state.multiprocessors = count; });
    m.def("set_shared_limit", [](size_t bytes) { sdw::emulator::state.shared_limit = bytes; });

    m.def("block_sum", [](const Floats& values, unsigned threads, bool warps, bool barriers) {
        const auto blocks = static_cast<unsigned>(values.size()) / threads;
        Floats sums(blocks);
        sdw::launch(warps ? warp_sum : block_sum, blocks, threads, threads * sizeof(float), nullptr,
                    SumParams{values.data(), sums.mutable_data(), barriers});
        return sums;
    });
    m.def("ring", [](const Floats& values, int rounds, bool barriers) {
        const auto blocks = static_cast<unsigned>(values.size());
        std::vector<float> both(values.data(), values.data() + blocks);
        both.resize(2 * blocks);
        unsigned counter = 0;
        sdw::launch_cooperative(ring, blocks, 32, 0, nullptr, RingParams{both.data(), &counter, rounds, barriers});
        return Floats(blocks, both.data() + rounds % 2 * blocks);
    });
    m.def("tile", [](const Floats& a, const Floats& b, bool wait) {
        Floats d({16, 8});
        sdw::launch(tile, 1, 32, 192 * sizeof(float), nullptr, TileParams{a.data(), b.data(), d.mutable_data(), wait});
        return d;
    });
    m.def("count", [](int fault) {
        std::vector<int> counts(4);
        sdw::launch(count, 1, 64, fault == 2 ? 63 : 0, nullptr, CountParams{counts.data(), fault});
        return counts;
    });
    m.def("launch", [](unsigned threads) { sdw::launch(count, 1, threads, 0, nullptr, CountParams{nullptr, 0}); });
}
