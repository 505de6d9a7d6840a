#include "phalanx/ops/isa.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "phalanx/base/error.h"
#include "phalanx/ops/cpu/amx.h"

namespace phalanx::ops {
namespace {

class Environment {
 public:
  explicit Environment(const char* value) {
    if (const char* old = std::getenv("PHALANX_CPU_ISA")) old_ = old;
    value ? setenv("PHALANX_CPU_ISA", value, 1) : unsetenv("PHALANX_CPU_ISA");
  }
  ~Environment() {
    old_.empty() ? unsetenv("PHALANX_CPU_ISA") : setenv("PHALANX_CPU_ISA", old_.c_str(), 1);
  }

 private:
  std::string old_;
};

TEST(Isa, BestIsChosenUnlessOneIsNamed) {
  const std::vector<Isa> available = available_isas();
  ASSERT_FALSE(available.empty());
  EXPECT_EQ(available.front(), Isa::kRef);
  {
    Environment none(nullptr);
    EXPECT_EQ(choose_isa(), default_isa());
    EXPECT_NE(choose_isa(), Isa::kAmx);
  }
  for (const Isa isa : available) {
    Environment named(std::string(isa_name(isa)).c_str());
    EXPECT_EQ(choose_isa(), isa);
  }
}

TEST(Isa, AbsentPathIsRefusedWithTheChoices) {
  for (const char* name : {"amx", "sse9"}) {
    if (name == isa_name(available_isas().back())) continue;
    Environment named(name);
    try {
      (void)choose_isa();
      FAIL() << name << " accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Code::kInvalidArgument);
      const std::string message = e.what();
      EXPECT_NE(message.find("PHALANX_CPU_ISA"), std::string::npos) << message;
      EXPECT_NE(message.find(std::string("\"") + name + "\""), std::string::npos) << message;
      EXPECT_NE(message.find("ref"), std::string::npos) << message;
      if (name == isa_name(Isa::kAmx)) {
        EXPECT_NE(message.find("(" + cpu::amx_refusal() + ")"), std::string::npos) << message;
      }
    }
  }
}

TEST(Isa, AmxHasToBeNamedOrIsRefusedForAReason) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  bool amx = false;
  for (std::string word; cpuinfo >> word;) amx |= word == "amx_tile";
  const bool offered = available_isas().back() == Isa::kAmx;
  EXPECT_EQ(offered, cpu::amx_refusal().empty());
  EXPECT_EQ(isa_note(Isa::kAmx), "");
  const std::string note = isa_note(default_isa());
  if (offered) {
    EXPECT_TRUE(amx);
    EXPECT_EQ(note, ", AMX present, not used: PHALANX_CPU_ISA=amx asks for it");
  } else if (amx && cpu::amx_refusal() != cpu::kNoAmx) {
    EXPECT_EQ(note, ", AMX present, not used: " + cpu::amx_refusal());
  } else {  // nor where there are tiles without products of bf16 or int8
    EXPECT_EQ(cpu::amx_refusal(), cpu::kNoAmx);
    EXPECT_EQ(note, "");
  }
}

TEST(Isa, BestOfAClassBelongsToIt) {
  for (const Isa isa : available_isas()) {
    const Isa best = best_isa_of(numeric_class_of(isa));
    EXPECT_EQ(numeric_class_of(best), numeric_class_of(isa));
    EXPECT_GE(static_cast<int>(best), static_cast<int>(isa));
  }
  if (!cpu::amx_refusal().empty()) {
    EXPECT_THROW((void)best_isa_of(NumericClass::kAmx), Error);
  }
}

}  // namespace
}  // namespace phalanx::ops
