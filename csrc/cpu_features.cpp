#include "cpu_features.h"

#include <cstdlib>
#include <map>
#include <stdexcept>

#ifdef HEXAD_HAS_NEON
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif
#endif

namespace hexad {
namespace {

#ifdef HEXAD_HAS_NEON
// FEAT_DotProd, and FEAT_I8MM beside it. NEON itself, fused multiply-adds and conversions of halves are part of
// every ARMv8-A.
struct ArmFeatures {
  bool dot_product, int8_matrix;
};
#ifdef __APPLE__
ArmFeatures arm_features() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
}
#else
ArmFeatures arm_features() {
  // HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers lack.
  return {(getauxval(AT_HWCAP) >> 20 & 1) != 0, (getauxval(AT_HWCAP2) >> 13 & 1) != 0};
}
#endif
#endif

struct Isa {
  std::string name;
  void (*fill)(Kernels&);
  bool supported;
};

// Best first. GCC's and Clang's probe reads CPUID and checks through XGETBV that the system saves the
// registers.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
#ifdef HEXAD_X86_64
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    list.push_back({"avx512vnni", avx512vnni::fill_kernels, avx512 && __builtin_cpu_supports("avx512vnni")});
    list.push_back({"avx512", ::hexad::avx512::fill_kernels, avx512});
    list.push_back({"avx2", ::hexad::avx2::fill_kernels, avx2});
#endif
#ifdef HEXAD_HAS_NEON
    const ArmFeatures arm = arm_features();
    list.push_back({"neoni8mm", neoni8mm::fill_kernels, arm.dot_product && arm.int8_matrix});
    list.push_back({"neon", neon::fill_kernels, arm.dot_product});
#endif
    list.push_back({"generic", generic::fill_kernels, true});
    return list;
  }();
  return all;
}

}  // namespace

const std::vector<std::string>& supported_isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Isa& isa : isas())
      if (isa.supported) list.push_back(isa.name);
    return list;
  }();
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  static const std::map<std::string, Kernels> tables = [] {
    std::map<std::string, Kernels> map;
    for (const Isa& entry : isas())
      if (entry.supported) entry.fill(map[entry.name]);
    return map;
  }();
  std::string wanted = isa;
  if (wanted.empty()) {
    const char* forced = std::getenv("HEXAD_ISA");
    wanted = forced != nullptr && *forced != '\0' ? forced : supported_isas().front();
  }
  auto found = tables.find(wanted);
  if (found == tables.end()) {
    std::string known;
    for (const std::string& name : supported_isas()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("ISA '" + wanted + "' is not available here; this machine and build have: " +
                                known + ". Set HEXAD_ISA to one of these or leave it unset.");
  }
  return found->second;
}

}  // namespace hexad
