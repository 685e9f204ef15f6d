// A menu of compile-time integers, written once, that a dispatch walks.
#pragma once

#include <cstdint>
#include <type_traits>

namespace llamatelemetry {

template <int... kValues>
struct IntMenu {
  // Calls body(std::integral_constant<int, value>{}); false when the menu lacks the value.
  template <typename Body>
  static bool dispatch(int64_t value, Body&& body) {
    return ((value == kValues && (body(std::integral_constant<int, kValues>{}), true)) || ...);
  }
};

}  // namespace llamatelemetry
