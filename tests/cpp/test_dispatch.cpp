// Which kernel runs, proved by its name.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#include "operands.h"

using namespace lowbit;
using namespace lowbit::test;

namespace {

std::string environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

bool ends_with(const std::string& s, const std::string& suffix) {
  return s.size() >= suffix.size() &&
         s.compare(s.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Sets the ISA back at the end of a test.
struct IsaScope {
  std::string before = isa();
  ~IsaScope() { set_isa(before); }
};

}  // namespace

TEST_CASE("LOWBIT_MAX_ISA names the ISA in use; without it, it is the first usable one") {
  const std::string max_isa = environment("LOWBIT_MAX_ISA");
  if (!max_isa.empty()) {
    CHECK(isa() == max_isa);
    return;
  }
  for (const IsaInfo& info : isas()) {
    if (!info.usable) continue;
    CHECK(isa() == info.name);
    break;
  }
}

TEST_CASE("the ISA is the expected one") {
  // CI knows what the CPU that it emulates must choose.
  const std::string expected = environment("LOWBIT_EXPECT_ISA");
  if (!expected.empty() && environment("LOWBIT_MAX_ISA").empty()) CHECK(isa() == expected);
}

TEST_CASE("ISAs are distinct, the portable one is last and usable everywhere") {
  std::set<std::string> names;
  for (const IsaInfo& info : isas()) names.insert(info.name);
  CHECK(names.size() == isas().size());
  CHECK(isas().back().name == "scalar");
  CHECK(isas().back().usable);
}

TEST_CASE("every kernel's name tells format, activation and ISA") {
  IsaScope scope;
  for (const IsaInfo& info : isas()) {
    for_each_pair([&](Format format, Activation activation) {
      const std::string bits = std::to_string(traits(format).bits);
      const std::string kernel = kernel_name(info.name, format, activation);
      CAPTURE(kernel);
      CHECK(ends_with(kernel, "_" + info.name));
      CHECK(kernel.find("w" + bits + "a") != std::string::npos);
      if (activation == Activation::int16) CHECK(kernel.find("a16") != std::string::npos);
    });
    if (!info.usable) {
      CHECK_THROWS_AS(set_isa(info.name), std::invalid_argument);
      continue;
    }
    set_isa(info.name);
    CHECK(isa() == info.name);
    CHECK(ends_with(kernel_name(Format::int4, Activation::int8), "_" + info.name));
  }
}

TEST_CASE("an unknown ISA is refused with the names of the usable ones") {
  IsaScope scope;
  const std::string before = isa();
  for (const char* wrong : {"", "avx9000", "AVX2", "scalar "}) {
    CAPTURE(wrong);
    try {
      set_isa(wrong);
      FAIL("accepted");
    } catch (const std::invalid_argument& e) {
      CHECK(std::string(e.what()).find("scalar") != std::string::npos);
    }
    CHECK(isa() == before);
  }
  CHECK_THROWS_AS(kernel_name("avx9000", Format::int8, Activation::int8), std::invalid_argument);
}

TEST_CASE("a layer runs on the ISA in use") {
  // The probe measures the chosen instructions: it must run on every usable ISA, and count work.
  IsaScope scope;
  for (const IsaInfo& info : isas()) {
    if (!info.usable) continue;
    set_isa(info.name);
    CAPTURE(info.name);
    for (const char* what : {"dot", "fma", "xnor"}) CHECK(probe(what, 0.001) > 0);
  }
  CHECK_THROWS_AS(probe("nothing", 0.001), std::invalid_argument);
  CHECK(read_bandwidth(1 << 16, 2, 0.001) > 0);
}
