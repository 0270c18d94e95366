// Who a block is in unrolled_bc's kernels, and how the blocks of its team pass each other the rows that they compute.
//
// A team (a cluster) takes 16 rows through all layers; of every product each block computes some columns, and of the
// next one each needs all of them. They go straight into the others' shared memory: a strip of 16 rows, laid out as the
// left operand of the next product, and a mailbox that counts the bytes that have come. Nobody waits for more than
// that, nor for what is on its way to global memory at the same time. Two strips take turns. A block sends into a strip
// what it computed from the other one, all of which it had received; that every block had contributed to it, and so was
// through with the strip before, where all have columns: else they meet.
//
// A team of one block stores into its own strip. Where strips do not fit into shared memory (above about a thousand
// columns) rows go through global memory, and the blocks meet after each product.
#pragma once

#include "mma.h"
#include "product.h"

namespace sdw::unrolled {

// A block's shared memory: two mailboxes, two times partial sums, two strips.
constexpr size_t kMailboxBytes = 16;
constexpr int kPartials = partial_floats(2, 1) > partial_floats(1, 2) ? partial_floats(2, 1) : partial_floats(1, 2);

inline size_t strip_floats(const Network& net) { return 16 * static_cast<size_t>(net.widest()); }
inline size_t shared_bytes(size_t strip) {
    return kMailboxBytes + (2 * static_cast<size_t>(kPartials) + 2 * strip) * sizeof(float);
}

struct Member {
    int rank, members;  // of the group
    int part, parts;    // of the team
    int warp, lane;
    unsigned* counter;
    unsigned round = 0;
    Mailbox* mailboxes;
    float *partial, *strips;  // strips: null where they do not fit
    int strip;                // floats of one
    unsigned half = 0;        // of the partial sums, see run_tiles()
    unsigned sent = 0, received = 0;
    Neighbor half_team[kMaxParts / 2];  // whom this thread sends to, see send_part()

    __device__ Member(const Groups& groups, unsigned* counters, int strip_)
        : rank(blockIdx.x % groups.members),
          members(groups.members),
          part(rank % groups.parts),
          parts(groups.parts),
          warp(warp_index()),
          lane(threadIdx.x % 32),
          counter(counters + kCounterStride * (blockIdx.x / groups.members)),
          mailboxes(reinterpret_cast<Mailbox*>(shared_memory())),
          partial(reinterpret_cast<float*>(shared_memory() + kMailboxBytes)),
          strips(strip_ == 0 ? nullptr : partial + 2 * kPartials),
          strip(strip_) {
        if (parts == 1 || strips == nullptr) return;
        const int first = lane % 2 == 0 ? 0 : parts / 2;
        for (int i = 0; i < kMaxParts / 2; ++i)
            half_team[i] = Neighbor(static_cast<unsigned>(min(first + i, parts - 1)));
        if (threadIdx.x == 0)
            for (int i = 0; i < 2; ++i) mailboxes[i].open();
        meet_cluster();
    }

    __device__ int team() const { return rank / parts; }
    __device__ int teams() const { return members / parts; }
    __device__ int thread() const { return rank * kThreads + static_cast<int>(threadIdx.x); }
    __device__ int threads() const { return members * kThreads; }

    __device__ void wait() { meet(counter, members, ++round); }
    __device__ void wait_team() const {
        if (parts == 1)
            __syncthreads();
        else
            meet_cluster();
    }

    // Before each product, all threads of the team: waits for the strip that it reads, if any; makes ready for the one
    // that it writes, of `sends` columns, if any. idle: some block of the team has no columns of the product.
    __device__ void start_product(bool receives, bool idle, int sends) {
        if (strips == nullptr) return receives ? wait_team() : void();
        if (receives) {
            if (parts == 1)
                __syncthreads();
            else
                mailboxes[received & 1].wait(received >> 1 & 1);
            ++received;
        }
        if (parts > 1 && idle) meet_cluster_unordered();
        if (sends == 0) return;
        if (parts > 1 && threadIdx.x == 0) mailboxes[sent & 1].expect(16 * sends * static_cast<int>(sizeof(float)));
        ++sent;
    }
    __device__ const float* received_strip() const { return strips + ((received - 1) & 1) * strip; }

    // Neighbors of the strip's matrix, `at` its place in tiles. By a warp for an 8 x 8 part of it, as run_tiles() gives
    // it: lanes with an even t take four neighbors to one half of the team, those with an odd one to the other.
    __device__ void send_part(int at, float x0, float x1) const {
        if (strips == nullptr) return;
        if (parts == 1) return put(at, x0, x1);
        const bool odd = lane % 2 != 0;
        const float other0 = __shfl_xor_sync(0xffffffffu, x0, 1), other1 = __shfl_xor_sync(0xffffffffu, x1, 1);
        const float4 x = odd ? make_float4(other0, other1, x0, x1) : make_float4(x0, x1, other0, other1);
        const unsigned index = (sent - 1) & 1;
        float* const to = strips + index * strip + (odd ? at - 2 : at);
#pragma unroll
        for (int i = 0; i < kMaxParts / 2; ++i)
            if (i < parts / 2) half_team[i].mail(to, mailboxes + index, x);
    }
    // The same by a thread alone.
    __device__ void send(int at, float x0, float x1) const {
        if (strips == nullptr) return;
        if (parts == 1) return put(at, x0, x1);
        const unsigned index = (sent - 1) & 1;
        for (int i = 0; i < parts; ++i)
            Neighbor(static_cast<unsigned>(i))
                .mail(strips + index * strip + at, mailboxes + index, make_float2(x0, x1));
    }
    __device__ void put(int at, float x0, float x1) const {
        *reinterpret_cast<float2*>(strips + ((sent - 1) & 1) * strip + at) = make_float2(x0, x1);
    }
};

// Where the tile of 16 rows and 32 columns of this number lies in a matrix, and in its transpose.
struct Corner {
    int in_matrix, in_transpose;

    __device__ Corner(int row_tile, int column_tile, int height, int width)
        : in_matrix((row_tile / 2 * (width / 16) + 2 * column_tile) * kBlock + row_tile % 2 * kStripBlock),
          in_transpose((column_tile * (height / 16) + row_tile) * kBlock) {}
};

// The tiles of a stage for one tile of rows: products begin, begin + step, ... up to end, this block's columns of each.
// Stage has
//     columns(l), task(l)           the product's columns, and its operands from the first column on
//     receives(l), sends(l)         whether its left[0] comes from the product before, and its result goes to the next
//     left(l)                       left[0] where there are no strips
//     fetch(l, group, place), finish(l, group, place, x0, x1, fetched, me), store(l, group, place, x)
//                                   as run_tiles() has them, of columns 32 group and following
// A tile is kGroups (1 or 2) groups of columns of this block, as far as there are.
template <typename Stage>
struct RowTiles {
    static constexpr int kTerms = Stage::kTerms;
    static constexpr bool kLate = true;
    const Stage& stage;
    Member& me;
    int l, group, groups, started;  // of 32 columns

    __device__ RowTiles(const Stage& stage_, Member& me_) : stage(stage_), me(me_), l(stage_.begin), started(l) {
        settle();
    }

    __device__ void settle() {
        group = me.part;
        for (; l != stage.end; l += Stage::step) {
            groups = stage.columns(l) / kColumns;
            if (group < groups) return;
        }
    }
    __device__ bool valid() const { return l != stage.end; }
    __device__ void advance() {
        group += Stage::kGroups * me.parts;
        if (group < groups) return;
        l += Stage::step;
        settle();
    }
    __device__ Task task() const {
        Task task = stage.task(l);
        const int64_t offset = static_cast<int64_t>(group) * task.chunks * kBlock;
        task.term[0].right += offset;
        task.term[1].right += offset;
        if (Stage::kGroups == 2 && group + me.parts < groups)
            task.second = static_cast<int64_t>(me.parts) * task.chunks * kBlock;
        if (stage.receives(l)) task.late = me.strips == nullptr ? kBlock : kStripBlock;
        return task;
    }
    // Starts products up to this one, those that this block has no columns of too.
    __device__ void ready() { start_before(l + Stage::step); }
    __device__ void start_before(int end) {
        for (; started != end; started += Stage::step) {
            const int columns = stage.columns(started);
            me.start_product(stage.receives(started), columns < kColumns * me.parts,
                             stage.sends(started) ? columns : 0);
        }
    }
    template <typename Load>
    __device__ void late_left(Load load) const {
        if (me.strips == nullptr) return load(stage.left(l), kBlock);
        load(me.received_strip(), kStripBlock);
    }
    __device__ auto fetch(const Place& place, int n) const { return stage.fetch(l, group + n * me.parts, place); }
    template <typename Fetched>
    __device__ float2 finish(const Place& place, int n, float x0, float x1, const Fetched& fetched) const {
        return stage.finish(l, group + n * me.parts, place, x0, x1, fetched, me);
    }
    __device__ void store(const Place& place, int n, float2 x) const { stage.store(l, group + n * me.parts, place, x); }
    __device__ void finish_left(int, float) const {}
};

template <typename Product, typename Stage>
__device__ void run_stage(const Stage& stage, Member& me) {
    RowTiles<Stage> tiles(stage, me);
    run_tiles<Product, 1, Stage::kGroups>(tiles, me.partial, me.half);
    tiles.start_before(stage.end);
}

}  // namespace sdw::unrolled
