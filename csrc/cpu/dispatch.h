// Chooses the instruction set at run time. SDW_DISPATCH(void, op_cpu, (const Params& p), (p)) defines sdw::op_cpu,
// which calls sdw::<isa>::op_cpu of the instruction set in use; csrc/cpu/dispatch.cpp has one line an op.
#pragma once

#include "sdw/isa.h"

#if defined(__x86_64__)
#define SDW_DISPATCH(result, op, parameters, arguments) \
    namespace portable {                                \
    result op parameters;                               \
    }                                                   \
    namespace avx2 {                                    \
    result op parameters;                               \
    }                                                   \
    namespace avx512 {                                  \
    result op parameters;                               \
    }                                                   \
    result op parameters {                              \
        switch (active_isa()) {                         \
            case Isa::avx512:                           \
                return avx512::op arguments;            \
            case Isa::avx2:                             \
                return avx2::op arguments;              \
            default:                                    \
                return portable::op arguments;          \
        }                                               \
    }
#else
#define SDW_DISPATCH(result, op, parameters, arguments) \
    namespace portable {                                \
    result op parameters;                               \
    }                                                   \
    result op parameters { return portable::op arguments; }
#endif
