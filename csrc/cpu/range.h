// A contiguous part of some rows, tiles or other units.
#pragma once

#include <cstdint>

namespace sdw::SDW_ISA {

struct Range {
    int64_t begin, end;  // [begin, end)
};

}  // namespace sdw::SDW_ISA
