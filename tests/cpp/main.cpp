// Runs the tests on the ISA that LOWBIT_MAX_ISA names. Exits with 77, which CTest shows as skipped,
// where this CPU cannot run it.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "lowbit.h"

int main(int argc, char** argv) {
  const char* max_isa = std::getenv("LOWBIT_MAX_ISA");
  for (const lowbit::IsaInfo& info : lowbit::isas()) {
    if (max_isa && info.name == max_isa && !info.usable) {
      std::printf("this CPU has no %s\n", max_isa);
      return 77;
    }
  }
  std::printf("isa: %s\n", lowbit::isa().c_str());
  return doctest::Context(argc, argv).run();
}
