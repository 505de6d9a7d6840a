// C interface of the Rust static library. Used by phalanx/text/*.cc only.
//
// Every function that can fail returns false and fills `error` (UTF-8 text, to be freed). No panic
// crosses this border: it becomes an error too. Handles are immutable and may be used by several
// threads at once. Text given in must be valid UTF-8 unless stated; pointers are only read during the call.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct PtxTokenizer PtxTokenizer;
typedef struct PtxTemplate PtxTemplate;
typedef struct PtxGrammars PtxGrammars;
typedef struct PtxWalker PtxWalker;

typedef struct {
  const char* data;
  size_t size;
} PtxText;

// Owned by the Rust side until handed back to ptx_bytes_free / ptx_ids_free.
typedef struct {
  uint8_t* data;
  size_t size;
} PtxBytes;

typedef struct {
  uint32_t* data;
  size_t size;
} PtxIds;

void ptx_bytes_free(PtxBytes bytes);
void ptx_ids_free(PtxIds ids);

// `json` is the content of a tokenizer.json. Its truncation and padding settings are ignored.
bool ptx_tokenizer_load(PtxText json, PtxTokenizer** out, PtxBytes* error);
void ptx_tokenizer_free(PtxTokenizer* tokenizer);
bool ptx_tokenizer_encode(const PtxTokenizer* tokenizer, PtxText text, bool add_special_tokens,
                          PtxIds* out, PtxBytes* error);
// Ids outside the vocabulary yield nothing.
bool ptx_tokenizer_decode(const PtxTokenizer* tokenizer, const uint32_t* ids, size_t count,
                          bool skip_special_tokens, PtxBytes* out, PtxBytes* error);
// The bytes that one token stands for (may be part of a character); empty for unknown ids.
bool ptx_tokenizer_token_bytes(const PtxTokenizer* tokenizer, uint32_t id, PtxBytes* out,
                               PtxBytes* error);
// -1 when there is no such token.
int64_t ptx_tokenizer_token_id(const PtxTokenizer* tokenizer, PtxText token);
bool ptx_tokenizer_is_special(const PtxTokenizer* tokenizer, uint32_t id);
bool ptx_tokenizer_has_id(const PtxTokenizer* tokenizer, uint32_t id);
uint64_t ptx_tokenizer_vocab_size(const PtxTokenizer* tokenizer);
// The decoder is plain byte-level BPE: the text is the concatenated token bytes, read as UTF-8.
bool ptx_tokenizer_is_byte_level(const PtxTokenizer* tokenizer);
// Tokens <0x00>..<0xFF> are joined to characters by the decoder.
bool ptx_tokenizer_is_byte_fallback(const PtxTokenizer* tokenizer, uint32_t id);

bool ptx_template_compile(PtxText source, PtxTemplate** out, PtxBytes* error);
void ptx_template_free(PtxTemplate* chat_template);
// The context is `count` variables, each a name and a JSON text; a later one replaces an earlier one.
// `now` are seconds since 1970 for strftime_now (local time). `fuel` bounds work and memory (about
// one instruction or 64 bytes each).
bool ptx_template_render(const PtxTemplate* chat_template, const PtxText* names,
                         const PtxText* values, size_t count, int64_t now, uint64_t fuel,
                         PtxBytes* out, PtxBytes* error);

// Compiles grammars for this tokeniser and a model whose logits have `vocab` ids; `eos`: the ids that
// end a text. Borrows nothing.
bool ptx_grammars_new(const PtxTokenizer* tokenizer, uint32_t vocab, const uint32_t* eos,
                      size_t eos_count, PtxGrammars** out, PtxBytes* error);
void ptx_grammars_free(PtxGrammars* grammars);
// `kind`: json_object, json_schema, regex, lark, choice (a JSON array of texts). Bounded work.
bool ptx_grammar_compile(const PtxGrammars* grammars, PtxText kind, PtxText text, PtxWalker** out,
                         PtxBytes* error);
// A walker has one user at a time; different ones are independent.
bool ptx_walker_clone(const PtxWalker* walker, PtxWalker** out, PtxBytes* error);
void ptx_walker_free(PtxWalker* walker);
// Bit i % 32 of out[i / 32]: token i may come next.
bool ptx_walker_mask(PtxWalker* walker, uint32_t* out, size_t words, PtxBytes* error);
bool ptx_walker_accept(PtxWalker* walker, uint32_t token, PtxBytes* error);
bool ptx_walker_is_stopped(const PtxWalker* walker);

#ifdef __cplusplus
}
#endif
