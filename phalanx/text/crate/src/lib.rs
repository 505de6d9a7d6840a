//! Tokeniser, chat template and grammars behind a C interface; the contract is in phalanx_text.h.

mod chat_template;
mod grammar;
mod interface;
mod tokenizer;
