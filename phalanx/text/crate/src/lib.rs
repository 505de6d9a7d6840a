//! Tokeniser and chat template behind a C interface; the contract is in phalanx_text.h.

mod chat_template;
mod interface;
mod tokenizer;
