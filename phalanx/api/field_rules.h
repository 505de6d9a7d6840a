#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "phalanx/api/fields.h"

// The table of request fields: which interface has which, of what type, in what range, with what
// texts. Parsers read by it and /openapi.json is written from it. Reference: rest-api sheet, chapter 6.
namespace phalanx::api {

enum Interface : unsigned {
  kChat = 1,
  kCompletions = 2,
  kVllm = 4,
  kTgi = 8,           // inside "parameters"
  kNative = 16,       // inside "parameters"
  kTritonText = 32,   // inside "parameters"
  kTritonTokens = 64, // inside "inputs[0].parameters"
  kMessages = 128,    // Anthropic's /v1/messages
  kResponses = 256,   // OpenAI's /v1/responses
};

struct FieldRule {
  enum class Type { kInteger, kNumber, kBoolean, kString, kOther };
  const char* name;
  unsigned interfaces;
  Type type;
  // Integers and numbers. For a number, `open_low` and `open_high` leave out the bound itself.
  double low = 0, high = 0;
  bool open_low = false, open_high = false;
  bool not_zero = false;            // -1 and 1 but not 0 (top_k)
  const char* before = "";          // out of range: before + value + after
  const char* after = "";
  const char* type_word = nullptr;  // "<name> must be <word> type."; null: of the type
  const char* type_message = nullptr;  // instead of it
  const char* schema = nullptr;     // kOther: JSON schema
  const char* about = "";
};

[[nodiscard]] std::span<const FieldRule> field_rules();

// The simple fields (all types but kOther) of one request, read by the table.
class FieldValues {
 public:
  // Throws Refused with the table's texts.
  static FieldValues read(Fields& fields, Interface interface);
  [[nodiscard]] std::optional<int64_t> integer(const std::string& name) const;
  [[nodiscard]] std::optional<double> number(const std::string& name) const;
  [[nodiscard]] std::optional<bool> boolean(const std::string& name) const;
  [[nodiscard]] std::optional<std::string> string(const std::string& name) const;

 private:
  std::map<std::string, int64_t> integers_;
  std::map<std::string, double> numbers_;
  std::map<std::string, bool> booleans_;
  std::map<std::string, std::string> strings_;
};

}  // namespace phalanx::api
