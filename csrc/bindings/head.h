// The heads by the names that Python has for them.
#pragma once

#include <stdexcept>
#include <string>

#include "sdw/head.h"

namespace sdw {

inline Head head_named(const std::string& name) {
    if (name == "tanh") return Head::tanh;
    if (name == "identity") return Head::identity;
    if (name == "softmax") return Head::softmax;
    throw std::invalid_argument("head must be 'tanh', 'identity' or 'softmax', got '" + name + "'");
}

}  // namespace sdw
