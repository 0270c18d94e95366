#include "dispatch.h"

#include "sdw/behavior_matching.h"
#include "sdw/knn.h"
#include "sdw/unrolled_bc.h"
#include "sdw/weighted_bc_loss.h"

namespace sdw {

SDW_DISPATCH(float, behavior_matching, (const BehaviorMatchingParams& p), (p))
SDW_DISPATCH(std::unique_ptr<KnnIndex>, build_knn_index, (const KnnParams& p), (p))
SDW_DISPATCH(std::unique_ptr<UnrolledBCTape>, unrolled_bc, (const UnrolledBCParams& p), (p))
SDW_DISPATCH(float, weighted_bc_loss, (const WeightedBCLossParams& p), (p))

}  // namespace sdw
