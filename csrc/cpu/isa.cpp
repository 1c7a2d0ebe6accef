#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusedrnn {
namespace {

const Isa* found_isa(const std::string& name) {
  if (const Isa* isa = find_isa(name)) return isa;
  std::string known;
  for (const Isa* isa : usable_isas()) {
    known += known.empty() ? isa->name : std::string(", ") + isa->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available: expected one of " +
                              known);
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa = [] {
    const char* forced = std::getenv("FUSEDRNN_CPU_ISA");
    return forced != nullptr && *forced != '\0' ? found_isa(forced) : usable_isas().back();
  }();
  return isa;
}

}  // namespace

std::vector<const Isa*> usable_isas() {
  std::vector<const Isa*> isas = {&kBaselineIsa};
#if defined(__x86_64__)
  for (const Isa* isa : {&kAvx2Isa, &kAvx512Isa, &avx512_bf16_isa()}) {
    if (isa->usable()) isas.push_back(isa);
  }
  #if defined(__linux__)
  if (avx512_amx_isa().usable()) isas.push_back(&avx512_amx_isa());
  #endif
#endif
  return isas;
}

const Isa* find_isa(const std::string& name) {
  for (const Isa* isa : usable_isas()) {
    if (name == isa->name) return isa;
  }
  return nullptr;
}

const Isa& current_isa() { return *current().load(std::memory_order_acquire); }

void set_isa(const std::string& name) {
  current().store(found_isa(name), std::memory_order_release);
}

}  // namespace fusedrnn
