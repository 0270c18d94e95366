#include "sdw/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sdw {
namespace {

std::vector<Isa> detect() {
    std::vector<Isa> found{Isa::portable};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(Isa::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
            found.push_back(Isa::avx512);
        }
    }
#endif
    return found;
}

Isa choose() {
    const char* wanted = std::getenv("SDW_ISA");
    if (wanted == nullptr || *wanted == '\0') return supported_isas().back();
    std::string names;
    for (Isa isa : supported_isas()) {
        if (wanted == std::string(isa_name(isa))) return isa;
        names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::invalid_argument("SDW_ISA=" + std::string(wanted) + " is not available; this machine has: " + names);
}

std::atomic<int> threads{1};

}  // namespace

const std::vector<Isa>& supported_isas() {
    static const std::vector<Isa> found = detect();
    return found;
}

Isa active_isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "portable";
    }
}

int num_threads() { return threads.load(); }

void set_num_threads(int count) {
    if (count < 1)
        throw std::invalid_argument("the number of threads must be at least 1, got " + std::to_string(count));
    threads.store(count);
}

}  // namespace sdw
