// A menu of compile-time integers, written once: the check prints it, the dispatch walks it.
#pragma once

#include <string>
#include <type_traits>

namespace llamatelemetry {

template <int... kValues>
struct IntMenu {
  static constexpr bool contains(int64_t value) { return ((value == kValues) || ...); }

  static std::string text() {
    std::string list;
    ((list += (list.empty() ? "{" : ", ") + std::to_string(kValues)), ...);
    return list + "}";
  }

  // Calls body(std::integral_constant<int, value>{}); false when the menu lacks the value.
  template <typename Body>
  static bool dispatch(int64_t value, Body&& body) {
    return ((value == kValues && (body(std::integral_constant<int, kValues>{}), true)) || ...);
  }
};

}  // namespace llamatelemetry
