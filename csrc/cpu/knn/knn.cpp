// Exact k nearest neighbors by a join of blocks.
//
//     tree.h    References lie in blocks of 16, the leaves of a balanced kd-tree on the principal axes, each stored
//     axis
//               by axis so that 16 candidates are tested at once; the boxes of 16 siblings likewise.
//     Join      Queries come in groups of up to 16 that lie next to each other (below).
//     group.h   A group has of each query a sorted list of candidates and the threshold that follows from it.
//     walk.h    Groups of one node share a walk through the tree, which drops what lies beyond their thresholds.
//     scan.h    Where sampled groups had to look at nearly everything, all references are scanned instead.
//     exact.h   Candidates are ranked by double distances.
//
// Exactness. Walk and scan work on float coordinates; the answer is defined by double distances d of the points as
// given. With τ the k-th smallest float squared distance, T(τ) = widen·τ + slack bounds the float squared distance of
// every point whose true distance is not above the true k-th (`KnnBounds`). All candidates up to T are kept, in a list
// with room for more than k, and ranked by d at the end. Where the room did not suffice (many ties, or neighbors closer
// than float resolves) the query is searched again, ranked by d from the start.
#include "sdw/knn.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "../team.h"
#include "exact.h"
#include "group.h"
#include "scan.h"
#include "sdw/isa.h"
#include "sdw/knn_bounds.h"
#include "tree.h"
#include "walk.h"

namespace sdw {
namespace SDW_ISA {
namespace {

class Join final : public KnnJoin {
  public:
    Join(const Tree& tree, const KnnParams& asked) : tree_(tree), asked_(asked), queries_(asked_.queries) {
        if (queries_.coordinates == tree.references.coordinates)
            group_by_block();
        else
            group_by_place();
        if (scans_ = scan_is_cheaper(); scans_) regroup_for_scan();
    }

    int64_t groups() const override { return static_cast<int64_t>(start_.size()); }
    int64_t rows(int64_t first, int64_t last) const override { return begin_[last] - begin_[first]; }
    bool scans() const override { return scans_; }

    // Threads take as many groups at a time as walk together.
    void search(int64_t first, int64_t last, const KnnParams& answer) const override {
        const int threads = static_cast<int>(std::clamp<int64_t>((last - first) / kTogether, 1, num_threads()));
        std::deque<Searcher> searchers;
        for (int member = 0; member < threads; ++member) searchers.emplace_back(*this);
        std::atomic<int64_t> next{first};
        Team::run(threads, [&](int member, Team&) {
            while (true) {
                int64_t g = next.fetch_add(kTogether);
                const int64_t end = std::min(last, g + kTogether);
                if (g >= end) return;
                while (g < end) {
                    const int64_t at = begin_[g] - begin_[first];
                    g = searchers[member].search(g, end, answer.query + at, answer.squared + at * asked_.k,
                                                 answer.index + at * asked_.k);
                }
            }
        });
    }

  private:
    // What a thread searches with.
    class Searcher {
      public:
        explicit Searcher(const Join& join)
            : join_(join), groups_(new_groups(join, join.scans_ ? 1 : kTogether)), walk_(join.tree_, groups_) {
            for (Group& group : groups_) exact_.emplace_back(join.tree_, group);
        }

        // Searches groups [first, last), or as many of them as lie in one node; returns where it stopped.
        int64_t search(int64_t first, int64_t last, int64_t* query, double* squared, int64_t* index) {
            const int64_t dims = join_.queries_.dims, k = join_.asked_.k;
            const auto node = [&](int64_t g) { return join_.start_[g] / (kFan * kFan); };
            int count = 0;
            for (Group& group : groups_) {
                const int64_t g = first + count;
                if (g == last || node(g) != node(first)) break;
                group.take(join_.order_.data() + join_.begin_[g], static_cast<int>(join_.rows(g, g + 1)),
                           join_.scans_ ? KnnBounds::product(dims) : KnnBounds::differences(dims));
                ++count;
            }
            if (join_.scans_)
                scan_all(join_.tree_, groups_[0]);
            else
                walk_.run(&join_.start_[first], count);
            for (int i = 0; i < count; ++i) {
                const int64_t at = join_.rows(first, first + i);
                exact_[i].finish(query + at, squared + at * k, index + at * k);
            }
            return first + count;
        }

        int64_t work() const {
            int64_t sum = 0;
            for (const Group& group : groups_) sum += group.work;
            return sum;
        }

      private:
        static std::deque<Group> new_groups(const Join& join, int count) {
            std::deque<Group> groups;
            for (int i = 0; i < count; ++i) groups.emplace_back(join.tree_, join.asked_, join.scans_ ? kBatch : kFan);
            return groups;
        }

        const Join& join_;
        std::deque<Group> groups_;
        Walk walk_;
        std::deque<Exact> exact_;
    };

    // The self-join: a block of the tree is a group.
    void group_by_block() {
        order_.assign(tree_.row.begin(), tree_.row.begin() + queries_.rows);
        for (int64_t block = 0; block < tree_.blocks; ++block) {
            begin_.push_back(block * kFan);
            start_.push_back(static_cast<uint32_t>(block));
        }
        begin_.push_back(queries_.rows);
    }

    // Sorts the queries by the block whose box is nearest, level by level; a group ends where the node of cells
    // changes.
    void group_by_place() {
        std::vector<std::pair<uint32_t, uint32_t>> placed(queries_.rows);  // block, query
        const auto place = [&](int64_t i) {
            const float* x = queries_.coordinates + i * queries_.dims;
            int64_t node = 0;
            for (auto level = tree_.levels.rbegin(); level != tree_.levels.rend(); ++level) {
                alignas(64) float distance[kFan];
                store_block(distance, box_distances(*level, node, queries_.dims, x, kNone));
                node = node * kFan + (std::min_element(distance, distance + kFan) - distance);
            }
            placed[i] = {static_cast<uint32_t>(node), static_cast<uint32_t>(i)};
        };
        Team::run(queries_.rows < 4096 ? 1 : num_threads(), [&](int member, Team& team) {
            const Range share = team.share(queries_.rows, member);
            for (int64_t i = share.begin; i < share.end; ++i) place(i);
        });
        std::sort(placed.begin(), placed.end());
        constexpr uint32_t kNode = kFan * kFan;
        order_.resize(queries_.rows);
        for (int64_t i = 0; i < queries_.rows; ++i) {
            order_[i] = placed[i].second;
            if (i == 0 || i - begin_.back() == kFan || placed[i].first / kNode != placed[i - 1].first / kNode) {
                begin_.push_back(i);
                start_.push_back(placed[i].first);
            }
        }
        begin_.push_back(queries_.rows);
    }

    // Larger groups for the scan, which have no place.
    void regroup_for_scan() {
        begin_.clear();
        for (int64_t i = 0; i < queries_.rows; i += kBatch) begin_.push_back(i);
        start_.assign(begin_.size(), 0);
        begin_.push_back(queries_.rows);
    }

    // Compares the work of the walk for a few groups with that of the scan: a count, the same on every run.
    bool scan_is_cheaper() const {
        const int64_t samples = std::clamp<int64_t>(groups() / 128, 1, 32);
        Searcher searcher(*this);
        std::vector<int64_t> query(kFan), index(kFan * asked_.k);
        std::vector<double> squared(kFan * asked_.k);
        int64_t scan = 0;
        for (int64_t i = 0; i < samples; ++i) {
            const int64_t g = (2 * i + 1) * groups() / (2 * samples);
            searcher.search(g, g + 1, query.data(), squared.data(), index.data());
            scan += rows(g, g + 1) * tree_.blocks * queries_.dims;
        }
        return searcher.work() > scan;
    }

    const Tree& tree_;
    const KnnParams asked_;
    const KnnPoints& queries_;     // of asked_
    std::vector<uint32_t> order_;  // queries by place
    std::vector<int64_t> begin_;   // [groups + 1] into order_
    std::vector<uint32_t> start_;  // [groups] block in or next to which a group lies
    bool scans_ = false;
};

class Index final : public KnnIndex {
  public:
    explicit Index(const KnnParams& params) : tree_(params.references, params.scale) {}
    std::unique_ptr<KnnJoin> join(const KnnParams& params) const override {
        return std::make_unique<Join>(tree_, params);
    }

  private:
    Tree tree_;
};

}  // namespace

std::unique_ptr<KnnIndex> build_knn_index(const KnnParams& params) { return std::make_unique<Index>(params); }

}  // namespace SDW_ISA
}  // namespace sdw
