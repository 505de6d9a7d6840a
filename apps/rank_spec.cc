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
          .ranks = std::ssize(model.weights)};
}

json to_json(const RankSpec& s) {
  return {{"directory", s.model.directory},
          {"isa", static_cast<int>(s.model.isa)},
          {"max_step_tokens", s.model.max_step_tokens},
          {"max_step_rows", s.model.max_step_rows},
          {"max_sequence", s.model.max_sequence},
          {"block_size", s.model.block_size},
          {"kv", static_cast<int>(s.model.kv)},
          {"weights", s.model.weights},
          {"moe_ep", s.model.moe_ep},
          {"rank", s.model.rank},
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
  s.model.directory = j.at("directory").get<std::string>();
  s.model.isa = static_cast<ops::Isa>(j.at("isa").get<int>());
  s.model.max_step_tokens = j.at("max_step_tokens").get<int64_t>();
  s.model.max_step_rows = j.at("max_step_rows").get<int64_t>();
  s.model.max_sequence = j.at("max_sequence").get<int64_t>();
  s.model.block_size = j.at("block_size").get<int64_t>();
  s.model.kv = static_cast<models::KvDtype>(j.at("kv").get<int>());
  s.model.weights = j.at("weights").get<std::vector<double>>();
  s.model.moe_ep = j.at("moe_ep").get<int64_t>();
  s.model.rank = j.at("rank").get<int>();
  s.vocab_size = j.at("vocab_size").get<int64_t>();
  s.max_blocks = j.at("max_blocks").get<int64_t>();
  s.generation = j.at("generation").get<uint64_t>();
  s.threads = j.at("threads").get<int>();
  s.model.threads = s.threads;
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
