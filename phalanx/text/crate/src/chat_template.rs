use std::fmt;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::Value as Json;

use crate::interface::{guarded, Bytes, Text};

const NAME: &str = "chat_template";

pub struct ChatTemplate {
    environment: Environment<'static>,
    takes_content_parts: bool,
}

/// Marks what the template itself raised.
#[derive(Debug)]
struct Raised;

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
}

/// Python's json.dumps puts a space after ',' and ':'.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn sorted(value: Json) -> Json {
    match value {
        Json::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Json::Object(entries.into_iter().collect())
        }
        Json::Array(items) => Json::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// json.dumps(value, ensure_ascii=False, indent=..., sort_keys=...), without HTML escapes.
fn tojson(
    value: &Value,
    positional_indent: Option<usize>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let failed = |e: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "cannot serialize to JSON").with_source(e)
    };
    let indent = match positional_indent {
        Some(n) => Some(n),
        None => kwargs.get::<Option<usize>>("indent")?,
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.get::<Option<bool>>("ensure_ascii")?;
    kwargs.get::<Option<Value>>("separators")?;
    kwargs.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sort_keys {
        json = sorted(json);
    }
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(64));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            json.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter))
                .map_err(failed)?;
        }
    }
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

fn strftime(now: i64, format: &str) -> Result<String, Error> {
    let format = std::ffi::CString::new(format).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            "strftime_now: zero byte in format",
        )
    })?;
    let mut buffer = [0u8; 256];
    // Safety: both calls write into memory of the stated size that lives here.
    let length = unsafe {
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "strftime_now: time out of range",
            ));
        }
        libc::strftime(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            format.as_ptr(),
            &parts,
        )
    };
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// transformers marks the assistant's text with {% generation %} blocks for training; for a prompt
/// they are transparent. Keeps the whitespace control of the tags.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = &tag[2..tag.len() - 2];
        let word = inner
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Whether the template itself looks into contents that are lists of parts.
fn takes_content_parts(source: &str) -> bool {
    const TESTS: [&str; 5] = [
        " is string",
        " is not string",
        " is iterable",
        " is sequence",
        " is mapping",
    ];
    source.split("{%").skip(1).any(|tag| {
        let tag = tag.split("%}").next().unwrap_or("");
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        if let Some((_, iterable)) = body
            .strip_prefix("for ")
            .and_then(|head| head.split_once(" in "))
        {
            return iterable.contains("content");
        }
        body.contains("content") && TESTS.iter().any(|test| body.contains(test))
    })
}

/// OpenAI's spelling of a message to that of the templates: arguments of tool calls come as JSON
/// text and templates expect an object; a list of text parts becomes one text where the template
/// knows only texts.
fn adapt_message(message: &mut Json, takes_parts: bool) {
    let Some(fields) = message.as_object_mut() else {
        return;
    };
    if let Some(calls) = fields.get_mut("tool_calls").and_then(Json::as_array_mut) {
        for call in calls {
            let Some(arguments) = call.pointer_mut("/function/arguments") else {
                continue;
            };
            let parsed = arguments
                .as_str()
                .and_then(|text| serde_json::from_str::<Json>(text).ok());
            if let Some(object @ Json::Object(_)) = parsed {
                *arguments = object;
            }
        }
    }
    if takes_parts {
        return;
    }
    let Some(parts) = fields.get("content").and_then(Json::as_array) else {
        return;
    };
    let texts: Option<Vec<&str>> = parts
        .iter()
        .map(|part| {
            part.as_str()
                .or_else(|| part.get("text").and_then(Json::as_str))
        })
        .collect();
    if let Some(texts) = texts {
        let joined = texts.join("\n");
        fields.insert("content".to_string(), Json::String(joined));
    }
}

/// Widths and precisions of str.format, added up: its result is made whole before the bound of work
/// sees it.
fn padding_of(format: &str) -> usize {
    const MOST: usize = 1 << 40;
    let mut sum = 0;
    let mut number = 0usize;
    let mut inside = false;
    let mut before = ' ';
    for c in format.chars() {
        if let (true, Some(digit)) = (inside, c.to_digit(10)) {
            number = (number * 10 + digit as usize).min(MOST);
            before = c;
            continue;
        }
        sum = (sum + std::mem::take(&mut number)).min(MOST);
        inside = match c {
            '{' => !(inside && before == '{'),
            '}' => false,
            _ => inside,
        };
        before = c;
    }
    sum
}

/// Python's methods.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    const MOST: usize = 100_000;
    if name == "format" && value.as_str().is_some_and(|s| padding_of(s) > MOST) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("format: widths and precisions add up to more than {MOST}"),
        ));
    }
    unknown_method_callback(state, value, name, args)
}

fn describe(error: &Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = source {
        if e.source().is_some_and(|s| s.is::<Raised>()) {
            if let Some(raised) = e.downcast_ref::<Error>() {
                return raised.detail().unwrap_or("").to_string();
            }
        }
        source = e.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => "the template did not end within its bound of work".to_string(),
        _ => {
            // The innermost cause says most.
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(e) = cause {
                text = format!("{text}: {e}");
                cause = e.source();
            }
            text
        }
    }
}

impl ChatTemplate {
    fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| e.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.set_debug(true);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME.to_string(), without_generation_tags(source))
            .map_err(|e| describe(&e))?;
        Ok(ChatTemplate {
            environment,
            takes_content_parts: takes_content_parts(source),
        })
    }

    fn render(
        &self,
        mut context: serde_json::Map<String, Json>,
        now: i64,
        fuel: u64,
    ) -> Result<String, String> {
        if let Some(messages) = context.get_mut("messages").and_then(Json::as_array_mut) {
            for message in messages {
                adapt_message(message, self.takes_content_parts);
            }
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        environment.add_function("strftime_now", move |format: Arc<str>| {
            strftime(now, &format)
        });
        let template = environment.get_template(NAME).map_err(|e| describe(&e))?;
        template
            .render(Value::from(Serde(Json::Object(context))))
            .map_err(|e| describe(&e))
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_template_compile(
    source: Text,
    out: *mut *mut ChatTemplate,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        Ok(Box::into_raw(Box::new(ChatTemplate::compile(
            source.text()?,
        )?)))
    })
}

#[no_mangle]
pub unsafe extern "C" fn ptx_template_free(chat_template: *mut ChatTemplate) {
    if !chat_template.is_null() {
        drop(Box::from_raw(chat_template));
    }
}

#[no_mangle]
pub unsafe extern "C" fn ptx_template_render(
    chat_template: &ChatTemplate,
    names: *const Text,
    values: *const Text,
    count: usize,
    now: i64,
    fuel: u64,
    out: *mut Bytes,
    error: *mut Bytes,
) -> bool {
    guarded(out, error, || {
        let mut context = serde_json::Map::new();
        for i in 0..count {
            let name = (*names.add(i)).text()?;
            let value = serde_json::from_slice((*values.add(i)).bytes())
                .map_err(|e| format!("{name}: not valid JSON: {e}"))?;
            context.insert(name.to_string(), value);
        }
        Ok(Bytes::new(
            chat_template.render(context, now, fuel)?.into_bytes(),
        ))
    })
}
