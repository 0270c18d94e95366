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

inline size_t strip_floats(const Network& net) { return 16 * static_cast<size_t>(net.widest()); }
inline size_t shared_bytes(size_t strip) { return kMailboxBytes + (2 * partial_floats(2) + 2 * strip) * sizeof(float); }

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

    __device__ Member(const Groups& groups, unsigned* counters, int strip_)
        : rank(blockIdx.x % groups.members),
          members(groups.members),
          part(rank % groups.parts),
          parts(groups.parts),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          counter(counters + kCounterStride * (blockIdx.x / groups.members)),
          mailboxes(reinterpret_cast<Mailbox*>(shared_memory())),
          partial(reinterpret_cast<float*>(shared_memory() + kMailboxBytes)),
          strips(strip_ == 0 ? nullptr : partial + 2 * partial_floats(2)),
          strip(strip_) {
        if (parts == 1 || strips == nullptr) return;
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

    // Row 0 to 15 of the strip, and neighbors of it in a matrix of `width` columns.
    __device__ void send(int row, int column, int width, float x0, float x1) const {
        if (strips == nullptr) return;
        const unsigned index = (sent - 1) & 1;
        float* const to = strips + index * strip + tiled(row, column, width);
        if (parts == 1) {
            *reinterpret_cast<float2*>(to) = make_float2(x0, x1);
            return;
        }
        for (int i = 0; i < parts; ++i) mail(to, mailboxes + index, static_cast<unsigned>(i), x0, x1);
    }
};

// The tiles of a stage: products begin, begin + step, ... up to end, this block's columns of each. Stage has
//     columns(l), task(l)           the product's columns, and its operands from the first column on
//     receives(l), sends(l)         whether its left[0] comes from the product before, and its result goes to the next
//     left(l)                       left[0] where there are no strips
//     fetch(l, row, column), finish(l, row, column, x0, x1, fetched)     as run_tiles() has them
template <typename Stage>
struct RowTiles {
    const Stage& stage;
    Member& me;
    int l, group = 0, started;

    __device__ RowTiles(const Stage& stage_, Member& me_) : stage(stage_), me(me_), l(stage_.begin), started(l) {
        group = me.part;
        skip();
    }

    __device__ void skip() {
        while (l != stage.end && kColumns * group >= stage.columns(l)) {
            l += Stage::step;
            group = me.part;
        }
    }
    __device__ bool valid() const { return l != stage.end; }
    __device__ void advance() {
        group += me.parts;
        skip();
    }
    __device__ Task task() const {
        Task task = stage.task(l);
        const int first = kTiles * group;
        for (Term& term : task.term) term.right += static_cast<int64_t>(first) * task.chunks * 128;
        task.left_tiles = 1;
        task.right_tiles = stage.columns(l) / 8 - first;
        task.late = stage.receives(l);
        task.left_sums = false;
        return task;
    }
    // Starts products up to this one, those that this block has no columns of too.
    __device__ void ready() {
        for (; started != l + Stage::step; started += Stage::step) start(started);
    }
    __device__ void finish_stage() {
        for (; started != stage.end; started += Stage::step) start(started);
    }
    __device__ void start(int product) const {
        const int columns = stage.columns(product);
        me.start_product(stage.receives(product), columns <= kColumns * (me.parts - 1),
                         stage.sends(product) ? columns : 0);
    }
    __device__ const float* late_left() const { return me.strips == nullptr ? stage.left(l) : me.received_strip(); }
    __device__ auto fetch(Place at) const { return stage.fetch(l, at.row, kColumns * group + at.column); }
    template <typename Fetched>
    __device__ void finish(Place at, float x0, float x1, const Fetched& fetched) const {
        stage.finish(l, at.row, kColumns * group + at.column, x0, x1, fetched, me);
    }
    __device__ void finish_left(int, float) const {}
};

template <typename Product, typename Stage>
__device__ void run_stage(const Stage& stage, Member& me) {
    RowTiles<Stage> tiles(stage, me);
    run_tiles<Product, 1>(tiles, me.partial, me.half);
    tiles.finish_stage();
}

}  // namespace sdw::unrolled
