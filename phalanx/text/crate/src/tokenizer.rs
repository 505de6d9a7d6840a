use std::collections::HashMap;

use serde_json::Value as Json;
use tokenizers::Tokenizer as HfTokenizer;

use crate::interface::{answer, guarded, Bytes, Ids, Text};

/// How the decoder turns tokens into text, as far as streaming must know it.
struct DecoderTraits {
    byte_level: bool,
    byte_fallback: bool,
    metaspace: Option<String>,
}

pub struct Tokenizer {
    inner: HfTokenizer,
    traits: DecoderTraits,
    byte_of: HashMap<char, u8>,
    added: HashMap<u32, (String, bool)>,
}

/// GPT-2's printable alphabet: bytes that are visible Latin-1 characters stand for themselves, the others
/// for the characters from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut map = HashMap::new();
    let mut next = 0x100u32;
    for byte in 0..=255u8 {
        let visible = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if visible {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        map.insert(char::from_u32(code).unwrap(), byte);
    }
    map
}

fn walk(decoder: &Json, traits: &mut DecoderTraits) {
    match decoder.get("type").and_then(Json::as_str) {
        Some("ByteFallback") => traits.byte_fallback = true,
        Some("Metaspace") => {
            traits.metaspace = decoder
                .get("replacement")
                .and_then(Json::as_str)
                .map(str::to_string);
        }
        Some("Replace") => {
            let pattern = decoder.pointer("/pattern/String").and_then(Json::as_str);
            if decoder.get("content").and_then(Json::as_str) == Some(" ") {
                traits.metaspace = pattern.map(str::to_string);
            }
        }
        Some("Sequence") => {
            for part in decoder
                .get("decoders")
                .and_then(Json::as_array)
                .into_iter()
                .flatten()
            {
                walk(part, traits);
            }
        }
        _ => {}
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

impl Tokenizer {
    fn load(json: &[u8]) -> Result<Self, String> {
        let mut inner = HfTokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let mut traits = DecoderTraits {
            byte_level: false,
            byte_fallback: false,
            metaspace: None,
        };
        if let Some(decoder) = inner.get_decoder() {
            let json = serde_json::to_value(decoder).map_err(|e| e.to_string())?;
            let only = match json.get("decoders").and_then(Json::as_array) {
                Some(parts) if parts.len() == 1 => &parts[0],
                _ => &json,
            };
            traits.byte_level = only.get("type").and_then(Json::as_str) == Some("ByteLevel");
            walk(&json, &mut traits);
        }
        let added = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| (id, (token.content, token.special)))
            .collect();
        Ok(Tokenizer {
            inner,
            traits,
            byte_of: byte_alphabet(),
            added,
        })
    }

    /// Added tokens are no text to a grammar: it names them, or they may not come.
    pub fn is_added(&self, id: u32) -> bool {
        self.added.contains_key(&id)
    }

    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else {
            return Vec::new();
        };
        if self.traits.byte_level {
            // As the decoder does it: also for added tokens.
            let bytes: Option<Vec<u8>> = token
                .chars()
                .map(|c| self.byte_of.get(&c).copied())
                .collect();
            return bytes.unwrap_or_else(|| token.into_bytes());
        }
        if self.added.contains_key(&id) {
            return token.into_bytes();
        }
        if self.traits.byte_fallback {
            if let Some(byte) = fallback_byte(&token) {
                return vec![byte];
            }
        }
        match &self.traits.metaspace {
            Some(mark) => token.replace(mark.as_str(), " ").into_bytes(),
            None => token.into_bytes(),
        }
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_load(
    json: Text,
    out: *mut *mut Tokenizer,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        Ok(Box::into_raw(Box::new(Tokenizer::load(json.bytes())?)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_encode(
    tokenizer: &Tokenizer,
    text: Text,
    add_special_tokens: bool,
    out: *mut Ids,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        let encoding = tokenizer
            .inner
            .encode_fast(text.text()?, add_special_tokens)
            .map_err(|e| e.to_string())?;
        Ok(Ids::new(encoding.get_ids().to_vec()))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_decode(
    tokenizer: &Tokenizer,
    ids: *const u32,
    count: usize,
    skip_special_tokens: bool,
    out: *mut Bytes,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        let ids = if count == 0 {
            &[]
        } else {
            std::slice::from_raw_parts(ids, count)
        };
        let text = tokenizer
            .inner
            .decode(ids, skip_special_tokens)
            .map_err(|e| e.to_string())?;
        Ok(Bytes::new(text.into_bytes()))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_token_bytes(
    tokenizer: &Tokenizer,
    id: u32,
    out: *mut Bytes,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || Ok(Bytes::new(tokenizer.token_bytes(id))))
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_token_id(tokenizer: &Tokenizer, token: Text) -> i64 {
    answer(-1, || match token.text() {
        Ok(text) => tokenizer.inner.token_to_id(text).map_or(-1, i64::from),
        Err(_) => -1,
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_is_special(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer
        .added
        .get(&id)
        .is_some_and(|(_, special)| *special)
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_has_id(tokenizer: &Tokenizer, id: u32) -> bool {
    answer(false, || tokenizer.inner.id_to_token(id).is_some())
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_vocab_size(tokenizer: &Tokenizer) -> u64 {
    answer(0, || tokenizer.inner.get_vocab_size(true) as u64)
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_is_byte_level(tokenizer: &Tokenizer) -> bool {
    tokenizer.traits.byte_level
}

#[no_mangle]
pub unsafe extern "C" fn ptx_tokenizer_is_byte_fallback(tokenizer: &Tokenizer, id: u32) -> bool {
    answer(false, || {
        tokenizer.traits.byte_fallback
            && tokenizer
                .inner
                .id_to_token(id)
                .is_some_and(|t| fallback_byte(&t).is_some())
    })
}
