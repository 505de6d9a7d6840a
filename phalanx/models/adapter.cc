#include "phalanx/models/adapter.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "phalanx/base/check.h"
#include "phalanx/layers/widen.h"
#include "phalanx/models/decoder_model.h"
#include "phalanx/net/digest.h"

namespace phalanx::models {
namespace {

using layers::LoraLayer;
using layers::LoraPair;
using tensor::DType;
using tensor::MatrixView;
using tensor::Range;

// A module of a decoder layer.
struct Place {
  std::string name;
  LoraPair LoraLayer::*pair = nullptr;
  int64_t rows = 0;
  int64_t k = 0;
  Range own;  // output rows
};

Range times(Range range, int64_t n) { return {range.begin * n, range.end * n}; }

bool has_experts(const ModelInfo& info, int64_t layer) {
  return info.experts.count > 0 && info.experts.in_layer[static_cast<size_t>(layer)];
}

std::vector<Place> places_of(const ModelInfo& info, const RankLayout& own, int64_t layer) {
  const std::string stem = fmt::format("model.layers.{}.", layer);
  const int64_t d = info.head_dim;
  const int64_t hidden = info.hidden_size;
  const int64_t q = info.num_attention_heads * d;
  const int64_t kv = info.num_key_value_heads * d;
  std::vector<Place> places;
  if (info.latent.kv_lora_rank == 0)
    places = {{stem + "self_attn.q_proj", &LoraLayer::q, q, hidden, times(own.query_heads, d)},
              {stem + "self_attn.k_proj", &LoraLayer::k, kv, hidden, times(own.kv_heads, d)},
              {stem + "self_attn.v_proj", &LoraLayer::v, kv, hidden, times(own.kv_heads, d)},
              {stem + "self_attn.o_proj", &LoraLayer::o, hidden, q, own.hidden_rows}};
  if (has_experts(info, layer)) return places;
  const int64_t inner = info.intermediate_size;
  places.push_back({stem + "mlp.gate_proj", &LoraLayer::gate, inner, hidden, own.mlp_rows});
  places.push_back({stem + "mlp.up_proj", &LoraLayer::up, inner, hidden, own.mlp_rows});
  places.push_back({stem + "mlp.down_proj", &LoraLayer::down, hidden, inner, own.hidden_rows});
  return places;
}

std::string why_not(const ModelInfo& info, std::string_view module) {
  const auto has = [&](std::string_view part) {
    return module.find(part) != std::string_view::npos;
  };
  if (has("embed_tokens") || has("lm_head")) return "the embedding or the head";
  if (has("experts") || has("block_sparse_moe") || has(".mlp.gate"))
    if (info.experts.count > 0) return "a part of a mixture of experts";
  if (has("self_attn") && info.latent.kv_lora_rank > 0) return "compressed attention (MLA)";
  return "no such layer in this model";
}

weights::LoraFiles open_files(const ModelInfo& info, const std::string& directory,
                              int64_t max_rank) {
  Problems problems;
  weights::LoraFiles files(
      directory, adapted_modules(info),
      [&](std::string_view module) { return why_not(info, module); }, max_rank, problems);
  problems.throw_if_any(fmt::format("adapter {} cannot be used", directory));
  return files;
}

std::string digest_of(const weights::LoraFiles& files) {
  std::string digest;
  std::string chained;
  files.for_bytes([&](std::string_view bytes) {
    chained.assign(digest).append(bytes);
    digest = net::sha256_hex(chained);
  });
  return digest;
}

class OwnAdapter final : public Adapter {
 public:
  OwnAdapter(std::string digest, layers::Memory memory, std::vector<LoraLayer> layers)
      : Adapter(std::move(digest)), memory_(std::move(memory)), layers_(std::move(layers)) {}
  [[nodiscard]] std::span<const LoraLayer> layers() const { return layers_; }

 private:
  layers::Memory memory_;
  std::vector<LoraLayer> layers_;
};

// Rows `take` times `scale`, packed.
ops::PackedLinear pack(const weights::LoraFiles& files, const weights::TensorEntry& entry,
                       Range take, float scale, std::byte* out, ops::Isa isa) {
  const int64_t columns = entry.shape[1];
  std::vector<std::byte> stored(static_cast<size_t>(take.size() * entry.row_bytes()));
  files.read_rows(entry, take.begin, take.size(), stored.data());
  std::vector<float> values(static_cast<size_t>(take.size() * columns));
  layers::widen(stored.data(), entry.dtype, take.size() * columns, values.data());
  for (float& value : values) value *= scale;
  if (take.size() > 0)
    ops::pack_rows({values.data(), DType::kF32, take.size(), columns, columns}, 0, take.size(), out,
                   isa);
  return {.data = out, .rows = take.size(), .k = columns, .dtype = DType::kF32, .isa = isa};
}

}  // namespace

std::vector<weights::AdaptedModule> adapted_modules(const ModelInfo& info) {
  std::vector<weights::AdaptedModule> modules;
  for (int64_t layer = 0; layer < info.num_layers; ++layer)
    for (Place& place : places_of(info, {}, layer))
      modules.push_back({.name = std::move(place.name), .rows = place.rows, .k = place.k});
  return modules;
}

layers::LoraScratch::Shape lora_shape(const ModelInfo& info, const RankLayout& own,
                                      int64_t max_rank) {
  return {.max_k = std::max({info.hidden_size, info.intermediate_size, attention_width(info)}),
          .max_rank = max_rank,
          .gated_rows = own.mlp_rows.size(),
          .halves = info.formats != nullptr};
}

int64_t bytes_of_adapter(const ModelInfo& info, const RankLayout& own, int64_t max_rank,
                         ops::Isa isa) {
  int64_t bytes = 0;
  for (int64_t layer = 0; layer < info.num_layers; ++layer)
    for (const Place& place : places_of(info, own, layer))
      bytes += ops::packed_bytes(max_rank, place.k, DType::kF32, isa) +
               ops::packed_bytes(place.own.size(), max_rank, DType::kF32, isa);
  return bytes;
}

std::unique_ptr<Adapter> read_own_adapter(const ModelInfo& info, const RankLayout& own,
                                          const std::string& directory, int64_t max_rank,
                                          ops::Isa isa) {
  const weights::LoraFiles files = open_files(info, directory, max_rank);
  const auto for_pairs = [&](auto&& use) {
    for (int64_t layer = 0; layer < info.num_layers; ++layer)
      for (const Place& place : places_of(info, own, layer))
        if (const auto* pair = files.find(place.name))
          use(static_cast<size_t>(layer), place, *pair);
  };
  int64_t bytes = 0;
  for_pairs([&](size_t, const Place& place, const weights::LoraFiles::Pair& pair) {
    bytes += ops::packed_bytes(pair.rank, place.k, DType::kF32, isa) +
             ops::packed_bytes(place.own.size(), pair.rank, DType::kF32, isa);
  });
  layers::Memory memory(std::max<int64_t>(bytes, 64), "a LoRA adapter");
  std::vector<LoraLayer> layers(static_cast<size_t>(info.num_layers));
  std::byte* at = memory.data();
  for_pairs([&](size_t layer, const Place& place, const weights::LoraFiles::Pair& pair) {
    LoraPair& packed = layers[layer].*place.pair;
    packed.a = pack(files, pair.a, {0, pair.rank}, 1.0F, at, isa);
    at += ops::packed_bytes(pair.rank, place.k, DType::kF32, isa);
    packed.b = pack(files, pair.b, place.own, static_cast<float>(pair.scale), at, isa);
    at += ops::packed_bytes(place.own.size(), pair.rank, DType::kF32, isa);
  });
  return std::make_unique<OwnAdapter>(digest_of(files), std::move(memory), std::move(layers));
}

std::span<const LoraLayer> layers_of(const Adapter& adapter) {
  const auto* own = dynamic_cast<const OwnAdapter*>(&adapter);
  PHALANX_CHECK(own != nullptr);
  return own->layers();
}

AdapterFacts check_adapter(const ModelInfo& info, const std::string& directory, int64_t max_rank) {
  const weights::LoraFiles files = open_files(info, directory, max_rank);
  return {.max_rank = files.max_rank(), .digest = digest_of(files)};
}

}  // namespace phalanx::models
