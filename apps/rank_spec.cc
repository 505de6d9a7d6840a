#include "apps/rank_spec.h"

#include <nlohmann/json.hpp>

#include "phalanx/base/error.h"

namespace phalanx::apps {

using nlohmann::json;

engine::StepLimits RankSpec::limits(int64_t blocks) const {
  return {.max_tokens = model.max_step_tokens,
          .max_rows = model.max_step_rows,
          .max_sequence = model.max_sequence,
          .blocks = blocks,
          .block_size = model.block_size,
          .vocab_size = vocab_size,
          .ranks = std::ssize(model.weights),
          .draft_sequences = draft ? draft->max_step_rows : 0,
          .max_adapters = model.max_adapters};
}

namespace {

json to_json(const models::ModelOptions& m) {
  return {{"directory", m.directory},
          {"isa", static_cast<int>(m.isa)},
          {"max_step_tokens", m.max_step_tokens},
          {"max_step_rows", m.max_step_rows},
          {"max_sequence", m.max_sequence},
          {"block_size", m.block_size},
          {"kv", static_cast<int>(m.kv)},
          {"weights", m.weights},
          {"moe_ep", m.moe_ep},
          {"rank", m.rank},
          {"max_adapters", m.max_adapters},
          {"max_adapter_rank", m.max_adapter_rank}};
}

models::ModelOptions model_options_from_json(const json& j, int threads) {
  return {.directory = j.at("directory").get<std::string>(),
          .isa = static_cast<ops::Isa>(j.at("isa").get<int>()),
          .max_step_tokens = j.at("max_step_tokens").get<int64_t>(),
          .max_step_rows = j.at("max_step_rows").get<int64_t>(),
          .max_sequence = j.at("max_sequence").get<int64_t>(),
          .block_size = j.at("block_size").get<int64_t>(),
          .kv = static_cast<models::KvDtype>(j.at("kv").get<int>()),
          .weights = j.at("weights").get<std::vector<double>>(),
          .moe_ep = j.at("moe_ep").get<int64_t>(),
          .rank = j.at("rank").get<int>(),
          .max_adapters = j.at("max_adapters").get<int64_t>(),
          .max_adapter_rank = j.at("max_adapter_rank").get<int64_t>(),
          .threads = threads};
}

}  // namespace

json to_json(const RankSpec& s) {
  return {{"model", to_json(s.model)},
          {"draft", s.draft ? to_json(*s.draft) : json()},
          {"vocab_size", s.vocab_size},
          {"max_blocks", s.max_blocks},
          {"generation", s.generation},
          {"threads", s.threads},
          {"cpus", s.cpus},
          {"logits_folder", s.logits_folder},
          {"log_level", s.log_level}};
}

RankSpec rank_spec_from_json(const json& j) {
  RankSpec s;
  s.threads = j.at("threads").get<int>();
  s.model = model_options_from_json(j.at("model"), s.threads);
  if (!j.at("draft").is_null()) s.draft = model_options_from_json(j.at("draft"), s.threads);
  s.vocab_size = j.at("vocab_size").get<int64_t>();
  s.max_blocks = j.at("max_blocks").get<int64_t>();
  s.generation = j.at("generation").get<uint64_t>();
  s.cpus = j.at("cpus").get<std::vector<int>>();
  s.logits_folder = j.at("logits_folder").get<std::string>();
  s.log_level = j.at("log_level").get<int>();
  return s;
}

json to_json(const std::vector<comm::Member>& members) {
  json list = json::array();
  for (const comm::Member& m : members)
    list.push_back({{"rank", m.rank},
                    {"node", m.node},
                    {"host", m.host},
                    {"address", m.data_address},
                    {"port", m.data_port}});
  return list;
}

std::vector<comm::Member> members_from_json(const json& j) {
  std::vector<comm::Member> members;
  for (const json& m : j)
    members.push_back({.rank = m.at("rank").get<int>(),
                       .node = m.at("node").get<int>(),
                       .host = m.at("host").get<std::string>(),
                       .data_address = m.at("address").get<std::string>(),
                       .data_port = m.at("port").get<uint16_t>()});
  return members;
}

json to_json(const net::TlsFiles& files) {
  return {{"plane", files.plane},
          {"certificate", files.certificate},
          {"key", files.key},
          {"key_password", files.key_password},
          {"key_store", {files.key_store.master, files.key_store.standby}},
          {"authorities", files.authorities},
          {"crls", files.crls}};
}

net::TlsFiles tls_files_from_json(const json& j) {
  net::TlsFiles files;
  files.plane = j.at("plane").get<std::string>();
  files.certificate = j.at("certificate").get<std::string>();
  files.key = j.at("key").get<std::string>();
  files.key_password = j.at("key_password").get<std::string>();
  files.key_store = {j.at("key_store").at(0).get<std::string>(),
                     j.at("key_store").at(1).get<std::string>()};
  files.authorities = j.at("authorities").get<std::vector<std::string>>();
  files.crls = j.at("crls").get<std::vector<std::string>>();
  return files;
}

std::string token_to_hex(const comm::Token& token) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (std::byte b : token) {
    hex += kDigits[std::to_integer<int>(b) >> 4];
    hex += kDigits[std::to_integer<int>(b) & 15];
  }
  return hex;
}

comm::Token token_from_hex(const std::string& hex) {
  comm::Token token{};
  if (hex.size() != 2 * token.size())
    throw Error(Code::kInvalidArgument, "token of wrong length between node and rank");
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  for (size_t i = 0; i < token.size(); ++i)
    token[i] = static_cast<std::byte>(digit(hex[2 * i]) << 4 | digit(hex[2 * i + 1]));
  return token;
}

}  // namespace phalanx::apps
