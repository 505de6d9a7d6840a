// Damaged hellos and farewells, the frames that a data port takes from others.
// PHALANX_FUZZ_SECONDS; `make fuzz`.

#include <gtest/gtest.h>

#include <cstring>
#include <iostream>

#include "phalanx/base/fuzz.h"
#include "phalanx/comm/frame.h"
#include "phalanx/comm/tcp/hello.h"

namespace phalanx::comm {
namespace {

constexpr uint64_t kGeneration = 0x1122334455667788;

std::string text_of(const void* bytes, size_t size) {
  return {static_cast<const char*>(bytes), size};
}

TEST(FrameFuzz, Hello) {
  Hello good{.sender = 3, .receiver = 1, .size = 4, .generation = kGeneration};
  good.token.fill(std::byte{0x5a});
  Hello expected = good;
  int64_t welcome = 0;
  const int64_t tried = fuzz({text_of(&good, sizeof good)}, [&](std::string bytes, int64_t number) {
    SCOPED_TRACE(number);
    bytes.resize(sizeof(Hello));  // the port waits for all of it, and takes no more
    Hello hello;
    std::memcpy(&hello, bytes.data(), sizeof hello);
    if (judge(hello, expected) != Verdict::kWelcome) return;
    ++welcome;
    EXPECT_EQ(hello.token, expected.token);
    EXPECT_EQ(hello.generation, expected.generation);
    EXPECT_GT(hello.sender, expected.receiver);
    EXPECT_LT(hello.sender, expected.size);
  });
  std::cout << tried << " hellos, " << welcome << " welcome\n";
  EXPECT_GT(tried, 1000);
}

TEST(FrameFuzz, Farewell) {
  const Fault fault{Code::kUnavailable, 2, "the disk is on fire"};
  const FarewellFrame clean = encode_farewell(1, kGeneration, nullptr);
  const FarewellFrame faulty = encode_farewell(1, kGeneration, &fault);
  int64_t read = 0;
  const int64_t tried =
      fuzz({text_of(clean.data(), clean.size()), text_of(faulty.data(), faulty.size())},
           [&](const std::string& bytes, int64_t number) {
             SCOPED_TRACE(number);
             const auto found =
                 decode_farewell(std::as_bytes(std::span(bytes.data(), bytes.size())), kGeneration);
             if (!found) return;
             ++read;
             EXPECT_LE(found->fault.text.size(), kFarewellBytes);
           });
  std::cout << tried << " farewells, " << read << " read\n";
  EXPECT_GT(tried, 1000);
}

}  // namespace
}  // namespace phalanx::comm
