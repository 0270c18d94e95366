// The parameters of a ReLU MLP as the ops take them, `flat`: W_1, b_1, W_2, b_2, ... one behind the other, W_l
// (widths[l], widths[l - 1]) row by row, b_l (widths[l]); widths = [inputs, hidden widths, outputs].
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sdw {

// P, the numbers of one network's flat parameters.
inline int64_t flat_size(const std::vector<int64_t>& widths) {
    int64_t size = 0;
    for (size_t l = 1; l < widths.size(); ++l) size += widths[l] * (widths[l - 1] + 1);
    return size;
}

}  // namespace sdw
