#include "apps/bench_serve.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>

#include "phalanx/api/load_client.h"
#include "phalanx/base/error.h"
#include "phalanx/base/json.h"

namespace phalanx::apps {
namespace {

using nlohmann::json;

struct ServeBenchArguments {
  std::string url = "http://127.0.0.1:1025";
  std::string model;
  int64_t requests = 64;
  double rate = 0;
  std::string arrivals = "poisson";
  int64_t concurrency = 1000;
  int64_t prompt = 128, prompt_spread = 0;
  int64_t output = 128, output_spread = 0;
  int64_t shared_prefix = 0;
  int64_t vocabulary = 30000;
  uint32_t seed = 1;
  double timeout_s = 600;
  std::string json_path;
};

// What one answer was worth.
struct Measured {
  int64_t prompt_tokens = 0, output_tokens = 0, cached_tokens = 0;
  double first_ms = 0, whole_ms = 0;
  std::vector<double> gaps_ms;  // between pieces of text
};

api::LoadTarget target_of(const ServeBenchArguments& a, const std::string& path) {
  static const std::regex shape("http://([^/:]+|\\[[0-9a-fA-F:]+\\])(?::([0-9]{1,5}))?/?");
  std::smatch parts;
  if (!std::regex_match(a.url, parts, shape) ||
      (parts[2].matched && std::stoi(parts[2]) > 65535))
    throw Error(Code::kInvalidArgument,
                fmt::format("--url: found \"{}\", expected http://HOST[:PORT] without a path", a.url));
  return {.host = parts[1],
          .port = static_cast<uint16_t>(parts[2].matched ? std::stoi(parts[2]) : 80),
          .path = path,
          .timeout_seconds = a.timeout_s};
}

std::string first_model(const ServeBenchArguments& a) {
  const api::LoadAnswer answer = api::get_once(target_of(a, "/v1/models"));
  if (answer.status == 200 && !answer.pieces.empty()) {
    const json models = parse_json(answer.pieces[0].text, "/v1/models");
    if (models.contains("data") && !models["data"].empty())
      return models["data"][0].value("id", std::string());
  }
  throw Error(Code::kUnavailable,
              fmt::format("{}/v1/models did not name a model (status {}{}{}). Fix: start a server "
                          "there, or give --model",
                          a.url, answer.status, answer.error.empty() ? "" : ", ", answer.error));
}

// Prompts of random token ids, so that no tokeniser has a part in it and none is like another but
// for the common beginning that was asked for.
std::vector<api::LoadRequest> make_load(const ServeBenchArguments& a) {
  std::mt19937 random(a.seed);
  std::uniform_int_distribution<int64_t> token(10, a.vocabulary - 1);
  const auto around = [&](int64_t mean, int64_t spread) {
    return std::uniform_int_distribution<int64_t>(std::max<int64_t>(1, mean - spread),
                                                  mean + spread)(random);
  };
  std::vector<int64_t> prefix;
  for (int64_t i = 0; i < a.shared_prefix; ++i) prefix.push_back(token(random));
  std::exponential_distribution<double> gap(a.rate > 0 ? a.rate : 1);
  double at = 0;
  std::vector<api::LoadRequest> load;
  for (int64_t i = 0; i < a.requests; ++i) {
    std::vector<int64_t> prompt = prefix;
    for (int64_t n = around(a.prompt, a.prompt_spread); n > 0; --n) prompt.push_back(token(random));
    const json body = {{"model", a.model},
                       {"prompt", prompt},
                       {"max_tokens", around(a.output, a.output_spread)},
                       {"temperature", 0},
                       {"ignore_eos", true},
                       {"stream", true},
                       {"stream_options", {{"include_usage", true}}}};
    load.push_back({.at_seconds = at, .body = body.dump()});
    if (a.rate > 0) at += a.arrivals == "poisson" ? gap(random) : 1 / a.rate;
  }
  return load;
}

// Throws Error when an event is not one of a completion.
Measured measure(const api::LoadAnswer& answer) {
  Measured m;
  int64_t last = 0;
  for (const api::LoadPiece& piece : answer.pieces) {
    if (piece.text == "[DONE]") continue;
    const json event = parse_json(piece.text, "an event of the stream");
    if (event.contains("error")) throw Error(Code::kUnavailable, event["error"].dump());
    if (event.contains("usage") && event["usage"].is_object()) {
      const json& usage = event["usage"];
      m.prompt_tokens = usage.value("prompt_tokens", int64_t{0});
      m.output_tokens = usage.value("completion_tokens", int64_t{0});
      if (usage.contains("prompt_tokens_details") && usage["prompt_tokens_details"].is_object())
        m.cached_tokens = usage["prompt_tokens_details"].value("cached_tokens", int64_t{0});
    }
    if (!event.contains("choices") || event["choices"].empty()) continue;
    if (last == 0) m.first_ms = static_cast<double>(piece.at_ns - answer.due_ns) * 1e-6;
    else m.gaps_ms.push_back(static_cast<double>(piece.at_ns - last) * 1e-6);
    last = piece.at_ns;
  }
  m.whole_ms = static_cast<double>(answer.end_ns - answer.due_ns) * 1e-6;
  return m;
}

json percentiles(std::vector<double> v) {
  if (v.empty()) return nullptr;
  std::sort(v.begin(), v.end());
  double sum = 0;
  for (const double x : v) sum += x;
  const auto at = [&](double share) {
    return v[static_cast<size_t>(share * static_cast<double>(v.size() - 1) + 0.5)];
  };
  return {{"mean", sum / static_cast<double>(v.size())}, {"p50", at(0.5)}, {"p90", at(0.9)},
          {"p99", at(0.99)}, {"max", v.back()}};
}

json report(const std::vector<api::LoadAnswer>& answers) {
  std::vector<double> first, gaps, whole;
  std::map<std::string, int64_t> failures;
  int64_t begin = INT64_MAX, end = 0, prompt = 0, output = 0, cached = 0, good = 0;
  for (const api::LoadAnswer& answer : answers) {
    begin = std::min(begin, answer.due_ns);
    end = std::max(end, answer.end_ns);
    std::string failure;
    if (!answer.error.empty()) failure = answer.error;
    else if (answer.status != 200) failure = fmt::format("status {}", answer.status);
    Measured m;
    if (failure.empty()) {
      try {
        m = measure(answer);
        if (m.first_ms == 0) failure = "no text";
      } catch (const std::exception& e) {
        failure = e.what();
      }
    }
    if (!failure.empty()) {
      ++failures[failure];
      continue;
    }
    ++good;
    prompt += m.prompt_tokens;
    output += m.output_tokens;
    cached += m.cached_tokens;
    first.push_back(m.first_ms);
    whole.push_back(m.whole_ms);
    gaps.insert(gaps.end(), m.gaps_ms.begin(), m.gaps_ms.end());
  }
  const double seconds = static_cast<double>(end - begin) * 1e-9;
  return {{"requests", answers.size()},
          {"answered", good},
          {"failures", failures},
          {"seconds", seconds},
          {"prompt_tokens", prompt},
          {"cached_tokens", cached},
          {"output_tokens", output},
          {"requests_per_s", static_cast<double>(good) / seconds},
          {"output_tok_s", static_cast<double>(output) / seconds},
          {"total_tok_s", static_cast<double>(prompt + output) / seconds},
          {"ttft_ms", percentiles(first)},
          {"inter_token_ms", percentiles(gaps)},
          {"whole_ms", percentiles(whole)}};
}

void print(const json& r) {
  fmt::print("{} of {} requests answered in {:.2f} s: {:.2f} requests/s, {:.1f} output tok/s, "
             "{:.1f} tok/s with prompts ({} prompt tokens, {} cached)\n",
             r["answered"].get<int64_t>(), r["requests"].get<int64_t>(), r["seconds"].get<double>(),
             r["requests_per_s"].get<double>(), r["output_tok_s"].get<double>(),
             r["total_tok_s"].get<double>(), r["prompt_tokens"].get<int64_t>(),
             r["cached_tokens"].get<int64_t>());
  fmt::print("{:<16}{:>10}{:>10}{:>10}{:>10}{:>10}\n", "ms", "mean", "p50", "p90", "p99", "max");
  for (const char* name : {"ttft_ms", "inter_token_ms", "whole_ms"}) {
    if (r[name].is_null()) continue;
    fmt::print("{:<16}", std::string_view(name).substr(0, std::string_view(name).size() - 3));
    for (const char* column : {"mean", "p50", "p90", "p99", "max"})
      fmt::print("{:>10.1f}", r[name][column].get<double>());
    fmt::print("\n");
  }
  for (const auto& [failure, count] : r["failures"].items())
    fmt::print("failed {} times: {}\n", count.get<int64_t>(), failure);
}

}  // namespace

int bench_serve(int argc, char** argv) {
  ServeBenchArguments a;
  CLI::App app{"Open-loop load against an OpenAI-compatible endpoint (/v1/completions, streamed).",
               "phalanx bench serve"};
  app.add_option("--url", a.url, "http://HOST:PORT");
  app.add_option("--model", a.model, "default: the first of /v1/models");
  app.add_option("--requests", a.requests, "in all")->check(CLI::Range(1, 1000000));
  app.add_option("--rate", a.rate, "arrivals per second; 0: all at once")->check(CLI::NonNegativeNumber);
  app.add_option("--arrivals", a.arrivals, "poisson or even")->check(CLI::IsMember({"poisson", "even"}));
  app.add_option("--concurrency", a.concurrency, "open at once, at most; others wait, and their wait counts")->check(CLI::Range(1, 60000));
  app.add_option("--prompt", a.prompt, "prompt tokens, mean")->check(CLI::Range(1, 1 << 20));
  app.add_option("--prompt-spread", a.prompt_spread, "uniformly up to so many more or fewer")->check(CLI::NonNegativeNumber);
  app.add_option("--output", a.output, "output tokens, mean")->check(CLI::Range(1, 1 << 20));
  app.add_option("--output-spread", a.output_spread, "uniformly up to so many more or fewer")->check(CLI::NonNegativeNumber);
  app.add_option("--shared-prefix", a.shared_prefix, "tokens that all prompts begin with, in addition")->check(CLI::NonNegativeNumber);
  app.add_option("--vocabulary", a.vocabulary, "prompts are random ids below this")->check(CLI::Range(20, 1 << 24));
  app.add_option("--seed", a.seed, "of prompts, lengths and arrivals");
  app.add_option("--timeout", a.timeout_s, "of one request, seconds")->check(CLI::PositiveNumber);
  app.add_option("--json", a.json_path, "write the report to this file");
  CLI11_PARSE(app, argc, argv);
  if (a.model.empty()) a.model = first_model(a);
  const std::vector<api::LoadRequest> load = make_load(a);
  const json result = report(api::run_load(target_of(a, "/v1/completions"), load, a.concurrency));
  print(result);
  if (!a.json_path.empty()) {
    std::ofstream file(a.json_path);
    file << result.dump(1) << '\n';
    if (!file) throw Error(Code::kPermissionDenied, fmt::format("cannot write {}", a.json_path));
  }
  return result["answered"] == result["requests"] ? 0 : 1;
}

}  // namespace phalanx::apps
