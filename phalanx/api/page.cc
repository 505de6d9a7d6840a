#include "phalanx/api/page.h"

#include <string_view>

namespace phalanx::api {
namespace {

constexpr std::string_view kPage = R"page(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Phalanx</title>
<style>
:root{color-scheme:light dark;--line:#8884;--a:#2a7;--b:#47c;--c:#aaa}
body{font:14px/1.45 system-ui,sans-serif;margin:1.5em auto;max-width:76em;padding:0 1em}
h1{font-size:1.3em}h2{font-size:1.05em;margin:1.6em 0 .4em}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25em .6em;border-bottom:1px solid var(--line)}
.figures{display:flex;flex-wrap:wrap;gap:.6em}.figures div{border:1px solid var(--line);border-radius:6px;padding:.4em .9em;min-width:7.5em}
.figures b{display:block;font-size:1.35em;font-variant-numeric:tabular-nums}
.bar{display:flex;height:1em;min-width:12em;background:var(--line);border-radius:3px;overflow:hidden}.bar i{height:100%}
.compute{background:var(--a)}.transfer{background:var(--b)}.wait{background:var(--c)}
.key i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em;border-radius:2px}
.bad{color:#c33}#talk{white-space:pre-wrap;border:1px solid var(--line);border-radius:6px;padding:.6em;min-height:4em;max-height:24em;overflow:auto}
form{display:flex;gap:.5em;margin-top:.5em}input{flex:1;padding:.4em}
</style></head><body>
<h1>Phalanx <span id="model"></span> <small id="state"></small></h1>
<div class="figures" id="figures"></div>
<h2>Nodes</h2><table><thead><tr><th>address<th>state<th>last contact<th>cores<th>memory</tr></thead><tbody id="nodes"></tbody></table>
<h2>Ranks</h2><div class="key">time per token:<i class="compute"></i>compute<i class="transfer"></i>communication<i class="wait"></i>waiting</div>
<table><thead><tr><th>rank<th>node<th>state<th>heads<th>hidden<th>mlp<th>vocabulary<th>ms per step<th>split</tr></thead><tbody id="ranks"></tbody></table>
<h2>Last errors</h2><ul id="errors"><li>none</li></ul>
<h2>Try it</h2><div id="talk"></div>
<form id="form"><input id="say" autocomplete="off" placeholder="Say something"><button>Send</button></form>
<script>
"use strict";
const $ = id => document.getElementById(id), el = (tag, text, name) => { const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
const range = r => Array.isArray(r) ? (r[1] > r[0] ? r[0] + "-" + (r[1] - 1) : "-") : r ?? "-";
const size = b => b > 2 ** 30 ? (b / 2 ** 30).toFixed(1) + " GiB" : (b / 2 ** 20).toFixed(0) + " MiB";
let before = null; const errors = [];
function error(text) {
  if (errors[0]?.text === text) return;
  errors.unshift({text, at: new Date().toLocaleTimeString()}); errors.length = Math.min(errors.length, 10);
  $("errors").replaceChildren(...errors.map(e => el("li", e.at + "  " + e.text, "bad")));
}
function figure(name, value) { const d = el("div", name); d.prepend(el("b", value)); return d; }
function row(cells) { const r = el("tr"); r.append(...cells.map(c => { const d = el("td");
  d.append(c instanceof Node ? c : String(c)); return d; })); return r; }
function split(now, old) {
  const part = name => Math.max(0, (now[name] ?? 0) - (old?.[name] ?? 0));
  const steps = (now.steps_done ?? 0) - (old?.steps_done ?? 0), parts = [["compute", part("compute_ns")],
    ["transfer", part("transfer_ns")], ["wait", part("wait_ns")]], sum = parts.reduce((s, p) => s + p[1], 0);
  const bar = el("div", undefined, "bar");
  for (const [name, ns] of parts) { const i = el("i", undefined, name); i.style.width = (sum ? 100 * ns / sum : 0) + "%";
    i.title = name + " " + (steps ? (ns / steps / 1e6).toFixed(2) : 0) + " ms"; bar.append(i); }
  return [steps > 0 ? (sum / steps / 1e6).toFixed(2) : "-", bar];
}
function show(status, now) {
  const p = status.phalanx ?? {}, e = p.engine ?? {}, seconds = before ? (now - before.now) / 1000 : 0;
  const rate = name => seconds > 0 ? ((e[name] - before.engine[name]) / seconds).toFixed(1) : "-";
  $("state").textContent = p.failure ? "failed" : "serving, generation " + p.generation;
  $("state").className = p.failure ? "bad" : "";
  if (p.failure) error(p.failure);
  if (before && e.failed > before.engine.failed) error((e.failed - before.engine.failed) + " request(s) failed");
  const used = e.blocks_total ? 100 * (1 - e.blocks_free / e.blocks_total) : 0;
  $("figures").replaceChildren(figure("tokens/s out", rate("output_tokens")), figure("tokens/s in", rate("prompt_tokens")),
    figure("running", e.running ?? 0), figure("queue", e.waiting ?? 0), figure("KV cache", used.toFixed(1) + " %"),
    figure("ranks", p.world_size ?? "-"), figure("requests", e.succeeded ?? 0), figure("failed", e.failed ?? 0));
  $("nodes").replaceChildren(...(p.nodes ?? []).map(n => row([n.address, n.state,
    (n.last_contact_seconds ?? 0).toFixed(1) + " s", n.cores ?? "-", size(n.memory_bytes ?? 0)])));
  // The split is that of the last interval with steps.
  $("ranks").replaceChildren(...(p.ranks ?? []).map(r => {
    const old = before?.ranks[r.rank], still = old && old.steps_done === r.steps_done;
    const [ms, bar] = still ? before.shown[r.rank] ?? split(r) : split(r, old);
    (now.shown ??= {})[r.rank] = [ms, bar];
    return row([r.rank, r.node, r.state, range(r.heads), range(r.hidden_rows), range(r.mlp_rows), range(r.vocab), ms, bar]); }));
  before = {now, engine: e, ranks: Object.fromEntries((p.ranks ?? []).map(r => [r.rank, r])), shown: now.shown ?? {}};
}
async function poll() {
  try {
    const answer = await fetch("v1/status");
    if (!answer.ok) throw new Error("/v1/status answers " + answer.status + ": " + (await answer.text()).slice(0, 300));
    show(await answer.json(), new Date());
  } catch (e) { $("state").textContent = "no answer"; $("state").className = "bad"; error(e.message); }
  setTimeout(poll, 1000);
}
const talk = [];
$("form").addEventListener("submit", async event => {
  event.preventDefault();
  const text = $("say").value.trim(); if (!text) return;
  $("say").value = ""; talk.push({role: "user", content: text});
  $("talk").append("> " + text + "\n");
  const own = {role: "assistant", content: ""};
  try {
    await known;
    const answer = await fetch("chat", {method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({model: $("model").textContent, messages: talk, stream: true, max_tokens: 256})});
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", piece; !(piece = await reader.read()).done;) {
      rest += piece.value; const lines = rest.split("\n"); rest = lines.pop();
      for (const line of lines.filter(l => l.startsWith("data:") && !l.includes("[DONE]"))) {
        const json = JSON.parse(line.slice(5)); if (json.error) throw new Error(JSON.stringify(json.error));
        const more = json.choices?.[0]?.delta?.content ?? ""; own.content += more; $("talk").append(more);
        $("talk").scrollTop = $("talk").scrollHeight; } }
    talk.push(own);
  } catch (e) { error(e.message); talk.pop(); }
  $("talk").append("\n");
});
const known = fetch("info").then(r => r.json()).then(i => { $("model").textContent = i.models?.[0]?.model_id ?? i.model_id ?? ""; }).catch(() => {});
const asked = new URLSearchParams(location.search).get("say");
if (asked) setTimeout(() => { $("say").value = asked; $("form").requestSubmit(); }, 600);
poll();
</script></body></html>
)page";

}  // namespace

void mount_page(const std::shared_ptr<Core>&, Server& server) {
  server.route(kManagement, "GET", "/",
               [](const HttpRequest&, const std::shared_ptr<Responder>& responder) {
                 responder->respond(
                     {.status = 200,
                      .content_type = "text/html; charset=utf-8",
                      .body = std::string(kPage),
                      .headers = {{"Content-Security-Policy",
                                   "default-src 'none'; style-src 'unsafe-inline'; script-src "
                                   "'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"},
                                  {"Cache-Control", "no-store"}}});
               });
}

}  // namespace phalanx::api
