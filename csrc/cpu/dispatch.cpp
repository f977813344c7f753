// The list of ISAs and the choice among them.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyperc {

namespace scalar {
extern const Isa isa;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}
namespace avx512_bf16 {
extern const Isa isa;
}
#endif

const std::vector<const Isa*>& isas_built() {
  static const std::vector<const Isa*> list = {
      &scalar::isa,
#if defined(__x86_64__)
      &avx2::isa,
      &avx512::isa,
      &avx512_bf16::isa,
#endif
  };
  return list;
}

std::vector<const Isa*> isas_here() {
  std::vector<const Isa*> here;
  for (const Isa* isa : isas_built()) {
    if (isa->runs_here()) here.push_back(isa);
  }
  return here;
}

namespace {

std::string names(const std::vector<const Isa*>& list) {
  std::string text;
  for (const Isa* isa : list) text += (text.empty() ? "" : ", ") + std::string(isa->name);
  return text;
}

const Isa& find(const std::string& name, const std::string& what) {
  for (const Isa* isa : isas_built()) {
    if (isa->name != name) continue;
    if (isa->runs_here()) return *isa;
    throw std::invalid_argument(what + " asks for '" + name + "', which this processor lacks; it has " +
                                names(isas_here()));
  }
  throw std::invalid_argument(what + " must be one of " + names(isas_built()) + ", got '" + name + "'");
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& isa() {
  if (const Isa* known = chosen.load(std::memory_order_acquire)) return *known;
  const char* wanted = std::getenv("PYPERC_ISA");
  const Isa* found = nullptr;
  if (wanted && *wanted) {
    try {
      found = &find(wanted, "PYPERC_ISA");
    } catch (const std::invalid_argument& error) {
      throw std::runtime_error(error.what());
    }
  } else {
    found = isas_here().back();
  }
  chosen.store(found, std::memory_order_release);
  return *found;
}

void use_isa(const std::string& name) { chosen.store(&find(name, "isa"), std::memory_order_release); }

}  // namespace pyperc
