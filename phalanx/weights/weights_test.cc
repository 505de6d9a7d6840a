#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "phalanx/weights/arena.h"
#include "phalanx/weights/checkpoint.h"
#include "phalanx/weights/weight_source.h"

namespace phalanx::weights {
namespace {

namespace fs = std::filesystem;
using tensor::DType;

class Weights : public ::testing::Test {
 protected:
  Weights()
      : directory_(fs::temp_directory_path() / ("phalanx-weights-" + std::to_string(::getpid()))) {
    fs::remove_all(directory_);
    fs::create_directory(directory_);
  }
  ~Weights() override { fs::remove_all(directory_); }

  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
  }
  static std::string file(const std::string& header, size_t data_bytes) {
    std::string text(8, '\0');
    for (size_t i = 0; i < 8; ++i)
      text[i] = static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i));
    text += header;
    for (size_t i = 0; i < data_bytes; ++i) text += static_cast<char>(i);
    return text;
  }
  // What is said of a model.safetensors with these bytes; "" when it is accepted.
  [[nodiscard]] std::string refusal(const std::string& bytes) const {
    write("model.safetensors", bytes);
    return refusal();
  }
  [[nodiscard]] std::string refusal() const {
    try {
      const Checkpoint checkpoint(directory_.string());
      return "";
    } catch (const Error& e) {
      return e.what();
    }
  }
  fs::path directory_;
};

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(Weights, ReadsRowsOfTensors) {
  write("model.safetensors",
        file(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]},)"
             R"("b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},)"
             R"("none":{"dtype":"I64","shape":[0,7],"data_offsets":[16,16]}})",
             16));
  const Checkpoint checkpoint(directory_.string());
  EXPECT_EQ(checkpoint.tensors().size(), 3U);
  EXPECT_EQ(checkpoint.find("missing"), nullptr);
  WeightSource source(checkpoint);
  const TensorEntry& a = source.ask("a");
  EXPECT_EQ(a.dtype, DType::kBF16);
  EXPECT_EQ(shape_text(a.shape), "[3, 2]");
  std::array<std::byte, 8> rows{};
  source.read_rows(a, 1, 2, rows.data());
  for (size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(rows[i], static_cast<std::byte>(4 + i));
  EXPECT_EQ(source.bytes_read(), 8);
  EXPECT_EQ(source.ask("none").row_bytes(), 0);
  EXPECT_EQ(source.tensors_asked(), 2);
  const auto none = [](std::string_view) { return false; };
  EXPECT_EQ(source.finish(none), std::vector<std::string>{"b"});
  EXPECT_TRUE(source.finish([](std::string_view name) { return name == "b"; }).empty());
  EXPECT_THROW((void)source.ask("missing"), Error);
}

TEST_F(Weights, SaysWhenTheFileShrinksWhileItIsRead) {
  write("model.safetensors", file(R"({"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}})", 64));
  const Checkpoint checkpoint(directory_.string());
  WeightSource source(checkpoint);
  const TensorEntry& a = source.ask("a");
  fs::resize_file(directory_ / "model.safetensors", static_cast<uintmax_t>(a.offset) + 10);
  std::array<std::byte, 64> rows{};
  try {
    source.read_rows(a, 0, 64, rows.data());
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kDataLoss);
    EXPECT_SAYS(std::string(e.what()), "tensor a: file ends at");
    EXPECT_SAYS(std::string(e.what()), "expected 54 more bytes");
  }
}

TEST_F(Weights, RefusesHostileHeaders) {
  EXPECT_SAYS(refusal("short"), "too short for a safetensors file, found 5 bytes");
  EXPECT_SAYS(refusal(std::string(8, '\xff') + "{}"),
              "header larger than the file or the limit, found 18446744073709551615 bytes, expected "
              "at most 2 (file of 10 bytes)");
  EXPECT_SAYS(refusal(file("{oops", 0)), "not valid JSON");
  EXPECT_SAYS(refusal(file("[]", 0)), "not a JSON object");
  EXPECT_SAYS(refusal(file(R"({"a":)" + std::string(100, '[') + std::string(100, ']') + "}", 0)),
              "nested deeper than 8 levels");
  EXPECT_SAYS(refusal(file(R"({"a":1})", 0)), "tensor a: not a tensor entry, found 1");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}})", 1)),
              R"(tensor a: unknown dtype, found "F7", expected one of F32, F16)");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1)),
              "tensor a: bad shape, found [-1]");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1)),
              "at most 8 dimensions");
  EXPECT_SAYS(
      refusal(file(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,1]}})", 1)),
      "tensor a: shape too large");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1)),
              "bad data_offsets, found [1,0]");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0.5,1]}})", 1)),
              "bad data_offsets");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 8)),
              "data_offsets outside the file, found [0,9], expected at most 8");
  EXPECT_SAYS(
      refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551615]}})", 8)),
      "bad data_offsets");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8)),
              "size does not match the shape, found 8 bytes, expected 12 bytes for [3] of dtype f32");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                           R"("b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
                           6)),
              "tensor b: data_offsets overlap the tensor before, found begin 2, expected begin 4");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6)),
              "tensor a: hole in the data before this tensor");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 6)),
              "bytes after the last tensor, found 6 bytes of data, expected 4");
  EXPECT_SAYS(refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                           R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                           1)),
              "tensor a: tensor named twice");
  EXPECT_EQ(refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1)), "");
}

TEST_F(Weights, TruncatedFileNamesTheTensorsThatAreGone) {
  const std::string whole = file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                                 R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                                 8);
  const std::string text = refusal(whole.substr(0, whole.size() - 6));
  EXPECT_SAYS(text, "(2 problems)");
  EXPECT_SAYS(text, "model.safetensors: tensor a: data_offsets outside the file");
  EXPECT_SAYS(text, "model.safetensors: tensor b: data_offsets outside the file");
  EXPECT_SAYS(text, "fetch it again");
}

TEST_F(Weights, IndexedFiles) {
  EXPECT_SAYS(refusal(), "no weights found");
  write("1.safetensors", file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
  write("2.safetensors", file(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
  const auto index = [&](const std::string& map) {
    write("model.safetensors.index.json", R"({"weight_map":)" + map + "}");
  };
  index(R"({"a":"1.safetensors","b":"2.safetensors"})");
  EXPECT_EQ(refusal(), "");
  EXPECT_EQ(Checkpoint(directory_.string()).tensors().size(), 2U);
  // All problems at once.
  index(R"({"a":"1.safetensors","c":"2.safetensors","d":"3.safetensors","e":"../e.safetensors",)"
        R"("f":"/etc/passwd","g":7,"h":".."})");
  const std::string text = refusal();
  EXPECT_SAYS(text, "(6 problems)");
  EXPECT_SAYS(text, "2.safetensors: tensor c: tensor named by the index is absent");
  EXPECT_SAYS(text, "3.safetensors: weight file missing, found No such file or directory");
  EXPECT_SAYS(text, R"(weight_map.e: not a file of this directory, found "../e.safetensors")");
  EXPECT_SAYS(text, "weight_map.f: not a file of this directory");
  EXPECT_SAYS(text, "weight_map.g: not a file of this directory, found 7");
  EXPECT_SAYS(text, "weight_map.h");
  index("[]");
  EXPECT_SAYS(refusal(), "no weight_map");
  // A tensor in two files is ambiguous.
  write("2.safetensors", file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1));
  index(R"({"a":"1.safetensors","b":"2.safetensors"})");
  EXPECT_SAYS(refusal(), "tensor a: tensor in two files");
}

TEST(Arena, KeepsItsBytesForWhoeverHoldsTheDescriptor) {
  Arena arena(100'000);
  ThreadPool pool({.threads = 2});
  (void)arena.take_huge_pages(pool);  // not every kernel has them
  EXPECT_EQ(reinterpret_cast<uintptr_t>(arena.data()) % (2 << 20), 0U);
  std::memset(arena.data(), 7, 100'000);
  arena.seal();
  EXPECT_EQ(arena.data()[99'999], std::byte{7});
  EXPECT_NE(::fcntl(arena.fd(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, arena.fd(), 0), MAP_FAILED);
  void* again = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, arena.fd(), 0);
  ASSERT_NE(again, MAP_FAILED);
  EXPECT_EQ(static_cast<std::byte*>(again)[4095], std::byte{7});
  ::munmap(again, 4096);
}

TEST(Arena, IsTakenOverWhenSealedAndOnlyThen) {
  const UniqueFd memory = create_arena_memory();
  {
    Arena half(100'000, memory.get());  // its owner dies before it is done
    half.data()[7] = std::byte{1};
    EXPECT_FALSE(half.filled());
  }
  EXPECT_FALSE(arena_is_sealed(memory.get()));
  {
    Arena arena(100'000, memory.get());
    EXPECT_FALSE(arena.filled());
    arena.data()[99'999] = std::byte{42};
    arena.seal();
  }
  EXPECT_TRUE(arena_is_sealed(memory.get()));
  const Arena successor(100'000, memory.get());
  EXPECT_TRUE(successor.filled());
  EXPECT_EQ(successor.data()[99'999], std::byte{42});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(successor.data()) % (2 << 20), 0u);
  EXPECT_THROW(Arena(100'000'000, memory.get()), Error);  // of another cut
}

TEST(Arena, SaysHowMuchWasRefused) {
  try {
    const Arena arena(int64_t{1} << 60);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Code::kResourceExhausted);
    EXPECT_SAYS(std::string(e.what()), "1152921504606846976 bytes");
  }
}

}  // namespace
}  // namespace phalanx::weights
