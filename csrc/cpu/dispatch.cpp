#include "dispatch.h"

#include "sdw/behavior_matching.h"
#include "sdw/knn.h"
#include "sdw/unrolled_bc.h"
#include "sdw/weighted_bc_loss.h"

namespace sdw {

SDW_DISPATCH(void, behavior_matching_cpu, (const BehaviorMatchingParams& p), (p))
SDW_DISPATCH(std::unique_ptr<KnnIndex>, build_knn_index, (const KnnParams& p), (p))
SDW_DISPATCH(std::unique_ptr<UnrolledBCTape>, unrolled_bc_cpu, (const UnrolledBCParams& p), (p))
SDW_DISPATCH(size_t, unrolled_bc_cpu_memory, (const UnrolledBCParams& p), (p))
SDW_DISPATCH(void, weighted_bc_loss_cpu, (const WeightedBCLossParams& p), (p))

}  // namespace sdw
