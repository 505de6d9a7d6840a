#include "phalanx/weights/gguf.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <fstream>
#include <map>
#include <random>

#include "phalanx/base/error.h"
#include "phalanx/base/unique_fd.h"
#include "phalanx/weights/gguf_testing.h"

namespace phalanx::weights {
namespace {

int from_hex(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

// Blocks of random bytes and what the PyPI package gguf makes of them, as bits.
TEST(GgufBlocks, EqualTheReferenceBitForBit) {
  const std::string path = PHALANX_TESTDATA "/gguf_blocks.txt";
  const std::map<std::string, GgufType> types{
      {"F32", GgufType::kF32},   {"F16", GgufType::kF16},   {"BF16", GgufType::kBF16},
      {"Q4_0", GgufType::kQ4_0}, {"Q4_1", GgufType::kQ4_1}, {"Q5_0", GgufType::kQ5_0},
      {"Q5_1", GgufType::kQ5_1}, {"Q8_0", GgufType::kQ8_0}, {"Q2_K", GgufType::kQ2_K}, {"Q3_K", GgufType::kQ3_K}, {"Q4_K", GgufType::kQ4_K},
      {"Q5_K", GgufType::kQ5_K}, {"Q6_K", GgufType::kQ6_K}};
  std::ifstream file(path);
  std::string name, stored, expected;
  int seen = 0;
  while (file >> name >> stored >> expected) {
    ++seen;
    const GgufType type = types.at(name);
    std::vector<std::byte> blocks(stored.size() / 2);
    for (size_t i = 0; i < blocks.size(); ++i)
      blocks[i] =
          static_cast<std::byte>(from_hex(stored[2 * i]) << 4 | from_hex(stored[2 * i + 1]));
    const GgufBlock block = gguf_block(type);
    ASSERT_EQ(static_cast<int64_t>(blocks.size()) % block.bytes, 0) << name;
    std::vector<float> values(blocks.size() / static_cast<size_t>(block.bytes) *
                              static_cast<size_t>(block.elements));
    ASSERT_EQ(values.size() * 8, expected.size()) << name;
    gguf_dequantize(type, blocks, values);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto bits = static_cast<uint32_t>(std::stoul(expected.substr(8 * i, 8), nullptr, 16));
      ASSERT_EQ(std::bit_cast<uint32_t>(values[i]), bits) << name << " value " << i;
    }
  }
  EXPECT_EQ(seen, static_cast<int>(types.size()));
}

class Gguf : public testing::Test {
 protected:
  // In memory, since thousands of them are opened.
  GgufFile open(const std::string& bytes) {
    memory_.reset(::memfd_create("gguf_test", MFD_CLOEXEC));
    EXPECT_EQ(::write(memory_.get(), bytes.data(), bytes.size()),
              static_cast<ssize_t>(bytes.size()));
    path_ = fmt::format("/proc/self/fd/{}", memory_.get());
    return GgufFile::open(path_);
  }
  // The message without the file's name, with which it must begin.
  std::string error_of(const std::string& bytes, Code code = Code::kInvalidArgument) {
    try {
      (void)open(bytes);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      const std::string message = e.what();
      EXPECT_EQ(message.find(path_ + ": "), 0u) << message;
      return message.substr(std::min(message.size(), path_.size() + 2));
    }
    return "nothing was thrown";
  }
  UniqueFd memory_;
  std::string path_;
};

GgufBytes small_file() {
  GgufBytes file;
  file.text("general.architecture", "llama");
  file.u32("llama.block_count", 2);
  file.f32("llama.rope.freq_base", 1e5F);
  file.texts("tokens", {"a", "", "中"});
  file.integers("types", {1, 2, 3});
  file.tensor("matrix", {3, 2}, {1, 2, 3, 4, 5, 6});
  file.tensor("vector", {2}, {7, 8});
  return file;
}

TEST_F(Gguf, ReadsMetadataAndTensors) {
  const GgufFile file = open(small_file().bytes());
  EXPECT_EQ(file.text("general.architecture"), "llama");
  EXPECT_EQ(file.integer("llama.block_count"), 2);
  EXPECT_EQ(file.number("llama.rope.freq_base"), 1e5);
  EXPECT_EQ(file.texts("tokens"), (std::vector<std::string>{"a", "", "中"}));
  EXPECT_EQ(file.integers("types"), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(file.integer("absent", 5), 5);
  EXPECT_TRUE(file.texts("absent").empty());
  const GgufTensor* matrix = file.find_tensor("matrix");
  ASSERT_NE(matrix, nullptr);
  EXPECT_EQ(matrix->shape, (std::vector<int64_t>{3, 2}));
  std::vector<float> rows(4);
  file.read_rows(*matrix, 1, rows);
  EXPECT_EQ(rows, (std::vector<float>{3, 4, 5, 6}));
  EXPECT_EQ(file.find_tensor("absent"), nullptr);
}

TEST_F(Gguf, WrongTypesAndMissingKeysAreNamed) {
  const GgufFile file = open(small_file().bytes());
  const auto message = [&](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      return std::string(e.what()).substr(path_.size() + 2);
    }
    return "nothing was thrown";
  };
  EXPECT_EQ(message([&] { (void)file.integer("general.architecture"); }),
            "metadata general.architecture: found a text, expected an integer");
  EXPECT_EQ(message([&] { (void)file.text("absent"); }),
            "metadata absent: found nothing, expected a text");
  EXPECT_EQ(message([&] { (void)file.numbers("tokens"); }),
            "metadata tokens: found a list of texts, expected a list of numbers");
}

TEST_F(Gguf, WrongFilesAreRefused) {
  EXPECT_EQ(error_of("short"), "found 5 bytes, expected a GGUF file (at least 24)");
  EXPECT_EQ(error_of(std::string(64, 'x')),
            "not a GGUF file: begins with 0x78787878, expected 0x46554747 (\"GGUF\")");
  GgufBytes file = small_file();
  file.version = 1;
  EXPECT_EQ(error_of(file.bytes()),
            "GGUF version 1, expected 2 or 3. Fix: convert the model again");
  file.version = 0x03000000;
  EXPECT_EQ(error_of(file.bytes()), "a big-endian GGUF file; only little-endian ones are read");
  file.version = 2;
  EXPECT_EQ(open(file.bytes()).tensors().size(), 2u);
}

TEST_F(Gguf, HugeCountsAreRefusedBeforeAllocation) {
  GgufBytes file = small_file();
  file.claimed_tensors = uint64_t{1} << 60;
  EXPECT_NE(error_of(file.bytes()).find("claims 1152921504606846976 tensors at byte 24, but only"),
            std::string::npos);
  file = small_file();
  file.claimed_values = UINT64_MAX;
  EXPECT_NE(error_of(file.bytes()).find("claims 18446744073709551615 metadata values"),
            std::string::npos);
  file = small_file();
  file.raw("list", 9, std::string("\x08\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f", 12));
  EXPECT_NE(error_of(file.bytes()).find("claims 9223372036854775807 values of list"),
            std::string::npos);
  file = small_file();
  file.raw("text", 8, std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8));
  EXPECT_NE(error_of(file.bytes()).find("text at byte"), std::string::npos);
}

TEST_F(Gguf, BadMetadataIsRefused) {
  GgufBytes file = small_file();
  file.u32("llama.block_count", 3);
  EXPECT_EQ(error_of(file.bytes()), "metadata key llama.block_count occurs twice");
  file = small_file();
  file.raw("odd", 13, "");
  EXPECT_EQ(error_of(file.bytes()), "odd: unknown value type 13");
  file = small_file();
  file.raw("odd", 9, std::string("\x09\0\0\0\x01\0\0\0\0\0\0\0", 12));
  EXPECT_EQ(error_of(file.bytes()), "odd: lists of lists are not read");
  file = small_file();
  file.raw("odd", 7, "\x02");
  EXPECT_EQ(error_of(file.bytes()), "odd: found 2, expected a boolean (0 or 1)");
  file = small_file();
  file.u32("general.alignment", 48);
  EXPECT_EQ(error_of(file.bytes()),
            "general.alignment: found 48, expected a power of two up to 1048576");
}

TEST_F(Gguf, BadTensorsAreRefused) {
  const auto with = [](auto&& change) {
    GgufBytes file = small_file();
    change(file.tensors[1]);
    return file.bytes();
  };
  EXPECT_EQ(error_of(with([](auto& t) { t.type = 17; }), Code::kUnimplemented),
            "tensor vector has the type IQ2_XS (17), which cannot be imported. Expected F32, F16, "
            "BF16, Q4_0, "
            "Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K. Fix: take a file of another quantisation, "
            "such as "
            "Q8_0 or Q4_K_M");
  EXPECT_NE(error_of(with([](auto& t) { t.type = 4000000000U; }), Code::kUnimplemented)
                .find("type 4000000000 (4000000000)"),
            std::string::npos);
  EXPECT_EQ(error_of(with([](auto& t) { t.type = 8; })),
            "tensor vector: rows of 2 elements, expected a multiple of 32 for Q8_0");
  EXPECT_EQ(error_of(with([](auto& t) { t.name = "matrix"; })), "tensor matrix occurs twice");
  EXPECT_EQ(error_of(with([](auto& t) { t.dimensions = {}; })),
            "tensor vector: found 0 dimensions, expected 1 to 4");
  EXPECT_EQ(error_of(with([](auto& t) {
              t.dimensions = {1, 1, 1, 1, 1};
            })),
            "tensor vector: found 5 dimensions, expected 1 to 4");
  EXPECT_EQ(error_of(with([](auto& t) { t.dimensions = {0}; })),
            "tensor vector: dimension 0 of 0 elements cannot be");
  EXPECT_EQ(error_of(with([](auto& t) {
              t.dimensions = {uint64_t{1} << 32, uint64_t{1} << 32};
            })),
            "tensor vector: dimension 1 of 4294967296 elements cannot be");
  EXPECT_NE(error_of(with([](auto& t) {
              t.dimensions = {uint64_t{1} << 40};
            })).find("the file is truncated"),
            std::string::npos);
  EXPECT_NE(error_of(with([](auto& t) { t.offset = UINT64_MAX - 31; })).find("lies beyond the end"),
            std::string::npos);
  EXPECT_EQ(error_of(with([](auto& t) { t.offset = 4; })),
            "tensor vector: offset 4 is not a multiple of the alignment 32");
  EXPECT_NE(error_of(with([](auto& t) { t.offset = 0; })).find("overlap at byte"),
            std::string::npos);
}

TEST_F(Gguf, EveryTruncationIsRefused) {
  const std::string whole = small_file().bytes();
  for (size_t length = 0; length < whole.size(); ++length)
    EXPECT_NE(error_of(whole.substr(0, length)), "nothing was thrown") << length;
}

TEST_F(Gguf, DamagedHeadersNeverDoHarm) {
  const std::string whole = small_file().bytes();
  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = whole;
    for (int n = 1 + static_cast<int>(random() % 3); n > 0; --n)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    try {
      const GgufFile file = open(bytes);
      for (const GgufTensor& tensor : file.tensors()) {
        std::vector<float> row(static_cast<size_t>(tensor.row_elements()));
        file.read_rows(tensor, tensor.rows() - 1, row);
      }
      ++accepted;
    } catch (const Error&) {
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 3000);
}

}  // namespace
}  // namespace phalanx::weights
