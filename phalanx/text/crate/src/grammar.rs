use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{json, Value as Json};

use crate::interface::{guarded, Bytes, Text};
use crate::tokenizer::Tokenizer;

/// Compiles grammars for one tokeniser.
pub struct Grammars {
    factory: ParserFactory,
    words: usize,
    ends: Arc<[u32]>,
}

/// One sequence's place in a grammar.
pub struct Walker {
    matcher: Matcher,
    words: usize,
    /// The matcher knows the first as its end token; the others are as good.
    ends: Arc<[u32]>,
}

/// Whitespace between JSON tokens: as people and models write it, but never without end.
const WHITESPACE: &str = r"[ \t\n\r]{1,24}";

/// Bounds that keep compiling under a second and a mask within milliseconds, whatever the grammar.
fn bound(factory: &mut ParserFactory) {
    let limits = factory.limits_mut();
    limits.initial_lexer_fuel = 1_000_000;
    limits.step_lexer_fuel = 400_000;
    limits.step_max_items = 100_000;
    limits.max_lexer_states = 100_000;
    limits.max_grammar_size = 300_000;
    limits.precompute_large_lexemes = false;
    limits.verbose_errors = false;
}

impl Grammars {
    fn new(tokenizer: &Tokenizer, vocab: u32, eos: &[u32]) -> Result<Self, String> {
        let words: Vec<Vec<u8>> = (0..vocab)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                if !tokenizer.is_added(id) {
                    return bytes;
                }
                let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                marked.extend(bytes);
                marked
            })
            .collect();
        let first = eos.first().copied().ok_or("the model has no end token")?;
        if let Some(beyond) = eos.iter().find(|&&id| id >= vocab) {
            return Err(format!(
                "end token {beyond} is not in the vocabulary of {vocab}"
            ));
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab, first), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        factory.quiet();
        bound(&mut factory);
        Ok(Grammars {
            factory,
            words: (vocab as usize).div_ceil(32),
            ends: eos.into(),
        })
    }

    fn compile(&self, kind: &str, text: &str) -> Result<Walker, String> {
        let as_json = || serde_json::from_str::<Json>(text).map_err(|e| e.to_string());
        let grammar = match kind {
            "json_object" => schema_grammar(json!({"type": "object"}))?,
            "json_schema" => schema_grammar(as_json()?)?,
            "regex" => TopLevelGrammar::from_regex(text),
            "lark" => TopLevelGrammar::from_lark(text.to_string()),
            "choice" => {
                let choices: Vec<String> =
                    serde_json::from_value(as_json()?).map_err(|e| e.to_string())?;
                let quoted: Vec<String> = choices
                    .iter()
                    .map(|c| serde_json::to_string(c).unwrap_or_default())
                    .collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
            _ => return Err(format!("unknown kind of grammar {kind}")),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(error);
        }
        // What compiles may still have a first step beyond the bounds.
        matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
        Ok(Walker {
            matcher,
            words: self.words,
            ends: self.ends.clone(),
        })
    }
}

/// Counts that the compiler would write out one by one.
const COUNTS: [&str; 4] = ["minItems", "maxItems", "minProperties", "maxProperties"];
const MOST: f64 = 10_000.0;

fn check_counts(schema: &Json) -> Result<(), String> {
    match schema {
        Json::Array(all) => all.iter().try_for_each(check_counts),
        Json::Object(all) => all.iter().try_for_each(|(key, value)| match value.as_f64() {
            Some(count) if count > MOST && COUNTS.contains(&key.as_str()) => {
                Err(format!("{key}: found {value}, expected at most {MOST}"))
            }
            _ => check_counts(value),
        }),
        _ => Ok(()),
    }
}

fn schema_grammar(mut schema: Json) -> Result<TopLevelGrammar, String> {
    check_counts(&schema)?;
    if let Some(object) = schema.as_object_mut() {
        object.insert(
            "x-guidance".to_string(),
            json!({"whitespace_pattern": WHITESPACE}),
        );
    }
    Ok(TopLevelGrammar::from_json_schema(schema))
}

impl Walker {
    fn mask(&mut self, out: &mut [u32]) -> Result<(), String> {
        let mask: SimpleVob = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| e.to_string())?;
        out.fill(0);
        let given = mask.as_slice();
        let count = given.len().min(out.len()).min(self.words);
        out[..count].copy_from_slice(&given[..count]);
        let bit = |id: u32| (id as usize / 32, 1u32 << (id % 32));
        let (word, first) = bit(self.ends[0]);
        if out[word] & first != 0 {
            for (word, end) in self.ends.iter().map(|&id| bit(id)) {
                out[word] |= end;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(()); // the end token after the end
        }
        let token = if self.ends.contains(&token) {
            self.ends[0]
        } else {
            token
        };
        self.matcher
            .consume_token(token)
            .map_err(|e| e.to_string())
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_grammars_new(
    tokenizer: &Tokenizer,
    vocab: u32,
    eos: *const u32,
    eos_count: usize,
    out: *mut *mut Grammars,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        let eos = if eos_count == 0 {
            &[]
        } else {
            std::slice::from_raw_parts(eos, eos_count)
        };
        Ok(Box::into_raw(Box::new(Grammars::new(
            tokenizer, vocab, eos,
        )?)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_grammars_free(grammars: *mut Grammars) {
    if !grammars.is_null() {
        drop(Box::from_raw(grammars));
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_grammar_compile(
    grammars: &Grammars,
    kind: Text,
    text: Text,
    out: *mut *mut Walker,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        let walker = grammars.compile(kind.text()?, text.text()?)?;
        Ok(Box::into_raw(Box::new(walker)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_walker_clone(
    walker: &Walker,
    out: *mut *mut Walker,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        Ok(Box::into_raw(Box::new(Walker {
            matcher: walker.matcher.deep_clone(),
            words: walker.words,
            ends: walker.ends.clone(),
        })))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_walker_free(walker: *mut Walker) {
    if !walker.is_null() {
        drop(Box::from_raw(walker));
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_walker_mask(
    walker: &mut Walker,
    out: *mut u32,
    words: usize,
    error: *mut Bytes,
) -> bool {
    let mut done = ();
    guarded(&mut done, error, || {
        walker.mask(std::slice::from_raw_parts_mut(out, words))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_walker_accept(
    walker: &mut Walker,
    token: u32,
    error: *mut Bytes,
) -> bool {
    let mut done = ();
    guarded(&mut done, error, || walker.accept(token))
}

#[no_mangle]
pub unsafe extern "C" fn ptx_walker_is_stopped(walker: &Walker) -> bool {
    crate::interface::answer(true, || walker.matcher.is_stopped())
}
